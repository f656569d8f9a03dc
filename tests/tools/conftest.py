"""Fixtures of the tests of bad input: a good dataset, its checkpoint and its derived dataset."""

import pytest
import torch
from minis import fill
from tiny import Tiny
from tried_tools import Tools

from eco_m2f.engine.setup import build_model, load_cfg


@pytest.fixture(scope="session")
def good(tmp_path_factory) -> Tiny:
    """A dataset without errors, with model.pth, a checkpoint for it."""
    made = Tiny(tmp_path_factory.mktemp("good"), num_train=2, num_val=1)
    model = fill(build_model(load_cfg(made.config())))
    torch.save({"model": model.state_dict()}, made.base / "model.pth")
    return made


@pytest.fixture
def spoilt(good, tmp_path) -> Tiny:
    """A copy of the good dataset under another name, for a test to damage."""
    copy = Tiny(tmp_path / "spoilt", num_train=2, num_val=1)
    return copy


@pytest.fixture
def tools(good, tmp_path, capfd) -> Tools:
    return Tools(good, tmp_path / "output", capfd)


@pytest.fixture(scope="session")
def derived(good, tmp_path_factory):
    """The derived dataset of the good data's training split."""
    output = tmp_path_factory.mktemp("derived")
    tools = Tools(good, output, None)
    assert tools.derive(split="train", flags=["--shard-size", 1]) == 0
    return output / "derived"
