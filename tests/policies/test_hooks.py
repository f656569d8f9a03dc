"""A policy from elsewhere is prepared and asked by the engine, which knows none by name."""

import pytest
import torch
from detectron2.config import configurable
from minis import fill
from tiny import Tiny
from torch import nn

from eco_m2f.checkpoint.parent_hash import parent_sha256
from eco_m2f.engine.evaluate import evaluate
from eco_m2f.engine.predict import build_trained
from eco_m2f.engine.setup import build_model, load_cfg
from eco_m2f.policies.registry import EXIT_POLICY_REGISTRY

pytestmark = pytest.mark.slow


class ByBrightness(nn.Module):
    """A policy with weights of its own, fitted for one parent and one dataset."""

    parent, dataset = "", ""

    @configurable
    def __init__(self, exits):
        super().__init__()
        self.exits, self.weights = tuple(exits), None

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {"exits": cfg.MODEL.ECO.EXITS}

    def prepare(self, parent_sha256):
        if parent_sha256 != self.parent:
            raise ValueError("fitted for another parent")
        self.weights = 1.0

    def check_dataset(self, dataset_name, parent_sha256):
        if (dataset_name, parent_sha256) != (self.dataset, self.parent):
            raise ValueError(f"fitted for {self.dataset!r}, not for {dataset_name!r}")

    def forward(self, features, image_sizes, image_ids=None):
        bright = features["res5"].flatten(1).mean(dim=1) * self.weights > 0
        return torch.where(bright, self.exits[0], self.exits[-1]).cpu()


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The config of a tiny model with this policy, and the model."""
    monkeypatch.setitem(EXIT_POLICY_REGISTRY._obj_map, "ByBrightness", ByBrightness)
    options = ["MODEL.ECO.POLICY", "ByBrightness", "MODEL.WEIGHTS", str(tmp_path / "model.pth")]
    cfg = load_cfg(Tiny(tmp_path).config(), options)
    model = fill(build_model(cfg))
    torch.save({"model": model.state_dict(), "classes": model.classes}, tmp_path / "model.pth")
    monkeypatch.setattr(ByBrightness, "parent", parent_sha256(model.state_dict()))
    monkeypatch.setattr(ByBrightness, "dataset", cfg.DATASETS.TEST[0])
    return cfg


def test_a_policy_is_prepared_with_the_weights_and_evaluated(trained):
    model = build_trained(trained)
    assert model.exit_policy.weights == 1.0
    exits = evaluate(trained, model)["exits"]
    assert sum(exits.get(f"images@{k}", 0) for k in (2, 6)) == 3
    assert build_trained(trained, with_policy=False).exit_policy.weights is None


def test_what_it_was_not_fitted_for_is_refused(trained, monkeypatch):
    model = build_trained(trained)
    monkeypatch.setattr(ByBrightness, "dataset", "another")
    with pytest.raises(ValueError, match="fitted for 'another', not for"):
        evaluate(trained, model)
    monkeypatch.setattr(ByBrightness, "parent", "0" * 64)
    with pytest.raises(ValueError, match="another parent"):
        build_trained(trained)
