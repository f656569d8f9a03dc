"""Two splits in which depth pays for some images."""

import pytest
from derived_by_depth import make_derived


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    return make_derived(tmp_path_factory.mktemp("train"), 300, seed=0)


@pytest.fixture(scope="module")
def val(tmp_path_factory):
    return make_derived(tmp_path_factory.mktemp("val"), 120, seed=1)
