"""Fixtures of the tests in this folder."""

import pytest
from tiny import Tiny, kept_log_handlers


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def quiet():
    with kept_log_handlers():
        yield
