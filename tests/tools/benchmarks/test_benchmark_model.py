"""tools/benchmarks/model.py runs the whole model at its exits. No time is asserted."""

import model as tool
import pytest
import torch
from benched import rows_of
from tiny import Tiny

pytestmark = pytest.mark.slow


def test_whole_model_at_its_exits_and_with_the_op_in_pytorch(tmp_path, monkeypatch, capsys):
    config, target = Tiny(tmp_path).config(), tmp_path / "model.csv"
    calls = {"plain": 0}

    def plain(*arguments):
        calls["plain"] += 1
        return reference(*arguments)

    reference = tool.ops.reference_ms_deform_attn
    monkeypatch.setattr(tool.ops, "reference_ms_deform_attn", plain)
    options = ["--size", 40, 64, "--exits", 2, 4, "--rounds", 2, "--dtype", "bfloat16"]
    rows = rows_of(tool, target, "--config-file", config, *options)
    names = ["eco_m2f exit 4", "eco_m2f exit 2", "eco_m2f exit 4, op embedding_bag", "eco_m2f exit 4, op grid_sample"]
    assert [row["contestant"] for row in rows] == [*names, "mixed batch", "gate"]
    assert calls["plain"] == 3 * 4  # warm-up and two rounds, four layers
    assert rows[0]["ratio"] == "1.00" and all(float(row["wall_ms"]) > 0 for row in rows)
    assert rows[0]["dtype"] == "bfloat16"
    printed = capsys.readouterr().out
    for figure in (
        "wall-clock saved at exit 2: ",
        "a batch of exits 2 and 4 over the sum",
        "the gate over the encoder",
    ):
        assert figure in printed


def test_figures_of_early_exits_by_hand():
    times = {"eco_m2f exit 6": 100.0, "eco_m2f exit 2": 60.0, "mixed batch": 168.0, "gate": 0.06}
    rows = [{"contestant": name, "wall_ms": f"{ms:.3f}"} for name, ms in times.items()]
    lines = tool.model_figures(rows, {2: {"total_full": 5.0}, 6: {"total_full": 10.0}}, [2, 6])
    assert lines == [
        "wall-clock saved at exit 2: 0.400, GFLOPs saved: 0.500, quotient 0.80",
        "a batch of exits 2 and 6 over the sum of both alone: 1.050",
        "the gate over the encoder's 6 layers (60 ms): 0.00100",
    ]
    assert tool.model_figures(rows, {}, [6]) == []


def test_twenty_queries_are_in_the_map():
    logits = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    scores, labels = logits.softmax(-1).max(-1)
    assert int(((scores > tool.score_threshold(logits)) & (labels != 7)).sum()) == tool.QUERIES
    assert tool.score_threshold(logits[:5]) == pytest.approx(float(scores[:5][labels[:5] != 7].min()))
    assert tool.score_threshold(torch.eye(8)[7:] * 9) == 0.0
