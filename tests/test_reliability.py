"""The promises of docs/RELIABILITY.md without another test: kills in Steps A and C, and a full disk."""

import contextlib
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from derived_by_depth import make_derived
from minis import ROOT
from tiny import Tiny, here, tool_environment

from eco_m2f.checkpoint.checkpointer import Checkpointer
from eco_m2f.gates.gate import Gate


@contextlib.contextmanager
def full_disk():
    """A context in which files cannot grow beyond 4 kB, as on a full disk."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    model = torch.nn.Linear(100, 100)
    checkpointer = Checkpointer(model, str(tmp_path))
    checkpointer.save("model_final")
    before = (tmp_path / "model_final.pth").read_bytes()
    with torch.no_grad():
        model.weight += 1
    with pytest.raises((OSError, RuntimeError)), full_disk():
        checkpointer.save("model_final")
    assert {p.name for p in tmp_path.iterdir()} == {"model_final.pth", "last_checkpoint"}
    assert (tmp_path / "model_final.pth").read_bytes() == before


def test_a_full_disk_leaves_the_gate_before(tmp_path):
    small = Gate(torch.zeros(2, 4), torch.zeros(2), (2, 6), 0.1, "hard_ce", "res5", "f" * 64)
    small.save(tmp_path / "gate.pth")
    large = Gate(torch.zeros(2, 4096), torch.zeros(2), (2, 6), 0.1, "hard_ce", "res5", "f" * 64)
    with pytest.raises((OSError, RuntimeError)), full_disk():
        large.save(tmp_path / "gate.pth")
    assert Gate.load(tmp_path / "gate.pth").weight.shape == (2, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["gate.pth"]


def test_a_full_disk_leaves_no_half_shard(tmp_path):
    with pytest.raises(OSError), full_disk():
        make_derived(tmp_path / "derived", 2000, seed=0)
    assert [p.name for p in (tmp_path / "derived").iterdir()] == ["manifest.json"]


@pytest.mark.slow
def test_a_training_killed_outright_goes_on_to_the_same_weights(tmp_path):
    tiny = Tiny(tmp_path)
    words = ["--config-file", tiny.config("maskformer2"), "--resume", "DATASETS.TEST", "()", "SEED", "3"]
    words += ["SOLVER.MAX_ITER", "12", "SOLVER.CHECKPOINT_PERIOD", "3", "OUTPUT_DIR"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert here("train_net", *words, whole).returncode == 0
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), *words, str(cut)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=tool_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(1200):
        if (cut / "last_checkpoint").exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert (cut / "last_checkpoint").exists() and not (cut / "model_final.pth").exists(), "killed too late or too early"
    resumed = here("train_net", *words, cut)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert "Starting training from iteration 0" not in resumed.stdout
    a, b = (torch.load(folder / "model_final.pth", weights_only=False)["model"] for folder in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_gates_killed_outright_leave_the_one_before_and_are_fitted_again(tmp_path):
    make_derived(tmp_path / "derived", 400, seed=0)
    words = ["--train", str(tmp_path / "derived"), "--output", str(tmp_path / "gate.pth"), "--beta"]
    assert here("train_gate", *words, "0.001").returncode == 0
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.*")}
    assert list(before) == ["gate.pth"]
    command = [sys.executable, str(ROOT / "tools" / "train_gate.py"), *words, *(f"{i}e-5" for i in range(1, 1500))]
    with subprocess.Popen(command, cwd=ROOT, env=tool_environment(), stdout=subprocess.PIPE, text=True) as process:
        printed = [next(process.stdout) for _ in range(4)]  # some gates are fitted and measured
        process.kill()
    assert process.returncode == -signal.SIGKILL and "saved" not in "".join(printed), "killed too late"
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.*")} == before
    assert here("train_gate", *words, "0.001").returncode == 0
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.*")} == before
