"""docs/ADDING.md: its encoder, taken through the contract and through an ECO model."""

import re

import pytest
import torch
from minis import ECO, MINI, ROOT, build, make_batch

from eco_m2f.engine import load_cfg
from eco_m2f.modeling.encoders import TRANSFORMER_ENCODER_REGISTRY, build_transformer_encoder
from eco_m2f.modeling.exit_policy import FixedExit

BLOCKS = dict(re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "docs/ADDING.md").read_text(), re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module", autouse=True)
def registered():
    exec(BLOCKS["python"], {"__name__": "adding"})
    yield
    TRANSFORMER_ENCODER_REGISTRY._obj_map.pop("DepthwiseEncoder")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(f"_BASE_: {ROOT / 'configs' / ECO}\n{BLOCKS['yaml']}")
    return str(path)


@torch.no_grad()
def test_the_contract(config):
    encoder = build_transformer_encoder(load_cfg(config, MINI))
    maps = [torch.randn(2, 32, h, w) for h, w in ((2, 3), (4, 6), (8, 12))]
    together = encoder(maps, maps, encoder.exits)
    assert tuple(together) == encoder.exits == (1, 2, 3, 4, 5, 6)
    for k in encoder.exits:
        assert all(torch.equal(a, b) for a, b in zip(encoder(maps, maps, [k])[k], together[k]))
    with pytest.raises(ValueError, match="exits"):
        encoder(maps, maps, [7])


def test_the_model_trains_leaves_early_and_is_counted(config):
    model = build(config)
    assert model.exits == (2, 4, 6)
    batch, costs = make_batch(), model.costs((64, 96), (64, 96))
    for k in model.exits:
        model.exit_policy = FixedExit(k)
        with torch.no_grad():
            results = model(batch)
        assert [r["exit"] for r in results] == [k, k]
    assert costs[2]["encoder"] < costs[4]["encoder"] < costs[6]["encoder"]
    from detectron2.utils.events import EventStorage

    with EventStorage(0):
        sum(model.train()(batch).values()).backward()
    first = model.sem_seg_head.pixel_decoder.transformer.encoder.layers[0]
    assert first.depthwise.weight.grad.abs().sum() > 0
