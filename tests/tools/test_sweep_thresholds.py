"""DoViT from the command line: training, evaluation, distillation, several processes, and a table over thresholds."""

import csv
import json
import re

import pytest
import torch
from tiny import Tiny, here, in_processes

pytestmark = pytest.mark.slow
SMALL = ["MODEL.DOVIT.EMBED_DIM", 24, "MODEL.DOVIT.DEPTH", 3, "MODEL.DOVIT.DECISION_LAYERS", [1, 2]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


def run(tiny: Tiny, name: str, *arguments, output, start=here) -> str:
    done = start(name, "--config-file", tiny.config("dovit"), *arguments, *SMALL, "OUTPUT_DIR", output)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Grad strides do not match" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tiny):
    """The folder of a training of 4 iterations, which logs its last loss and an evaluation."""
    output = tiny.base / "trained"
    printed = run(tiny, "train_net", "SOLVER.MAX_ITER", 4, output=output)
    return output, printed


def test_training_ends_with_an_evaluation(trained):
    output, printed = trained
    assert "Task: sem_seg" in printed and "Task: tokens" in printed
    metrics = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    names = {name for line in metrics for name in line}
    assert {"loss_ce", "loss_aux_0", "loss_aux_1", "threshold", "kept@2", "total_loss"} <= names
    assert {"sem_seg/mIoU", "tokens/GFLOPs", "tokens/saved"} <= names
    keys = torch.load(output / "model_final.pth", weights_only=False)["model"].keys()
    assert {key.split(".")[0] for key in keys} == {"backbone", "head", "auxiliary_heads"}


def test_a_student_in_two_processes(tiny, trained):
    weights = trained[0] / "model_final.pth"
    options = ["MODEL.WEIGHTS", weights, "MODEL.DOVIT.TEACHER", weights, "SOLVER.MAX_ITER", 2]
    output = tiny.base / "student"
    printed = run(tiny, "train_net", "--num-gpus", 2, *options, output=output, start=in_processes)
    fitting = re.search(r"(\d+) of (\d+) backbone tensors and (\d+) of (\d+) others loaded", printed)
    assert fitting[1] == fitting[2] and fitting[3] == fitting[4]
    metrics = json.loads((output / "metrics.json").read_text().splitlines()[0])
    assert metrics["loss_kl"] > 0 and metrics["loss_features"] > 0


def test_a_table_over_thresholds(tiny, trained):
    weights, target = trained[0] / "model_final.pth", tiny.base / "deep" / "thresholds.csv"
    arguments = ["--thresholds", 0.12, 0.9, 1.0, "--output", target, "MODEL.WEIGHTS", weights]
    printed = run(tiny, "sweep_thresholds", *arguments, output=tiny.base / "sweep")
    with open(target) as file:
        rows = list(csv.DictReader(file))
    assert [float(row["threshold"]) for row in rows] == [0.12, 0.9, 1.0]
    assert {row["dataset"] for row in rows} == {f"{tiny.name}_val"}
    gflops = [float(row["GFLOPs"]) for row in rows]
    static = [float(row["static_GFLOPs"]) for row in rows]
    assert len(set(static)) == 1 and gflops[2] == static[2] and gflops[0] < gflops[1]
    saved = [float(row["saved"]) for row in rows]
    assert saved == pytest.approx([100 * (1 - g / s) for g, s in zip(gflops, static)]) and saved[2] == 0
    assert all(0 <= float(row["mIoU"]) <= 100 for row in rows)
    assert re.search(r"dataset +mIoU +threshold +kept@1", printed)
    out = tiny.base / "analysis.json"
    arguments = ["--size", 64, 64, "--thresholds-csv", target, "--json", out]  # the size of its images
    done = here("analyze_model", "--config-file", tiny.config("dovit"), *arguments, *SMALL)
    assert done.returncode == 0, done.stderr
    analysis = json.loads(out.read_text())["tokens"]
    assert analysis["static"]["total"] == pytest.approx(static[0])
    # Attention costs the square of the tokens: the mean of images is above what their mean shares cost.
    assert 0.98 * gflops[0] < analysis[f"{tiny.name}_val at 0.12"]["total"] <= gflops[0] * (1 + 1e-9)
