"""Fixtures shared by all tests."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the checkout; a user's checkout does not have it."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "oracle").is_dir():
        pytest.skip(f"reference data not found at {path}")
    return path
