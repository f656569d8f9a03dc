"""tools/benchmarks/step_a.py, step_b.py and step_c.py run the code of the steps. No time is asserted."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import step_a
import step_b
import step_c
from benched import rows_of
from tiny import Tiny

pytestmark = pytest.mark.slow


def test_step_a_with_one_two_and_all_exits(tmp_path, monkeypatch):
    config, pools = (
        Tiny(tmp_path).config(),
        [step_a.ProcessPoolExecutor],
    )  # a process of its own for the first row alone
    monkeypatch.setattr(step_a, "ProcessPoolExecutor", lambda *a: (pools.pop() if pools else ThreadPoolExecutor)(*a))
    rows = rows_of(step_a, tmp_path / "a.csv", "--config-file", config, "--size", 64, 64, "--rounds", 1)
    wanted = [("1", "joint"), ("2", "joint"), ("2", "recompute"), ("5", "joint"), ("5", "recompute")]
    assert [(row["exits"], row["way"]) for row in rows] == wanted
    assert all(float(row["s_per_step"]) > 0 and row["memory_ratio"] for row in rows)


def test_step_b_in_one_pass_and_exit_by_exit(tmp_path, capsys):
    config = Tiny(tmp_path).config()
    rows = rows_of(step_b, tmp_path / "b.csv", "--config-file", config, "--size", 64, 96, "--rounds", 1)
    assert [row["contestant"] for row in rows] == ["one pass", "one evaluation per exit"]
    assert rows[0]["ratio"] == "1.00" and rows[0]["exits"] == "5"
    assert "PQ of one 640x480 image at 5 exits" in capsys.readouterr().out


def test_step_c_fits_every_gate_of_the_frontier(tmp_path):
    options = ["--images", 200, "--channels", 8, "--betas", 2, "--threads", 1, "--rounds", 1]
    rows = rows_of(step_c, tmp_path / "c.csv", *options)
    assert [row["gates"] for row in rows] == ["1", "1", "24"]
    assert all(float(row["seconds"]) > 0 and float(row["peak_gib_of_the_process"]) > 0 for row in rows)
