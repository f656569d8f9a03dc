"""Step B on a few images: exact statistics, resuming after a kill, and the same bytes from any number of processes."""

import contextlib
import functools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from minis import ROOT
from other_run import other_run
from panopticapi.evaluation import pq_compute_single_core
from PIL import Image
from predicted import Predicted
from tiny import here, is_running, tool, workers_of

from eco_m2f.costs import ExitCosts
from eco_m2f.data.panoptic_map import DataError, ids_to_rgb
from eco_m2f.derived import DerivedDatasetError
from eco_m2f.derived.dataset import DerivedDataset
from eco_m2f.engine import derive as step_b
from eco_m2f.engine.evaluate import evaluate
from eco_m2f.engine.predict import build_trained
from eco_m2f.engine.setup import build_model, load_cfg
from eco_m2f.quality import quality_of_model
from eco_m2f.quality.average_precision import ObjectComparison
from eco_m2f.quality.ground_truth import BoxGroundTruth

NUM_IMAGES, SHARD_SIZE = 9, 2
KINDS = ("eco_maskformer2", "eco_detr")


class Case(Predicted):
    """Step B on the images of `Predicted`."""

    def derive(self, directory: Path, cfg=None, shard_size: int = SHARD_SIZE, workers: int = 0, **options) -> None:
        step_b.derive(cfg or self.cfg, self.model, self.dataset, str(directory), shard_size, workers, **options)

    def command(self, directory: Path, *more) -> list:
        config = ["--config-file", self.tiny.config(), "--dataset", self.dataset, "--output", directory]
        return ["derive_dataset", *config, "--shard-size", SHARD_SIZE, "--workers", 0, *more, *self.options]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{kind of `KINDS`: (its case, the folder of the derived dataset, made in one run)}."""

    @functools.cache
    def make(kind: str) -> tuple[Case, Path]:
        case = Case(tmp_path_factory.mktemp("case"), NUM_IMAGES, kind)
        case.derive(case.tiny.base / "derived")
        return case, case.tiny.base / "derived"

    return make


@pytest.fixture(scope="module")
def case(made) -> Case:
    return made(KINDS[0])[0]


@pytest.fixture(scope="module")
def whole(made) -> Path:
    return made(KINDS[0])[1]


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(directory).iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_for_every_image(made, kind):
    case, folder = made(kind)
    derived = DerivedDataset.load(folder)
    assert len(derived) == NUM_IMAGES and derived.exits == (2, 3, 4, 5, 6)
    assert derived.image_ids == [str(i) for i in range(NUM_IMAGES)]
    assert derived.sizes.tolist() == [[64, 64]] * NUM_IMAGES
    channels = case.model.backbone.output_shape()["res5"].channels
    assert derived.features.shape == (NUM_IMAGES, channels) and len(np.unique(derived.features[:, 0])) == NUM_IMAGES
    assert (np.diff(derived.total_gflops, axis=1) > 0).all() and (derived.encoder_gflops < derived.total_gflops).all()
    drew = np.arange(NUM_IMAGES) % 5  # the column of the exit that drew the annotation
    annotated = slice(0, NUM_IMAGES - (kind == "eco_detr"))  # of boxes the last image holds nothing
    assert (derived.quality.argmax(axis=1) == drew)[annotated].all() and not derived.quality[annotated.stop :].any()
    assert len(np.unique(derived.quality)) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_quality_is_that_of_the_model_run_at_that_exit(made, kind):
    """Evaluators at a fixed exit give the same PQ, or mean AP, as sums over the derived rows."""
    case, folder = made(kind)
    derived = DerivedDataset.load(folder)
    cfg = load_cfg(case.tiny.config(kind), [*case.options, "DATASETS.TEST", (case.dataset,), "MODEL.ECO.EXIT", 3])
    results = evaluate(cfg, build_trained(cfg))
    assert results["exits"]["mean_exit"] == 3
    found = results["bbox"]["AP_image"] if kind == "eco_detr" else results["panoptic_seg"]["PQ"]
    everyone = [3] * NUM_IMAGES
    foretold = derived.mean_quality(everyone) if kind == "eco_detr" else derived.exact_quality(everyone)["pq"]
    assert found == pytest.approx(100 * foretold) and found > 1


def test_of_boxes_the_quality_of_an_exit_is_its_images_ap(made):
    case, folder = made("eco_detr")
    truth, derived = BoxGroundTruth(case.dataset), DerivedDataset.load(folder)
    assert derived.quality_name == "AP" and not derived.has_statistics
    for i, x in enumerate(case.inputs()):
        comparison = ObjectComparison(truth.objects(x["image_id"]), "bbox")
        assert derived.quality[i].tolist() == [comparison.ap(case.predict(x, k)) for k in derived.exits]
    assert derived.encoder_gflops[0] == pytest.approx([k * derived.encoder_gflops[0, 0] / 2 for k in derived.exits])


def panopticapi_pq(case: Case, k: int, folder: Path) -> float:
    """PQ of exit k by panopticapi, from files."""
    content = json.loads(case.tiny.json("train").read_text())
    truth = {a["image_id"]: a for a in content["annotations"]}
    pairs = []
    for x in case.inputs():
        panoptic, segments = case.predict(x, k)
        name = truth[x["image_id"]]["file_name"]
        Image.fromarray(ids_to_rgb(panoptic)).save(folder / name)
        pred = {"image_id": x["image_id"], "file_name": name, "segments_info": [dict(s) for s in segments]}
        pairs.append((truth[x["image_id"]], pred))
    categories = {c["id"]: c for c in content["categories"]}
    truth_folder = Path(x["pan_seg_file_name"]).parent
    statistics = pq_compute_single_core(0, pairs, str(truth_folder), str(folder), categories)
    return statistics.pq_average(categories, isthing=None)[0]["pq"]


@pytest.mark.parametrize("k", [2, 4, 6])
def test_the_sum_of_the_statistics_is_panopticapis_pq(case, whole, tmp_path, k):
    wanted = panopticapi_pq(case, k, tmp_path)
    derived = DerivedDataset.load(whole)
    assert derived.exact_quality([k] * NUM_IMAGES)["pq"] == pytest.approx(wanted, abs=1e-9)
    assert wanted > 0.01


def test_another_shard_size_gives_the_same_rows(case, whole, tmp_path):
    case.derive(tmp_path / "derived", shard_size=5)
    a, b = DerivedDataset.load(whole), DerivedDataset.load(tmp_path / "derived")
    for name in ("quality", "features", "total_gflops", "encoder_gflops"):
        assert np.array_equal(getattr(a, name), getattr(b, name))


def test_stopped_in_the_middle_it_goes_on_with_the_same_bytes(case, whole, tmp_path, monkeypatch):
    directory, original, derived = tmp_path / "derived", step_b.predict_exits, []

    def row(model, truth, x, *read):
        if len(derived) == 5:  # the second image of shard 2
            raise RuntimeError("power cut")
        derived.append(x["image_id"])
        return original(model, truth, x, *read)

    monkeypatch.setattr(step_b, "predict_exits", row)
    with pytest.raises(RuntimeError, match="power cut"):
        case.derive(directory)
    finished = {p: p.stat().st_mtime_ns for p in directory.glob("*.parquet")}
    assert len(finished) == 2
    derived[:] = [None] * 6  # past the power cut
    case.derive(directory)
    assert derived[6:] == [4, 5, 6, 7, 8]
    assert all(p.stat().st_mtime_ns == before for p, before in finished.items())
    assert contents(directory) == contents(whole)


def test_a_finished_dataset_is_left_alone(case, whole, monkeypatch):
    before = contents(whole)
    monkeypatch.setattr(step_b, "predict_exits", None)
    case.derive(whole)
    assert contents(whole) == before


@contextlib.contextmanager
def begun(case: Case, directory: Path, workers: int) -> Iterator[multiprocessing.Process]:
    """A process that is at Step B and is killed outright at the end: a fork, which has imported everything already.

    Its model takes a quarter of a second for an image, so that the run never ends before it is killed.
    """
    predict = step_b.predict_exits

    def slowly(*args):
        time.sleep(0.25)
        return predict(*args)

    process = multiprocessing.get_context("fork").Process(
        target=case.derive, args=(directory,), kwargs={"workers": workers}
    )
    with mock.patch.object(step_b, "predict_exits", slowly):  # the fork takes it along
        process.start()
    yield process
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_it_goes_on_in_two_processes_with_the_same_bytes(case, whole, tmp_path):
    with begun(case, tmp_path / "derived", 0) as process:
        while not list((tmp_path / "derived").glob("*.parquet")):
            assert process.is_alive(), "it ended before a shard was written"
            time.sleep(0.002)
    assert 1 <= len(list((tmp_path / "derived").glob("*.parquet"))) < 5
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "derived").glob("*.parquet")}
    again = tool(*case.command(tmp_path / "derived", "--num-gpus", 2, "--workers", 1))
    assert again.returncode == 0, again.stderr
    assert all(p.stat().st_mtime_ns == before for p, before in times.items())
    assert contents(tmp_path / "derived") == contents(whole)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.4, 1.0])  # while its workers start; while they work, or it writes
def test_killed_beside_its_workers_it_leaves_none_and_goes_on(case, whole, tmp_path, seconds):
    with begun(case, tmp_path / "derived", 2) as process:
        while len(workers := workers_of(process.pid)) < 2:
            assert process.is_alive(), "it ended before it had workers"
            time.sleep(0.002)
        time.sleep(seconds)
    end = time.monotonic() + 30
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < end, "workers outlive the process that they worked for"
        time.sleep(0.1)
    again = here(*case.command(tmp_path / "derived"))
    assert again.returncode == 0, again.stderr
    assert contents(tmp_path / "derived") == contents(whole)


LIGHT = """
import pickle, sys
row = pickle.load(sys.stdin.buffer)()
print(row["quality"].tolist())
print(*{name.split(".")[0] for name in sys.modules} & {"torch", "detectron2", "pyarrow", "scipy", "matplotlib"})
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_loads_nothing_that_takes_seconds(made, kind):
    case, folder = made(kind)
    x = case.inputs()[0]
    quality = quality_of_model(case.cfg.MODEL.ECO.QUALITY, case.model).of(case.dataset)
    with torch.no_grad():
        predicted = step_b.predict_exits(case.model, quality, x, case.cfg.MODEL.ECO.FEATURE, ExitCosts(case.model))
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], input=pickle.dumps(predicted.row), capture_output=True, check=True, cwd=ROOT
    )
    row, heavy = done.stdout.decode().split("\n")[:2]
    assert json.loads(row) == DerivedDataset.load(folder).quality[0].tolist()
    assert heavy == ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_workers_change_no_byte(made, tmp_path, kind):
    case, folder = made(kind)
    case.derive(tmp_path / "derived", workers=2)
    assert contents(tmp_path / "derived") == contents(folder)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_broken_annotation_ends_it_by_name_and_finished_shards_stay(case, whole, tmp_path, workers):
    path = Path(case.inputs()[5]["pan_seg_file_name"])  # of shard 2
    png = path.read_bytes()
    path.write_bytes(png[: len(png) // 2])
    try:
        with pytest.raises(DataError, match=f"{path.name}: panoptic PNG cannot be read"):
            case.derive(tmp_path / "derived", workers=workers)
    finally:
        path.write_bytes(png)
    assert {p.name for p in (tmp_path / "derived").glob("*.parquet")} == {"shard-00000.parquet", "shard-00001.parquet"}
    case.derive(tmp_path / "derived")
    assert contents(tmp_path / "derived") == contents(whole)


def test_another_origin_is_refused(case, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "derived")
    before = contents(tmp_path / "derived")
    changes = {
        "config": ["INPUT.MIN_SIZE_TEST", 96],
        "feature_source": ["MODEL.ECO.FEATURE", "projected"],
    }
    for key, change in changes.items():
        with pytest.raises(DerivedDatasetError, match=f"another origin.*{key}"):
            case.derive(tmp_path / "derived", load_cfg(case.tiny.config(), [*case.options, *change]))
    weights = case.model.state_dict()
    torch.save({"model": {n: v + 1 if n.endswith("bias") else v for n, v in weights.items()}}, tmp_path / "other.pth")
    other = load_cfg(case.tiny.config(), [*case.options, "MODEL.WEIGHTS", str(tmp_path / "other.pth")])
    with pytest.raises(DerivedDatasetError, match="checkpoint_sha256.*parent_sha256"):
        step_b.derive(other, build_trained(other), case.dataset, str(tmp_path / "derived"), SHARD_SIZE)
    with pytest.raises(DerivedDatasetError, match="shard_size: 2 there, 3 now"):
        case.derive(tmp_path / "derived", shard_size=3)
    assert contents(tmp_path / "derived") == before


def rotated(content: dict) -> None:
    """Each category becomes the next, in every segment."""
    ids = [c["id"] for c in content["categories"]]
    for annotation in content["annotations"]:
        for segment in annotation["segments_info"]:
            segment["category_id"] = ids[(ids.index(segment["category_id"]) + 1) % len(ids)]


def reversed_order(content: dict) -> None:
    content["images"].reverse()
    content["annotations"].reverse()


@pytest.mark.parametrize("change", [rotated, reversed_order])
def test_another_annotation_is_refused(case, whole, tmp_path, change):
    shutil.copytree(whole, tmp_path / "derived")
    before, path = contents(tmp_path / "derived"), case.tiny.json("train")
    text = path.read_text()
    content = json.loads(text)
    change(content)
    path.write_text(json.dumps(content))
    try:
        with pytest.raises(DerivedDatasetError, match="another origin.*annotation_sha256: "):
            case.derive(tmp_path / "derived")
    finally:
        path.write_text(text)
    assert contents(tmp_path / "derived") == before


def test_another_image_is_refused_by_size_or_by_content(case, whole, tmp_path):
    folder, records = tmp_path / "derived", case.inputs()
    shutil.copytree(whole, folder)
    (folder / "shard-00003.parquet").unlink()
    image = Path(case.inputs()[4]["file_name"])  # of shard 2, which is there
    png = image.read_bytes()
    try:
        image.write_bytes(png + b"\0")
        with pytest.raises(DerivedDatasetError, match=r"images of .*shard-00002.* have changed .*\(names and sizes\)"):
            case.derive(folder)
        image.write_bytes(png)
        before = step_b.image_digests(records, True, ("pan_seg_file_name",))
        image.write_bytes(png[:-1] + bytes([png[-1] ^ 1]))
        after = step_b.image_digests(records, True, ("pan_seg_file_name",))
    finally:
        image.write_bytes(png)
    assert {kind for kind in before if before[kind] != after[kind]} == {"contents"}
    case.derive(folder, hash_images=True)
    images = json.loads(pq.read_schema(folder / "shard-00003.parquet").metadata[b"images"])
    assert images == step_b.image_digests(records[6:8], True, ("pan_seg_file_name",))


def test_two_runs_in_one_folder_are_refused(case, tmp_path):
    with other_run(tmp_path / "derived") as first:
        (tmp_path / "derived" / ".shard-00000.parquet.1.tmp").write_bytes(b"half")
        with pytest.raises(ValueError, match=f"process {first.pid} .*is at work"):
            case.derive(tmp_path / "derived")
        assert (tmp_path / "derived" / ".shard-00000.parquet.1.tmp").exists()
        first.communicate("")


def test_settings_that_step_b_does_not_read_may_change(case, whole):
    options = ["MODEL.ECO.BETA", 0.1, "MODEL.ECO.LOSS", "soft_ce", "MODEL.ECO.GATE_SOLVER.OPTIMIZER", "adam"]
    before = contents(whole)
    case.derive(whole, load_cfg(case.tiny.config(), [*case.options, *options]))
    assert contents(whole) == before


def test_a_negative_number_of_workers_is_refused(case, tmp_path):
    with pytest.raises(ValueError, match="--workers must be 0 or more, got -1"):
        case.derive(tmp_path / "derived", workers=-1)
    assert not (tmp_path / "derived").exists()


def test_the_parent_without_exits_is_refused(case, tmp_path):
    cfg = load_cfg(case.tiny.config("maskformer2"))
    with pytest.raises(ValueError, match="EcoMaskFormer.*got MaskFormer"):
        step_b.derive(cfg, build_model(cfg), case.dataset, str(tmp_path / "derived"), SHARD_SIZE)


@pytest.mark.slow
def test_processes_of_torchrun_write_the_same_bytes(case, whole, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    result = tool(*case.command(tmp_path / "derived"), launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "derived") == contents(whole)
