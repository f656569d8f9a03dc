"""tools/benchmarks/op.py: all implementations compute the same, and the CSV can be read. No time is asserted."""

import math

import op as tool
import pytest
import torch
from benched import rows_of

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
    """A round on a busy machine, slow for both, does not count more."""
    ours = {"forward": [(1.0, 1.0), (10.0, 10.0), (2.0, 2.0)]}
    theirs = {"forward": [(3.0, 3.0), (20.0, 20.0), (8.0, 8.0)]}
    row = tool.columns(theirs, ours, {"forward": 4.0})
    assert row["forward_ratio"] == "3.00" and row["forward_wall_ms"] == "8.000" and row["forward_over_bound"] == "2.00"


def test_csv_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tool.SHAPES, "tiny", TINY)
    target = tmp_path / "deep" / "op.csv"
    options = ["--rounds", 2, "--from-logits", "--contestants", "grid_sample", "eco_m2f_fused"]
    rows = rows_of(tool, target, "--shapes", "tiny", *options)
    wanted = [(p, c) for p in ("encoder", "uniform") for c in ("eco_m2f", "grid_sample", "eco_m2f_fused")]
    assert [(row["pattern"], row["contestant"]) for row in rows] == wanted
    for row in rows:
        assert row["shape"] == "tiny" and row["torch"] == torch.__version__ and row["commit"] and row["machine"]
        for kind in ("forward", "forward_backward"):
            assert float(row[f"{kind}_wall_ms"]) > 0 and float(row[f"{kind}_bound_ms"]) > 0
            assert math.isfinite(float(row[f"{kind}_ratio"]))
        assert row["contestant"] != "eco_m2f" or row["forward_ratio"] == "1.00"
    assert "forward_ratio" in capsys.readouterr().out
