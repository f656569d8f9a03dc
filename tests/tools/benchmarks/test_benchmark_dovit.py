"""tools/benchmarks/dovit.py stops the given share of tokens. No time is asserted."""

import dovit as tool
import pytest
import torch
from benched import rows_of, status_of
from tiny import Tiny

pytestmark = pytest.mark.slow


def test_dovit_with_tokens_stopped_and_without(tmp_path):
    options = ["--config-file", Tiny(tmp_path).config("dovit"), "--size", 64, 96, "--stopped", 0, 0.25, "--rounds", 1]
    rows = rows_of(tool, tmp_path / "d.csv", *options)
    assert [row["contestant"] for row in rows] == ["25 % stopped", "0 % stopped"]
    assert rows[0]["ratio"] == "1.00" and all(float(row["images_per_s"]) > 0 for row in rows)
    stopped, static = rows
    assert stopped["static_gflops"] == static["static_gflops"] == static["gflops"] > stopped["gflops"]


def test_stop_share_stops_it_in_every_image_at_the_first_point_alone():
    called = []
    rule = tool.StopShare([called.append] * 2, 0.25)
    first, second = (rule(point, torch.zeros(3, 5, 4, 6)) for point in (0, 1))
    assert first.shape == (3, 4, 6) and first.flatten(1).sum(1).tolist() == [6, 6, 6]
    assert not second.any() and len(called) == 2 and not torch.equal(first[0], first[1])


def test_dovit_refuses_another_model(tmp_path, capsys):
    assert status_of(tool, "--config-file", Tiny(tmp_path).config()) == 1
    assert "is of a EcoMaskFormer: take one of a DoViT" in capsys.readouterr().err
