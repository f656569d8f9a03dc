"""Exit policies: the contract of the registry, and the behaviour of each policy."""

import threading

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from eco_m2f.gates.gate import Gate
from eco_m2f.policies.fixed import FixedExit
from eco_m2f.policies.linear_gate import LinearGate
from eco_m2f.policies.oracle import OracleExit
from eco_m2f.policies.pooling import pool_valid
from eco_m2f.policies.registry import EXIT_POLICY_REGISTRY, build_exit_policy

EXITS = [2, 3, 4, 5, 6]
CHANNELS = {"res5": 12, "projected": 8}
SIZES = [(96, 130), (64, 160), (33, 32)]
IDS = [7, 8, 9]
PARENT = "a" * 64
SEQUENTIAL = {name for name, policy in EXIT_POLICY_REGISTRY if getattr(policy, "sequential", False)}
ONE_SHOT = {name for name, _ in EXIT_POLICY_REGISTRY} - SEQUENTIAL


def make_features(seed=0, sizes=SIZES):
    """Maps of a batch padded to 96 x 160 pixels."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(len(sizes), c, 3, 5, generator=generator) for name, c in CHANNELS.items()}


def make_gate(path, exits=(2, 3, 4, 5, 6), feature_source="res5", channels=None):
    generator = torch.Generator().manual_seed(1)
    channels = channels or CHANNELS[feature_source]
    gate = Gate(
        weight=torch.randn(len(exits), channels, generator=generator),
        bias=torch.randn(len(exits), generator=generator),
        exits=exits,
        beta=0.0005,
        loss="hard_ce",
        feature_source=feature_source,
        parent_sha256=PARENT,
    )
    gate.save(path)
    return gate


def make_cfg(policy="FixedExit", **options):
    cfg = CfgNode({"MODEL": {}})
    cfg.MODEL.ECO = CfgNode(
        {
            "EXITS": EXITS,
            "POLICY": policy,
            "EXIT": 6,
            "GATE": "",
            "FEATURE": "res5",
            "MAX_EXIT": 6,
            "BETA": 0.0005,
            "DERIVED": "",
            **options,
        }
    )
    return cfg


def build(**options):
    shapes = {name: ShapeSpec(channels=channels, stride=32) for name, channels in CHANNELS.items()}
    return build_exit_policy(make_cfg(**options), shapes)


@pytest.fixture
def ready(tmp_path, derived_dir):
    """{policy name: a policy that can run}. Add new policies here, sequential ones in test_sequential_exits.py."""
    make_gate(tmp_path / "gate.pth")
    gate = build(POLICY="LinearGate", GATE=str(tmp_path / "gate.pth"))
    gate.load_gate(str(tmp_path / "gate.pth"), PARENT)
    return {
        "FixedExit": build(EXIT=4),
        "LinearGate": gate,
        "OracleExit": build(POLICY="OracleExit", DERIVED=str(derived_dir)),
    }


def test_every_registered_policy_is_under_contract(ready):
    assert set(ready) == ONE_SHOT
    assert "image_ids" in EXIT_POLICY_REGISTRY.__doc__


@pytest.mark.parametrize("name", sorted(ONE_SHOT))
class TestContract:
    def test_an_exit_per_image(self, ready, name):
        exits = ready[name](make_features(), SIZES, image_ids=IDS)
        assert exits.dtype == torch.int64 and exits.shape == (3,) and exits.device.type == "cpu"
        assert set(exits.tolist()) <= set(ready[name].exits) <= set(EXITS)

    def test_batch_mates_do_not_matter(self, ready, name):
        features = make_features()
        together = ready[name](features, SIZES, image_ids=IDS)
        for i, size in enumerate(SIZES):
            alone = {key: value[i : i + 1] for key, value in features.items()}
            assert ready[name](alone, [size], image_ids=IDS[i : i + 1]).tolist() == [together[i].item()]

    def test_adds_nothing_to_the_state_dict(self, ready, name):
        assert not ready[name].state_dict()


def test_fixed_exit_gives_its_exit():
    assert build(EXIT=3)(make_features(), SIZES).tolist() == [3, 3, 3]
    with pytest.raises(ValueError, match=r"MODEL.ECO.EXIT is 1.*\[2, 3, 4, 5, 6\]"):
        build(EXIT=1)
    assert FixedExit(exit=1)({}, SIZES).tolist() == [1, 1, 1]


def test_pooling_leaves_the_padding_out():
    feature = make_features()["res5"]
    pooled = pool_valid(feature, SIZES, 32)
    covered = [(3, 5), (2, 5), (2, 1)]  # ceil(size / 32)
    for i, (rows, columns) in enumerate(covered):
        torch.testing.assert_close(pooled[i], feature[i, :, :rows, :columns].mean((1, 2)))
    noisy = feature.clone()
    noisy[1, :, 2:] = torch.nan
    noisy[2, :, :, 1:] = torch.inf
    assert torch.equal(pool_valid(noisy, SIZES, 32), pooled)
    cropped = feature[2:, :, :2, :1]
    assert torch.equal(pool_valid(cropped, SIZES[2:], 32)[0], pooled[2])


def test_pooling_and_the_gate_go_by_the_stride_of_the_map(tmp_path):
    """DETR-DC5's res5, for instance, has 16 pixels per token."""
    feature = make_features()["res5"]
    pooled = pool_valid(feature, [(-(-s[0] // 2), -(-s[1] // 2)) for s in SIZES], 16)
    assert torch.equal(pooled, pool_valid(feature, SIZES, 32))
    gate = make_gate(tmp_path / "gate.pth")
    policy = LinearGate(in_channels=CHANNELS["res5"], stride=16, exits=EXITS)
    policy.load_gate(str(tmp_path / "gate.pth"), PARENT)
    torch.testing.assert_close(
        policy.logits({"res5": feature}, [(-(-s[0] // 2), -(-s[1] // 2)) for s in SIZES]),
        pooled @ gate.weight.T + gate.bias,
    )


def test_pooling_is_in_float32_and_independent_of_memory_format():
    feature = make_features()["res5"]
    assert pool_valid(feature.half(), SIZES, 32).dtype == torch.float32
    assert pool_valid(feature.double(), SIZES, 32).dtype == torch.float64
    assert torch.equal(
        pool_valid(feature.to(memory_format=torch.channels_last), SIZES, 32), pool_valid(feature, SIZES, 32)
    )


def test_pooling_refuses_sizes_that_do_not_fit():
    feature = make_features()["res5"]
    for size in [(97, 32), (32, 161), (0, 32)]:
        with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}"):
            pool_valid(feature, [SIZES[0], SIZES[1], size], 32)
    with pytest.raises(ValueError, match="2 image sizes for a batch of 3"):
        pool_valid(feature, SIZES[:2], 32)


def test_gate_without_weights_refuses_to_run(tmp_path):
    with pytest.raises(RuntimeError, match="MODEL.ECO.GATE"):
        build(POLICY="LinearGate")(make_features(), SIZES)
    make_gate(tmp_path / "gate.pth")
    only_examined = build(POLICY="LinearGate", GATE=str(tmp_path / "gate.pth"))
    with pytest.raises(RuntimeError, match="load_gate"):
        only_examined(make_features(), SIZES)


@pytest.mark.parametrize("source", ["res5", "projected"])
def test_gate_is_the_linear_layer_on_the_pooled_features(tmp_path, source):
    gate = make_gate(tmp_path / "gate.pth", feature_source=source)
    policy = build(POLICY="LinearGate", FEATURE=source)
    policy.load_gate(str(tmp_path / "gate.pth"), PARENT)
    features = make_features()
    z = pool_valid(features[source], SIZES, 32)
    torch.testing.assert_close(policy.logits(features, SIZES), z @ gate.weight.T + gate.bias)
    assert torch.equal(policy(features, SIZES), gate.choose(z))


def test_gate_forced_to_an_exit_is_the_fixed_exit(tmp_path):
    for i, exit in enumerate(EXITS):
        gate = make_gate(tmp_path / "gate.pth")
        gate.weight.zero_()
        gate.bias = torch.eye(5)[i]
        gate.save(tmp_path / "gate.pth")
        policy = LinearGate(in_channels=CHANNELS["res5"], stride=32, exits=EXITS)
        policy.load_gate(str(tmp_path / "gate.pth"), PARENT)
        assert torch.equal(policy(make_features(), SIZES), FixedExit(exit=exit)(make_features(), SIZES))


def test_gate_ties_go_to_the_smaller_exit(tmp_path):
    gate = make_gate(tmp_path / "gate.pth")
    gate.weight.zero_()
    gate.bias = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    gate.save(tmp_path / "gate.pth")
    policy = LinearGate(in_channels=CHANNELS["res5"], stride=32, exits=EXITS)
    policy.load_gate(str(tmp_path / "gate.pth"), PARENT)
    assert policy(make_features(), SIZES).tolist() == [3, 3, 3]


def test_gates_are_switched_at_run_time(tmp_path):
    make_gate(tmp_path / "six.pth")
    make_gate(tmp_path / "four.pth", exits=(2, 3, 4))
    policy = build(POLICY="LinearGate")
    policy.load_gate(str(tmp_path / "six.pth"), PARENT)
    before = policy(make_features(), SIZES)
    policy.load_gate(str(tmp_path / "four.pth"), PARENT)
    assert policy.exits == (2, 3, 4) and policy.logits(make_features(), SIZES).shape == (3, 3)
    policy.load_gate(str(tmp_path / "six.pth"), PARENT)
    assert torch.equal(policy(make_features(), SIZES), before)


class SwitchingFeatures(dict):
    """Maps whose first reading switches the gate, as another thread would."""

    def __init__(self, features, switch):
        super().__init__(features)
        self.switch = switch

    def __getitem__(self, name):
        switch, self.switch = self.switch, lambda: None
        switch()
        return super().__getitem__(name)


@pytest.mark.parametrize("moment", ["before the features are read", "once the logits are there"])
def test_a_gate_that_is_switched_in_the_middle_of_a_choice_does_not_mix_with_the_new_one(tmp_path, monkeypatch, moment):
    """The old gate chooses the last of five exits; the new one has two of them."""
    deep, shallow = make_gate(tmp_path / "deep.pth"), make_gate(tmp_path / "shallow.pth", exits=(2, 3))
    for gate, path, bias in ((deep, "deep.pth", [0, 0, 0, 0, 1.0]), (shallow, "shallow.pth", [0, 1.0])):
        gate.weight.zero_()
        gate.bias = torch.tensor(bias)
        gate.save(tmp_path / path)
    policy, switched = build(POLICY="LinearGate"), []
    policy.load_gate(str(tmp_path / "deep.pth"), PARENT)

    def switch():
        if not switched:
            switched.append(True)
            other = threading.Thread(target=policy.load_gate, args=(str(tmp_path / "shallow.pth"), PARENT))
            other.start()
            other.join()

    features = make_features()
    if moment == "before the features are read":
        features = SwitchingFeatures(features, switch)
    else:
        linear = torch.nn.functional.linear

        def then_switch(*args):
            result = linear(*args)
            switch()
            return result

        monkeypatch.setattr(torch.nn.functional, "linear", then_switch)
    assert policy(features, SIZES).tolist() == [6, 6, 6] and switched
    assert policy(features, SIZES).tolist() == [3, 3, 3] and policy.exits == (2, 3)


def test_changing_the_gate_that_was_loaded_does_not_change_the_policy(tmp_path):
    make_gate(tmp_path / "gate.pth")
    policy = build(POLICY="LinearGate")
    gate = policy.load_gate(str(tmp_path / "gate.pth"), PARENT)
    before = policy.logits(make_features(), SIZES)
    gate.weight.zero_()
    assert torch.equal(policy.logits(make_features(), SIZES), before)


def test_gate_of_another_parent_is_refused(tmp_path):
    make_gate(tmp_path / "gate.pth")
    policy = build(POLICY="LinearGate")
    with pytest.raises(ValueError, match="aaaaaaaaaaaa.*bbbbbbbbbbbb"):
        policy.load_gate(str(tmp_path / "gate.pth"), "b" * 64)
    with pytest.raises(RuntimeError):
        policy(make_features(), SIZES)


def test_gate_mistakes_show_when_the_model_is_built(tmp_path):
    path = str(tmp_path / "gate.pth")
    with pytest.raises(FileNotFoundError, match="no gate at"):
        build(POLICY="LinearGate", GATE=path)
    make_gate(path)
    with pytest.raises(ValueError, match="parent offers"):
        build(POLICY="LinearGate", GATE=path, MAX_EXIT=4)
    with pytest.raises(ValueError, match="set MODEL.ECO.FEATURE"):
        build(POLICY="LinearGate", GATE=path, FEATURE="projected")
    with pytest.raises(ValueError, match="'res4'"):
        build(POLICY="LinearGate", FEATURE="res4")
    with pytest.raises(ValueError, match="not 7"):
        build(POLICY="LinearGate", MAX_EXIT=7)
    make_gate(path, channels=13)
    with pytest.raises(ValueError, match="13 channels, the map has 12"):
        build(POLICY="LinearGate", GATE=path)


def test_gate_names_missing_and_broken_features(tmp_path):
    make_gate(tmp_path / "gate.pth")
    policy = build(POLICY="LinearGate")
    policy.load_gate(str(tmp_path / "gate.pth"), PARENT)
    features = make_features()
    with pytest.raises(ValueError, match="res5"):
        policy({"projected": features["projected"]}, SIZES)
    features["res5"][1] = torch.nan
    with pytest.raises(FloatingPointError, match=r"images \[1\]"):
        policy(features, SIZES)


def test_oracle_looks_the_target_up(derived_dir):
    policy = build(POLICY="OracleExit", DERIVED=str(derived_dir), BETA=0.0)
    assert policy(make_features(), SIZES, image_ids=["7", 8, 9]).tolist() == [6, 3, 2]
    frugal = build(POLICY="OracleExit", DERIVED=str(derived_dir), BETA=10.0)
    assert frugal({}, SIZES, image_ids=IDS).tolist() == [2, 2, 2]
    capped = build(POLICY="OracleExit", DERIVED=str(derived_dir), BETA=0.0, MAX_EXIT=5)
    assert capped({}, SIZES, image_ids=IDS).tolist() == [5, 3, 2] and max(capped.exits) == 5


def test_oracle_names_what_it_lacks(derived_dir):
    policy = build(POLICY="OracleExit", DERIVED=str(derived_dir))
    for image_ids in (None, [7, None, 9]):
        with pytest.raises(ValueError, match="needs its image_id"):
            policy({}, SIZES, image_ids=image_ids)
    with pytest.raises(ValueError, match="12345"):
        policy({}, SIZES[:1], image_ids=[12345])
    with pytest.raises(ValueError, match="MODEL.ECO.DERIVED"):
        build(POLICY="OracleExit")
    with pytest.raises(ValueError, match="parent offers"):
        OracleExit(derived=str(derived_dir), beta=0.0, max_exit=3, exits=[2, 3])


def write_derived(directory, **changes):
    """A derived dataset of the images 7, 8 and 9. Their best exits are 6, 3 and, with equal qualities, 2."""
    from eco_m2f.derived import ShardWriter, make_row

    provenance = {
        "exits": EXITS,
        "config": "",
        "checkpoint": "model.pth",
        "checkpoint_sha256": "0" * 64,
        "parent_sha256": PARENT,
        "feature_source": "res5",
        "dataset": "toy",
        "categories": [{"id": 1, "name": "thing", "isthing": 1}],
        "num_images": 3,
        "code_version": "0",
        **changes,
    }
    qualities = {7: [0.1, 0.2, 0.3, 0.4, 0.5], 8: [0.1, 0.9, 0.3, 0.4, 0.5], 9: [0.3] * 5}
    rows = [
        make_row(
            image_id=image_id,
            file_name=f"{image_id}.png",
            height=96,
            width=96,
            quality=quality,
            feature=[0.0] * 12,
            statistics={},
            total_gflops=[1.0 * k for k in EXITS],
            encoder_gflops=[0.5 * k for k in EXITS],
        )
        for image_id, quality in qualities.items()
    ]
    ShardWriter(directory, provenance, num_images=3, shard_size=4).write(0, rows)
    return directory


@pytest.fixture
def derived_dir(tmp_path):
    return write_derived(tmp_path / "derived")


def test_oracle_refuses_the_qualities_of_another_view(tmp_path):
    directory = write_derived(tmp_path / "mirrored", view="mirrored")
    with pytest.raises(ValueError, match="mirrored is of the view mirrored: derive it without --view"):
        OracleExit(derived=str(directory), beta=0.0, max_exit=6)
