"""tools/benchmark.py: what is measured is the same function, and what is written can be read. No time is asserted."""

import csv
import math
from concurrent.futures import ThreadPoolExecutor

import benchmark as tool
import pytest
import torch
from tiny import Tiny

pytestmark = pytest.mark.slow

TINY = tool.Shape(((2, 3), (4, 6)), heads=2, channels=4)
DECODER = tool.Shape(((2, 3), (4, 6)), queries=5, heads=2, channels=4)


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    monkeypatch.setattr(tool.copy_speed, "__defaults__", (1, 2**16))


@pytest.mark.parametrize("from_logits", (False, True))
@pytest.mark.parametrize("pattern", ("encoder", "uniform"))
@pytest.mark.parametrize("shape", (TINY, DECODER))
def test_contestants_compute_the_same(shape, pattern, from_logits):
    inputs = tool.op_inputs(shape, 2, pattern, torch.float64, "cpu")
    outputs = {n: f(*inputs.leaves(from_logits)) for n, f in tool.op_contestants(inputs, [], from_logits).items()}
    assert {"eco_m2f", "embedding_bag", "grid_sample"} <= set(outputs) and ("eco_m2f_fused" in outputs) == from_logits
    for name, out in outputs.items():
        torch.testing.assert_close(out, outputs["eco_m2f"], msg=name)


def test_encoder_looks_around_the_own_position_and_uniform_anywhere():
    shape = tool.Shape(((40, 60),), heads=8, channels=4)
    sizes = torch.tensor([60.0, 40.0])
    for pattern, near in (("encoder", True), ("uniform", False)):
        inputs = tool.op_inputs(shape, 1, pattern, torch.float32, "cpu")
        distance = ((inputs.locations - inputs.reference[:, :, None, :, None]) * sizes).abs().amax(-1)
        assert (distance.max() < 10) == near
        assert near or (inputs.locations.min() >= -1e-6 and inputs.locations.max() <= 1 + 1e-6)


@pytest.mark.parametrize("name", tool.SHAPES)
def test_shapes_are_those_of_their_models(name):
    shape = tool.SHAPES[name]
    assert shape.heads * shape.channels == 256 and len(shape.levels) == (4 if "deformable" in name else 3)
    assert shape.queries == (300 if "decoder" in name else 0)


def test_compulsory_bytes_by_hand():
    """1024 x 2048 in float32: 137.6 MB forward (value 44.0, locations 33.0, weights 16.5, output 44.0)."""
    shape = tool.SHAPES["mask2former-cityscapes"]
    tokens = 43008
    like = {name: torch.empty(0) for name in ("offsets", "logits", "reference")}
    inputs = tool.OpInputs(
        shape,
        **like,
        value=torch.empty(1, tokens, 8, 32, device="meta"),
        locations=torch.empty(1, tokens, 8, 3, 4, 2, device="meta"),
        weights=torch.empty(1, tokens, 8, 3, 4, device="meta"),
        grad=torch.empty(1, tokens, 256, device="meta"),
    )
    least = tool.compulsory_bytes(inputs, from_logits=False)
    assert round(least["forward"] / 1e6, 1) == 137.6
    assert least["forward_backward"] == 3 * (44_040_192 + 33_030_144 + 16_515_072) + 2 * 44_040_192


def test_ratio_is_the_median_of_the_rounds_quotients():
    """So that a round in which the machine was busy for both does not count more."""
    ours = {"forward": [(1.0, 1.0), (10.0, 10.0), (2.0, 2.0)]}
    theirs = {"forward": [(3.0, 3.0), (20.0, 20.0), (8.0, 8.0)]}
    row = tool.summary(theirs, ours, {"forward": 4.0})
    assert row["forward_ratio"] == "3.00" and row["forward_wall_ms"] == "8.000" and row["forward_over_bound"] == "2.00"


def test_csv_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tool.SHAPES, "tiny", TINY)
    target = tmp_path / "deep" / "op.csv"
    arguments = ["benchmark.py", "op", "--shapes", "tiny", "--rounds", "2", "--output", str(target), "--from-logits"]
    monkeypatch.setattr("sys.argv", [*arguments, "--contestants", "grid_sample", "eco_m2f_fused"])
    tool.main()
    with open(target) as file:
        rows = list(csv.DictReader(file))
    wanted = [(p, c) for p in ("encoder", "uniform") for c in ("eco_m2f", "grid_sample", "eco_m2f_fused")]
    assert [(row["pattern"], row["contestant"]) for row in rows] == wanted
    for row in rows:
        assert row["shape"] == "tiny" and row["torch"] == torch.__version__ and row["commit"] and row["machine"]
        for kind in ("forward", "forward_backward"):
            assert float(row[f"{kind}_wall_ms"]) > 0 and float(row[f"{kind}_bound_ms"]) > 0
            assert math.isfinite(float(row[f"{kind}_ratio"]))
        assert row["contestant"] != "eco_m2f" or row["forward_ratio"] == "1.00"
    assert "forward_ratio" in capsys.readouterr().out


def test_whole_model_at_its_exits_and_with_the_op_in_pytorch(tmp_path, monkeypatch, capsys):
    config, target = Tiny(tmp_path).config(), tmp_path / "model.csv"
    calls = {"plain": 0}

    def plain(*arguments):
        calls["plain"] += 1
        return reference(*arguments)

    reference = tool.ops.reference_ms_deform_attn
    monkeypatch.setattr(tool.ops, "reference_ms_deform_attn", plain)
    arguments = ["model", "--config-file", config, "--size", "40", "64", "--exits", "2", "4", "--rounds", "2"]
    arguments += ["--dtype", "bfloat16"]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *arguments, "--output", str(target)])
    assert tool.main() == 0
    with open(target) as file:
        rows = list(csv.DictReader(file))
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


def test_twenty_queries_take_part():
    logits = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    scores, labels = logits.softmax(-1).max(-1)
    assert int(((scores > tool.score_threshold(logits)) & (labels != 7)).sum()) == tool.TAKING_PART
    assert tool.score_threshold(logits[:5]) == pytest.approx(float(scores[:5][labels[:5] != 7].min()))
    assert tool.score_threshold(torch.eye(8)[7:] * 9) == 0.0


def run_to_csv(monkeypatch, target, *arguments) -> list[dict]:
    monkeypatch.setattr("sys.argv", ["benchmark.py", *map(str, arguments), "--rounds", "1", "--output", str(target)])
    assert tool.main() == 0
    with open(target) as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_step_a_with_one_two_and_all_exits(tmp_path, monkeypatch):
    config, pools = Tiny(tmp_path).config(), [tool.ProcessPoolExecutor]  # a process of its own for the first row alone
    monkeypatch.setattr(tool, "ProcessPoolExecutor", lambda *a: (pools.pop() if pools else ThreadPoolExecutor)(*a))
    rows = run_to_csv(monkeypatch, tmp_path / "a.csv", "step_a", "--config-file", config, "--size", 64, 64)
    wanted = [("1", "joint"), ("2", "joint"), ("2", "recompute"), ("5", "joint"), ("5", "recompute")]
    assert [(row["exits"], row["way"]) for row in rows] == wanted
    assert all(float(row["s_per_step"]) > 0 and row["memory_ratio"] for row in rows)


def test_step_b_in_one_pass_and_exit_by_exit(tmp_path, monkeypatch, capsys):
    config = Tiny(tmp_path).config()
    rows = run_to_csv(monkeypatch, tmp_path / "b.csv", "step_b", "--config-file", config, "--size", 64, 96)
    assert [row["contestant"] for row in rows] == ["one pass", "one evaluation per exit"]
    assert rows[0]["ratio"] == "1.00" and rows[0]["exits"] == "5"
    assert "PQ of one 640x480 image at 5 exits" in capsys.readouterr().out


def test_step_c_fits_every_gate_of_the_frontier(tmp_path, monkeypatch):
    rows = run_to_csv(
        monkeypatch, tmp_path / "c.csv", "step_c", "--images", 200, "--channels", 8, "--betas", 2, "--threads", 1
    )
    assert [row["gates"] for row in rows] == ["1", "1", "24"]
    assert all(float(row["seconds"]) > 0 and float(row["peak_gib_of_the_process"]) > 0 for row in rows)


def test_dovit_with_tokens_stopped_and_without(tmp_path, monkeypatch):
    options = ["dovit", "--config-file", Tiny(tmp_path).config("dovit"), "--size", 64, 96, "--stopped", 0, 0.25]
    rows = run_to_csv(monkeypatch, tmp_path / "d.csv", *options)
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


def test_dovit_refuses_another_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "dovit", "--config-file", Tiny(tmp_path).config()])
    assert tool.main() == 1
    assert "is of a EcoMaskFormer: take one of a DoViT" in capsys.readouterr().err
