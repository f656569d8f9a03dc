"""Fixtures shared by all tests."""

import ctypes
import gc
import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What imports PyTorch is imported where it is used: the process that hands tests out to others needs none of it.


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data next to the checkout. A user's checkout does not have it."""
    path = ROOT.parent / "shared"
    if not (path / "oracle").is_dir():
        pytest.skip(f"reference data not found at {path}")
    return path


@pytest.fixture(scope="session")
def assets() -> Path:
    return ROOT / "tests" / "assets"


@pytest.fixture(scope="session")
def build_mini():
    from minis import build

    return build


@pytest.fixture(scope="session")
def fill_weights():
    from minis import fill

    return fill


@pytest.fixture(scope="session")
def mini_batch():
    """Two images of different sizes with instances, the same on every run."""
    from minis import make_batch

    return make_batch()


@pytest.fixture(scope="session")
def oracle_json(shared):
    return lambda name: json.loads((shared / "oracle" / name).read_text())


def pytest_configure(config):
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        return  # it only hands out
    import torch

    torch.set_num_threads(1)  # of several test processes each has a core


def pytest_xdist_auto_num_workers(config):
    """A test process for each core, and 2 GB for each."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2**31))


@pytest.fixture(scope="module", autouse=True)
def give_memory_back():
    """Gives the memory of a module's models back to the system, so that a test process stays small."""
    yield
    gc.collect()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if malloc_trim is not None:
        malloc_trim(0)
