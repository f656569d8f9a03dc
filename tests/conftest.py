"""Fixtures shared by all tests."""

import json
from pathlib import Path

import pytest
import torch
from minis import ROOT, build, fill, make_batch


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the checkout; a user's checkout does not have it."""
    path = ROOT.parent / "shared"
    if not (path / "oracle").is_dir():
        pytest.skip(f"reference data not found at {path}")
    return path


@pytest.fixture(scope="session")
def assets() -> Path:
    return ROOT / "tests" / "assets"


@pytest.fixture(scope="session")
def build_mini():
    return build


@pytest.fixture(scope="session")
def fill_weights():
    return fill


@pytest.fixture(scope="session")
def mini_batch():
    """Two images of different sizes with instances, the same on every run."""
    return make_batch()


@pytest.fixture(scope="session")
def oracle_json(shared):
    return lambda name: json.loads((shared / "oracle" / name).read_text())


def pytest_configure(config):
    torch.set_num_threads(2)
