"""Whole runs: resuming, evaluators that fail, steps that fail."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.engine import hooks
from engine_steps import make_step
from minis import ECO, build, fill, make_batch
from tiny import call
from torch import nn

from eco_m2f.engine.setup import load_cfg
from eco_m2f.engine.step import Step, check_finite, enough_values
from eco_m2f.engine.train import Trainer
from eco_m2f.evaluation.semantic import SemanticEvaluator


def test_a_training_writes_checkpoints_metrics_and_tensorboard_events(tiny):
    cfg = load_cfg(tiny.config(), ["SOLVER.MAX_ITER", 2, "OUTPUT_DIR", str(tiny.base / "run")])
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    written = {p.name.split(".")[0] for p in (tiny.base / "run").iterdir()}
    assert {"model_final", "last_checkpoint", "metrics", "events", "inference"} <= written
    assert list((tiny.base / "run").glob("events.out.tfevents.*"))[0].stat().st_size > 100
    metrics = [json.loads(line) for line in (tiny.base / "run" / "metrics.json").read_text().splitlines()]
    assert math.isfinite(metrics[0]["total_loss"]) and any("panoptic_seg/PQ" in m for m in metrics)


@pytest.mark.slow
def test_an_evaluator_that_fails_costs_its_own_result_alone(tiny, tmp_path, monkeypatch, capfd):
    """During a training, which goes on, and in a separate evaluation. The exit status is not 0."""
    monkeypatch.setattr(SemanticEvaluator, "summary", lambda self, rows: {}["no such class"])
    weights = tmp_path / "train" / "model_final.pth"
    for name, flags in {"train": [], "test": ["--eval-only", "MODEL.WEIGHTS", weights]}.items():
        options = ["SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 1, "OUTPUT_DIR", tmp_path / name]
        assert call("train_net", "--config-file", tiny.config(), *flags, *options) == 1
        err = capfd.readouterr().err
        assert "SemanticEvaluator on" in err and "no such class" in err and err.count("error: ") == 1
        log = (tmp_path / name / "log.txt").read_text()
        assert "Traceback" in log and log.count("Task: panoptic_seg") == (1 if flags else 2)
        results = tmp_path / name / "inference" / tiny.dataset("val") / "results.json"
        assert set(json.loads(results.read_text())) == {"exits", "panoptic_seg", "segm"}
    assert weights.is_file()


class PowerCut(Exception):
    """Not an input error."""


class FailsAt(Trainer):
    """A trainer whose run ends in iteration 3."""

    def before_step(self):
        if self.iter == 3:
            raise PowerCut
        super().before_step()


def stop_workers(trainer: Trainer) -> None:
    """Ends them now: a worker forked before garbage collection would keep their pipes open."""
    trainer._trainer._data_loader_iter_obj = None


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, seed, workers", [("eco_maskformer2", 5, 2), ("eco_maskformer2", -1, 0), ("eco_detr", 5, 0)]
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tiny, tmp_path, config, seed, workers):
    """With everything that is random: order of images, augmentation, points, dropout, exits. And with accumulation."""

    def trainer(kind, folder, *more):
        options = ["SEED", seed, "SOLVER.MAX_ITER", 5, "SOLVER.CHECKPOINT_PERIOD", 2, "DATALOADER.NUM_WORKERS", workers]
        random = ["MODEL.ECO.EXITS_PER_STEP", 2, "MODEL.MASK_FORMER.DROPOUT", 0.1, "MODEL.DETR.DROPOUT", 0.1]
        random += ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.IMS_PER_GPU", 2]
        data = ["INPUT.MIN_SIZE_TRAIN", (32, 48, 64), "DATASETS.TEST", (), "OUTPUT_DIR", str(tmp_path / folder)]
        cfg = load_cfg(tiny.config(config), [*options, *random, *data, *more])
        (tmp_path / folder).mkdir(exist_ok=True)
        torch.manual_seed(0)  # the initial weights
        np.random.seed(len(list((tmp_path / folder).iterdir())))  # for SEED -1: a resumed run would draw another seed
        return kind(cfg)

    whole = trainer(Trainer, "whole")
    whole.resume_or_load(resume=False)
    whole.train()
    stop_workers(whole)
    cut = trainer(FailsAt, "parts")
    cut.resume_or_load(resume=False)
    with pytest.raises(PowerCut):
        cut.train()
    stop_workers(cut)
    resumed = trainer(Trainer, "parts")
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    resumed.train()
    stop_workers(resumed)
    a, b = (torch.load(tmp_path / f / "model_final.pth", weights_only=False) for f in ("whole", "parts"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    moments = [part["trainer"]["_trainer"]["optimizer"]["state"] for part in (a, b)]
    assert all(torch.equal(moments[0][i]["exp_avg_sq"], moments[1][i]["exp_avg_sq"]) for i in moments[0])
    start = trainer(Trainer, "start").model.state_dict()
    assert any(not torch.equal(a["model"][k], start[k]) for k in start)


def test_nan_losses_stop_the_training_naming_iteration_and_images():
    model = fill(build(ECO))
    batches = [make_batch() for _ in range(3)]
    batches[2][0]["image_id"] = "broken.png"
    step = make_step(model, batches, "SOLVER.BASE_LR", 1e-9)
    weight = model.sem_seg_head.predictor.class_embed.weight
    original = step.run_step

    def spoil():
        if step.iter == 2:
            weight.data[0, 0] = float("nan")
        original()

    step.run_step = spoil
    with pytest.raises(FloatingPointError, match=r"iteration 2 .*loss_ce.*nan.*images \['broken.png', 1\].*BASE_LR"):
        step.train(0, 3)


def test_infinite_losses_count_as_broken():
    with pytest.raises(FloatingPointError, match="b = inf"):
        check_finite({"a": torch.tensor(1.0), "b": torch.tensor(math.inf)}, 0, [{}])
    check_finite({"a": torch.tensor(1.0)}, 0, [{}])


class BreaksLast(Trainer):
    """A trainer whose last step fails."""

    def run_step(self):
        if self.iter + 1 == self.max_iter:
            raise PowerCut("the real error")
        self.storage.put_scalar("loss", 1.0)


@pytest.mark.parametrize("kind, evaluated", [(Trainer, 1), (BreaksLast, 0)])
def test_after_a_failed_last_step_nothing_is_evaluated_nor_saved(tiny, tmp_path, monkeypatch, kind, evaluated):
    calls = []
    monkeypatch.setattr("eco_m2f.engine.train.evaluate", lambda cfg, model: calls.append(1) or {})
    monkeypatch.setattr(Step, "run_step", lambda self: None)
    options = ["SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 5, "OUTPUT_DIR", str(tmp_path)]
    trainer = kind(load_cfg(tiny.config(), options))
    if evaluated:
        trainer.train()
    else:
        closing = [h for h in trainer._hooks if not isinstance(h, hooks.EvalHook)][0]
        monkeypatch.setattr(closing, "after_train", lambda: 1 / 0)  # takes the place of no other error
        with pytest.raises(PowerCut, match="the real error"):
            trainer.train()
    assert len(calls) == evaluated and (tmp_path / "model_final.pth").exists() == bool(evaluated)


def test_batch_norm_with_one_value_per_channel_names_images_and_remedy():
    batch = [{"image": torch.zeros(3, 24, 32), "file_name": "a.png"}]
    with pytest.raises(ValueError, match=r"a.png \(32x24\).*SOLVER.IMS_PER_GPU.*SOLVER.IMS_PER_BATCH.*FrozenBN"):
        with enough_values(batch):
            nn.BatchNorm2d(2)(torch.ones(1, 2, 1, 1))
    with pytest.raises(ValueError, match="^another$"), enough_values(batch):
        raise ValueError("another")
