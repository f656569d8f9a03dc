"""Every system through all tools: parent, Step A, B, C, and the evaluation.

Configs are those of configs/, shrunk, on a toy set of a few images. The model after Step A makes the annotation itself
(`predicted.Split`), so that no quality is 0 and the exits differ.
"""

import functools
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from predicted import OPTIONS, Split
from tiny import Tiny, call

from eco_m2f.derived.dataset import DerivedDataset
from eco_m2f.engine.predict import build_trained
from eco_m2f.engine.setup import build_model, load_cfg
from eco_m2f.gates.frontier import measure
from eco_m2f.gates.gate import Gate

pytestmark = pytest.mark.slow
COCO, CITYSCAPES = "coco/panoptic-segmentation", "cityscapes/panoptic-segmentation"
ITERATIONS, BETA = 2, 1e-6  # a layer costs hardly anything: the target of an image is its best exit


@dataclass(frozen=True)
class System:
    """Configs of the parent and of its variant with exits, and these exits; empty if the encoder has none."""

    parent: str
    eco: str = ""
    exits: tuple[int, ...] = ()

    @property
    def boxes(self) -> bool:
        return "detr" in self.parent


SYSTEMS = {
    "M2F": System(
        f"{COCO}/maskformer2_R50_bs16_50ep.yaml", f"{COCO}/eco/eco_maskformer2_R50_bs16_50ep.yaml", (2, 3, 4, 5, 6)
    ),
    "Lite-M2F": System(
        f"{CITYSCAPES}/lite/lite_maskformer2_swin_tiny_bs16_90k.yaml",
        f"{CITYSCAPES}/lite/lite_eco_maskformer2_swin_tiny_bs16_90k.yaml",
        (3, 4, 5, 6),
    ),
    "PRO-SCALE, exits in the last stage": System(
        f"{COCO}/proscale/proscale333_maskformer2_R50_bs16_50ep.yaml",
        f"{COCO}/proscale/proscale333_eco_maskformer2_R50_bs16_50ep.yaml",
        (7, 8, 9),
    ),
    "PRO-SCALE, exits after each stage": System(
        f"{CITYSCAPES}/proscale/proscale111_maskformer2_swin_tiny_bs16_90k.yaml",
        f"{CITYSCAPES}/proscale/proscale111_eco_maskformer2_swin_tiny_bs16_90k.yaml",
        (1, 2, 3),
    ),
    "RT-M2F": System(f"{COCO}/rt/rt_maskformer2_swin_tiny_bs16_50ep.yaml"),
    "MaskFormer": System(f"{COCO}/maskformer/maskformer_R50_bs16_50ep.yaml"),
    "DETR": System(
        "coco/object-detection/detr_R50_bs16_500ep.yaml",
        "coco/object-detection/eco/eco_detr_R50_bs16_500ep.yaml",
        (2, 3, 4, 5, 6),
    ),
}


class Run:
    """The stages of a system. Each runs on its first use."""

    def __init__(self, system: System, base: Path):
        self.system = system
        self.tiny = Tiny(base, num_train=6, num_val=3)
        self.train, self.val = (self.tiny.dataset(split, system.boxes) for split in ("train", "val"))

    def train_net(self, config: str, stage: str, *arguments) -> Path:
        """The folder of a training or an evaluation."""
        output = self.tiny.base / stage
        options = ["SEED", 1, "SOLVER.MAX_ITER", ITERATIONS, "OUTPUT_DIR", output, *OPTIONS]
        assert call("train_net", "--config-file", self.tiny.config(config), *arguments, *options) == 0
        return output

    def evaluate(self, stage: str, *options) -> tuple[float, dict]:
        """Quality in points of the model after Step A on the training images, and the exits taken."""
        cfg = ["--eval-only", "MODEL.WEIGHTS", self.eco / "model_final.pth", "DATASETS.TEST", f"('{self.train}',)"]
        folder = self.train_net(self.system.eco, stage, *cfg, *options)
        return quality(folder, self.train), json.loads((folder / "inference" / self.train / "exits.json").read_text())

    @cached_property
    def parent(self) -> Path:
        return self.train_net(self.system.parent, "parent")

    @cached_property
    def eco(self) -> Path:
        return self.train_net(self.system.eco, "step_a", "MODEL.WEIGHTS", self.parent / "model_final.pth")

    @cached_property
    def derived(self) -> Path:
        """The derived dataset of the training images."""
        weights = ["MODEL.WEIGHTS", str(self.eco / "model_final.pth"), *OPTIONS]
        config = self.tiny.config(self.system.eco)
        cfg = load_cfg(config, weights)
        Split(self.tiny, "train", cfg, build_trained(cfg)).annotate(self.system.exits)
        where = ["--dataset", self.train, "--output", self.tiny.base / "derived", "--shard-size", 4, "--workers", 0]
        options = [*weights, "OUTPUT_DIR", self.tiny.base / "step_b"]
        assert call("derive_dataset", "--config-file", config, *where, *options) == 0
        return self.tiny.base / "derived"

    @cached_property
    def gate(self) -> Path:
        folders = ["--train", self.derived, "--val", self.derived, "--output", self.tiny.base / "gate.pth"]
        assert call("train_gate", *folders, "--beta", BETA, "--l2", 1e-6) == 0
        return self.tiny.base / "gate.pth"


def quality(folder: Path, dataset: str) -> float:
    """PQ of an evaluation by train_net.py, or the mean AP of its images, in points."""
    found = {p.name: json.loads(p.read_text()) for p in (folder / "inference" / dataset).glob("*.json")}
    return 100 * (found["boxes.json"]["AP_image"] if "boxes.json" in found else found["panoptic.json"]["All"]["pq"])


def measured(derived: DerivedDataset, chosen: list[int]) -> float:
    """The same, from the rows of a derived dataset."""
    return measure(derived, chosen, policy="", beta=None, max_exit=chosen[-1], loss=None).score


def weights(folder: Path) -> dict:
    return torch.load(folder / "model_final.pth", weights_only=False)["model"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name of a system: its `Run`}."""
    return functools.cache(lambda name: Run(SYSTEMS[name], tmp_path_factory.mktemp("system")))


each_with_exits = pytest.mark.parametrize("name", [name for name, system in SYSTEMS.items() if system.exits])


def metrics(folder: Path) -> dict:
    return {k: v for line in (folder / "metrics.json").read_text().splitlines() for k, v in json.loads(line).items()}


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_parent_trains_and_is_evaluated(runs, name):
    run = runs(name)
    logged = metrics(run.parent)
    assert np.isfinite(logged["total_loss"]) and not any(n.startswith("exit") for n in logged)
    assert ("bbox/AP" if run.system.boxes else "panoptic_seg/PQ") in logged
    again = ["--eval-only", "MODEL.WEIGHTS", run.parent / "model_final.pth"]
    evaluated = run.train_net(run.system.parent, "parent_again", *again)
    assert 0 <= quality(evaluated, run.val) == quality(run.parent, run.val) <= 100
    start = build_model(load_cfg(run.tiny.config(run.system.parent))).state_dict()
    assert weights(run.parent).keys() == start.keys()


@each_with_exits
def test_step_a_trains_all_exits_from_the_parents_weights(runs, name):
    run = runs(name)
    logged = metrics(run.eco)
    trained = {int(n.split("/")[0][4:]) for n in logged if n.startswith("exit") and "/loss_" in n}
    assert trained == set(run.system.exits[:-1]) and np.isfinite(logged["loss_ce"])
    before, after = weights(run.parent), weights(run.eco)
    assert before.keys() == after.keys()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert any(n.startswith("backbone.") for n in moved) and any("encoder.layers.0." in n for n in moved)


@each_with_exits
def test_step_b_derives_every_image_at_every_exit(runs, name):
    run = runs(name)
    derived = DerivedDataset.load(run.derived)
    assert derived.exits == run.system.exits and derived.quality_name == ("AP" if run.system.boxes else "PQ")
    assert len(derived) == 6 and derived.provenance["dataset"] == run.train
    assert derived.provenance["checkpoint"] == "model_final.pth"
    assert {p.name for p in run.derived.glob("*.parquet")} == {"shard-00000.parquet", "shard-00001.parquet"}
    assert (np.diff(derived.encoder_gflops) > 0).all() and (derived.encoder_gflops < derived.total_gflops).all()
    assert len(set(derived.quality.argmax(axis=1))) > 1 and derived.quality.max() <= 1
    assert (derived.quality.max(axis=1) == 0).sum() <= run.system.boxes  # of boxes the last image holds nothing


@each_with_exits
def test_the_evaluation_with_a_gate_finds_what_step_c_foretold(runs, name):
    """Quality and GFLOPs of Step C are sums over derived rows, and equal those of the running model."""
    run = runs(name)
    gate, derived = Gate.load(run.gate), DerivedDataset.load(run.derived)
    found, exits = run.evaluate("gated", "MODEL.ECO.POLICY", "LinearGate", "MODEL.ECO.GATE", run.gate)
    chosen = gate.choose(torch.from_numpy(derived.features)).tolist()
    assert list(exits["per_image"].values()) == chosen and len(set(chosen)) > 1
    assert found == pytest.approx(measured(derived, chosen), abs=1e-6) and found > 5
    assert exits["GFLOPs"] == pytest.approx(gate.results["total_gflops"])
    assert exits["mean_exit"] == pytest.approx(gate.results["mean_exit"])


@each_with_exits
def test_the_oracle_takes_the_best_exit_of_each_image(runs, name):
    run = runs(name)
    derived = DerivedDataset.load(run.derived)
    options = ["MODEL.ECO.DERIVED", run.derived, "MODEL.ECO.BETA", BETA]
    found, exits = run.evaluate("oracle", "MODEL.ECO.POLICY", "OracleExit", *options)
    best = [derived.exits[i] for i in derived.quality.argmax(axis=1)]  # the first of equals, which is the cheapest
    assert list(exits["per_image"].values()) == best
    assert found == pytest.approx(measured(derived, best), abs=1e-6) and found > 5
