"""Minimisations side by side: errors end all of them."""

import threading

import numpy as np
import pytest

from eco_m2f.gates.side_by_side import minimise_side_by_side


def test_a_failing_evaluation_ends_every_minimisation():
    def fail(points):
        raise RuntimeError("out of memory")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="out of memory"):
        minimise_side_by_side(fail, [np.zeros(3)] * 4, {})
    for thread in threading.enumerate():
        if thread.daemon and "minimise_one" in thread.name:
            thread.join(5)
    assert threading.active_count() <= before
