"""Saving checkpoints, interrupted saves, and resuming."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import SHAPES, Tree, assert_loaded
from detectron2.engine import SimpleTrainer, hooks
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler
from torch import nn

from eco_m2f import files
from eco_m2f.checkpoint.checkpointer import Checkpointer
from eco_m2f.checkpoint.safe_load import CheckpointError
from eco_m2f.files import file_sha256

ROOT = Path(__file__).resolve().parents[2]


class Run:
    """Replaces the trainer: state that is saved with the model."""

    def __init__(self, iteration: int = 0):
        self.iteration = iteration

    def state_dict(self):
        return {"iteration": self.iteration}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]


def test_resume_goes_on_where_the_run_stopped(tmp_path, model):
    Checkpointer(model, str(tmp_path), trainer=Run(41)).save("model_0000041", iteration=41, lr=np.float64(0.1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0000041.pth"]
    other, run = Tree(SHAPES), Run()
    extra = Checkpointer(other, str(tmp_path), trainer=run).resume_or_load("unused.pth", resume=True)
    assert_loaded(other, model.state_dict())
    assert run.iteration == 41
    assert extra["iteration"] == 41 and extra["lr"] == 0.1


def test_resume_restores_the_optimizer_exactly(tmp_path, model):
    def step(model, optimizer, scheduler):
        optimizer.zero_grad()
        sum((p**2).sum() for p in model.parameters()).backward()
        optimizer.step()
        scheduler.step()

    def parts(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)

    optimizer, scheduler = parts(model)
    for _ in range(3):
        step(model, optimizer, scheduler)
    Checkpointer(model, str(tmp_path), optimizer=optimizer, scheduler=scheduler).save("a")
    other = Tree(SHAPES)
    other_parts = parts(other)
    names = dict(zip(("optimizer", "scheduler"), other_parts, strict=True))
    Checkpointer(other, str(tmp_path), **names).resume_or_load("", resume=True)
    step(model, optimizer, scheduler)
    step(other, *other_parts)
    assert_loaded(other, model.state_dict())


class OneWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, batch):
        return {"loss": (self.weight * batch).pow(2).sum()}


def train(folder: Path, start: int, stop: int, resume: bool) -> OneWeight:
    """Trains a few iterations with detectron2's loop, hooks and schedule. It saves every second one."""
    model = OneWeight()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    multiplier = WarmupParamScheduler(MultiStepParamScheduler([1.0, 0.1], milestones=[5], num_updates=8), 0.1, 0.25)
    scheduler = LRMultiplier(optimizer, multiplier, max_iter=8)
    trainer = SimpleTrainer(model, [torch.tensor([1.0, 2.0, 3.0])] * 8, optimizer)
    checkpointer = Checkpointer(model, str(folder), trainer=trainer)
    trainer.register_hooks([hooks.LRScheduler(optimizer, scheduler), hooks.PeriodicCheckpointer(checkpointer, 2)])
    checkpointer.resume_or_load("", resume=resume)
    assert not resume or trainer.iter + 1 == start
    trainer.train(start, stop)
    return model


def test_a_detectron2_run_in_two_parts_equals_one_in_one_part(tmp_path):
    for name in ("parts", "whole"):
        (tmp_path / name).mkdir()
    train(tmp_path / "parts", 0, 4, resume=False)
    resumed = train(tmp_path / "parts", 4, 8, resume=True)
    whole = train(tmp_path / "whole", 0, 8, resume=False)
    assert torch.equal(resumed.weight, whole.weight)
    assert not torch.equal(resumed.weight, OneWeight().weight)


def test_without_resume_only_weights_are_loaded(tmp_path, model):
    Checkpointer(model, str(tmp_path), trainer=Run(41)).save("a")
    run = Run()
    Checkpointer(Tree(SHAPES), str(tmp_path), trainer=run).resume_or_load(str(tmp_path / "a.pth"), resume=False)
    assert run.iteration == 0


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_run_killed_while_saving_leaves_the_last_checkpoint(tmp_path, model, monkeypatch, where):
    checkpointer = Checkpointer(model, str(tmp_path), trainer=Run(1))
    checkpointer.save("model_1")
    good = (tmp_path / "model_1.pth").read_bytes()

    def die(*_):
        raise KeyboardInterrupt

    target = {"write": (torch, "save"), "fsync": (files.os, "fsync"), "replace": (files.os, "replace")}[where]
    with monkeypatch.context() as patch:
        patch.setattr(*target, die)
        for name in ("model_2", "model_1"):  # a new file, and one in place of the good one
            with pytest.raises(KeyboardInterrupt):
                checkpointer.save(name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_1.pth"]
    assert (tmp_path / "model_1.pth").read_bytes() == good
    run = Run()
    Checkpointer(Tree(SHAPES), str(tmp_path), trainer=run).resume_or_load("", resume=True)
    assert run.iteration == 1


KILLED = """
import os, sys
from eco_m2f.files import atomic_write
with atomic_write(sys.argv[1]) as file:
    file.write(b"half"); file.flush()
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_run_left_goes_and_what_is_being_written_stays(tmp_path, model):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "model_1.pth"], cwd=ROOT)
    assert done.returncode == -9 and len(list(tmp_path.glob(".model_1.pth.*.tmp"))) == 1
    own = tmp_path / f".model_0.pth.{os.getpid()}.tmp"
    own.write_bytes(b"of a process that had this number before")
    (tmp_path / ".notes.tmp").write_text("not ours")
    with files.atomic_write(tmp_path / "model_2.pth") as handle:
        handle.write(b"being ")
        Checkpointer(model, str(tmp_path), save_to_disk=False).resume_or_load("", resume=True)
        assert own.exists()  # a process that writes nothing removes nothing
        Checkpointer(model, str(tmp_path)).resume_or_load("", resume=True)
        handle.write(b"written")
    assert {p.name for p in tmp_path.iterdir()} == {".notes.tmp", "model_2.pth"}
    assert (tmp_path / "model_2.pth").read_bytes() == b"being written"


def test_the_folder_is_synced_after_the_file_has_its_name(tmp_path, monkeypatch):
    synced, original = [], os.fsync

    def fsync(descriptor):
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "a").exists()))
        original(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with files.atomic_write(tmp_path / "a") as handle:
        handle.write(b"x")
    assert synced[0][1] is False and synced[1] == (str(tmp_path), True)


def test_a_leftover_of_a_killed_process_is_no_checkpoint(tmp_path, model):
    checkpointer = Checkpointer(model, str(tmp_path))
    checkpointer.save("a")
    (tmp_path / ".b.pth.123.tmp").write_bytes(b"half")
    assert checkpointer.get_all_checkpoint_files() == [str(tmp_path / "a.pth")]


@pytest.mark.parametrize("harm", ["gone", "truncated"])
def test_a_harmed_last_checkpoint_names_the_newest_whole_one(tmp_path, model, harm):
    checkpointer = Checkpointer(model, str(tmp_path), trainer=Run())
    for i, name in enumerate(("model_1", "model_2", "model_3")):
        checkpointer.save(name)
        os.utime(tmp_path / f"{name}.pth", (i, i))
    last = tmp_path / "model_3.pth"
    last.unlink() if harm == "gone" else last.write_bytes(last.read_bytes()[:-100])
    expected = "model_3.pth, but that (does not exist|is truncated).*resume from model_2.pth"
    with pytest.raises(CheckpointError, match=expected):
        checkpointer.resume_or_load("", resume=True)


@pytest.mark.parametrize("record", ["the weights", "the training state"])
def test_a_resumed_run_never_starts_from_a_damaged_checkpoint(tmp_path, model, record):
    class Optimizer(Run):
        def state_dict(self):
            return {"exp_avg": torch.full((7,), 0.123)}

    for name in ("model_1", "model_2"):
        Checkpointer(model, str(tmp_path), trainer=Optimizer()).save(name)
    os.utime(tmp_path / "model_1.pth", (1, 1))
    path, weight = tmp_path / "model_2.pth", model.state_dict()["criterion.empty_weight"]
    wanted = weight if record == "the weights" else torch.full((7,), 0.123)
    content = bytearray(path.read_bytes())
    content[content.index(wanted.numpy().tobytes())] ^= 1
    path.write_bytes(content)
    expected = r"names model_2\.pth, but that is damaged: Bad CRC-32 .*to resume from model_1\.pth"
    with pytest.raises(CheckpointError, match=expected):
        Checkpointer(Tree(SHAPES), str(tmp_path), trainer=Optimizer()).resume_or_load("", resume=True)


def test_damage_to_the_very_end_of_an_archive_is_found_too(tmp_path, model):
    for name in ("model_1", "model_2"):
        Checkpointer(model, str(tmp_path), trainer=Run()).save(name)
    path = tmp_path / "model_2.pth"
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x06\x07") + 16] = 2  # the number of disks
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model_2\.pth, but that is damaged: .*disks.*to resume from model_1"):
        Checkpointer(model, str(tmp_path), trainer=Run()).resume_or_load("", resume=True)


def test_a_last_checkpoint_that_is_no_text_is_reported(tmp_path, model):
    Checkpointer(model, str(tmp_path)).save("a")
    (tmp_path / "last_checkpoint").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="last_checkpoint holds no file name"):
        Checkpointer(model, str(tmp_path)).resume_or_load("", resume=True)


def test_the_state_of_another_run_is_refused_with_its_file(tmp_path, model):
    class Other(Run):
        def state_dict(self):
            return {"step": 1}

    Checkpointer(model, str(tmp_path), trainer=Other()).save("a")
    with pytest.raises(CheckpointError, match=r"state of trainer in .*a\.pth does not fit this run \(KeyError"):
        Checkpointer(model, str(tmp_path), trainer=Run()).resume_or_load("", resume=True)


def test_resuming_needs_the_training_state(tmp_path, model):
    Checkpointer(model, str(tmp_path)).save("weights_only")
    with pytest.raises(CheckpointError, match="weights_only.pth holds no state of trainer"):
        Checkpointer(model, str(tmp_path), trainer=Run()).resume_or_load("", resume=True)


def test_nothing_is_written_where_saving_is_off(tmp_path, model):
    Checkpointer(model, str(tmp_path), save_to_disk=False).save("a")
    assert not list(tmp_path.iterdir())


def test_a_name_with_a_folder_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match="best/model"):
        Checkpointer(model, str(tmp_path)).save("best/model")


def test_sha256(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert file_sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
