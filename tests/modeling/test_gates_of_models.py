"""Models with a gate."""

import pytest
import torch
from early_exit_systems import SIZES, System, each_parent, each_system, same
from minis import ECO, build, make_batch

from eco_m2f.checkpoint.parent_hash import parent_sha256
from eco_m2f.engine.predict import load_gate
from eco_m2f.gates.gate import Gate

pytestmark = pytest.mark.slow


def gate_file(path, system: System, favourite: int, source: str = "res5") -> str:
    """A gate that always chooses `favourite`."""
    eco = system.models()[1]
    channels = 32 if source == "projected" else eco.backbone.output_shape()["res5"].channels
    bias = torch.tensor([float(k == favourite) for k in system.exits])
    weight, sha = torch.zeros(len(system.exits), channels), parent_sha256(eco.state_dict())
    Gate(weight, bias, system.exits, 0.001, "hard_ce", feature_source=source, parent_sha256=sha).save(path)
    return str(path)


@pytest.mark.parametrize("source", ["res5", "projected"])
@each_system
@torch.no_grad()
def test_a_gate_leads_to_the_fixed_exit_and_belongs_to_its_weights(system, tmp_path, source):
    gate_opts = ("MODEL.ECO.POLICY", "LinearGate", "MODEL.ECO.FEATURE", source)
    gated, k = system.twin(*gate_opts), system.exits[-2]
    path = gate_file(tmp_path / "gate.pth", system, k, source)
    load_gate(gated, path)
    assert gated.state_dict().keys() == system.models()[1].state_dict().keys()
    for a, b in zip(gated(make_batch(SIZES)), system.twin("MODEL.ECO.EXIT", k)(make_batch(SIZES))):
        assert same(a, b) and a["exit"] == b["exit"] == k
    with pytest.raises(ValueError, match="fitted for parent weights"):
        load_gate(system.build_eco(*gate_opts), path)


@each_parent
def test_a_learned_policy_without_weights_raises(system):
    with pytest.raises(RuntimeError, match="GATE"):
        system.build_eco("MODEL.ECO.POLICY", "LinearGate")(make_batch())


@each_parent
def test_projected_feature_reaches_the_gate(system):
    model = system.build_eco("MODEL.ECO.POLICY", "LinearGate", "MODEL.ECO.FEATURE", "projected")
    features = model.extract(model.preprocess(make_batch()))
    seen = model.policy_features(features, "projected")
    assert seen["projected"].shape[1] == 32 and "projected" not in features
    assert model.exit_policy.in_channels == 32


@torch.no_grad()
def test_a_gate_goes_by_the_stride_of_the_map_that_it_reads():
    """If the encoder does not read res5, "projected" comes from res4, at stride 16."""
    levels = ("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", ["res3", "res4"])
    model = build(ECO, *levels, "MODEL.ECO.POLICY", "LinearGate", "MODEL.ECO.FEATURE", "projected")
    assert model.head.coarsest == "res4" and model.exit_policy.stride == 16
    images = model.preprocess(make_batch(((64, 96), (33, 60))))
    features = model.extract(images)
    tokens = model.head.projected(features)
    assert tokens.shape[-2:] == (4, 6)
    pooled = model.pooled_feature(features, images.image_sizes, "projected")
    torch.testing.assert_close(pooled[0], tokens[0].mean((1, 2)))
    torch.testing.assert_close(pooled[1], tokens[1, :, :3, :4].mean((1, 2)))


def test_a_backbone_without_res5_needs_no_gate_that_reads_it():
    names = ["res2", "res3", "res4"]
    opts = ("MODEL.RESNETS.OUT_FEATURES", names, "MODEL.SEM_SEG_HEAD.IN_FEATURES", names)
    opts += ("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", ["res3", "res4"])
    opts += ("MODEL.MASK_FORMER.DEC_LAYERS", 3)
    assert [r["exit"] for r in build(ECO, *opts, "MODEL.ECO.EXIT", 2)(make_batch())] == [2, 2]
    with pytest.raises(
        ValueError, match=r"FEATURE res5, but the backbone yields \['projected', 'res2', 'res3', 'res4'\]"
    ):
        build(ECO, *opts, "MODEL.ECO.POLICY", "LinearGate")
