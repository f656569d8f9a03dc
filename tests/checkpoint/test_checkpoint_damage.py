"""Checkpoints that are missing, damaged or hostile."""

import collections
import os
import pickle
import subprocess

import numpy as np
import pytest
import torch
from checkpoint_files import write_pkl, write_pth

from eco_m2f.checkpoint.checkpointer import Checkpointer
from eco_m2f.checkpoint.safe_load import CheckpointError, read_checkpoint


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_missing_file(tmp_path, model, suffix):
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at .*gone{suffix}: check MODEL.WEIGHTS"):
        Checkpointer(model).load(str(tmp_path / f"gone{suffix}"))


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file(tmp_path, weights, suffix, kept):
    path = tmp_path / f"m{suffix}"
    (write_pth if suffix == ".pth" else write_pkl)(path, {"model": weights, "__author__": "x"})
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(CheckpointError, match=rf"m{suffix} \({int(kept * len(data))} bytes\).*truncated"):
        read_checkpoint(path)


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_a_web_page_saved_as_a_checkpoint(tmp_path, suffix):
    path = tmp_path / f"m{suffix}"
    path.write_text("<!DOCTYPE html><html><body>404</body></html>")
    with pytest.raises(CheckpointError, match=r"44 bytes\) cannot be read"):
        read_checkpoint(path)


class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


ATTACKS = {
    "system": (os.system, "touch {}"),
    "eval": (eval, "open({!r}, 'w')"),
    "open": (open, "{}", "w"),
    "namedtuple": (collections.namedtuple, "a", "b"),  # harmless, but refused too
    "popen": (subprocess.Popen, "touch {}"),
    "load": (torch.load, "{}"),
}


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_pickle_that_runs_code_is_refused_by_name(tmp_path, model, attack, suffix):
    function, *arguments = ATTACKS[attack]
    trace = tmp_path / "ran"
    call = Attack(function, *(a.format(str(trace)) for a in arguments))
    write = write_pth if suffix == ".pth" else write_pkl
    path = write(tmp_path / f"evil{suffix}", {"model": {"a": call}, "__author__": "x"})
    with pytest.raises(CheckpointError, match=f"was refused.*{function.__name__}"):
        Checkpointer(model).load(path)
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_storage_bytes_inside_a_pickle_are_no_way_in(tmp_path):
    """torch pickles a tensor's bytes as a separate pickle. It must be opened just as carefully."""
    trace = tmp_path / "ran"
    inner = pickle.dumps(Attack(os.system, f"touch {trace}"))
    path = write_pkl(tmp_path / "evil.pkl", {"model": {"a": Attack(torch.storage._load_from_bytes, inner)}})
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not trace.exists()


def test_object_arrays_are_no_way_in(tmp_path):
    trace = tmp_path / "ran"
    array = np.array([Attack(os.system, f"touch {trace}")], dtype=object)
    with pytest.raises(CheckpointError, match=r"refused.*numpy\.dtype\(O8\)"):
        read_checkpoint(write_pkl(tmp_path / "evil.pkl", {"model": {"a": array}}))
    assert not trace.exists()


@pytest.mark.parametrize("data", [[1, 2], {}, {"model": {}}, {"model": 3}, {"model": {"a": "text"}}, {"a": 1.0}])
def test_files_without_weights(tmp_path, data):
    with pytest.raises(CheckpointError, match="holds a list|holds a dict|holds no weights|not an array"):
        read_checkpoint(write_pth(tmp_path / "m.pth", data))


def test_caffe2_weights_are_recognised(tmp_path):
    blobs = {"conv1_w": np.zeros((2, 3, 7, 7), np.float32), "conv1_w_momentum": np.zeros(1, np.float32)}
    checkpoint = read_checkpoint(write_pkl(tmp_path / "m.pkl", {"blobs": blobs}))
    assert set(checkpoint["model"]) == {"conv1_w"}
    assert checkpoint["matching_heuristics"] and checkpoint["__author__"] == "Caffe2"


def test_unreachable_url(model, monkeypatch):
    def refuse(path):
        raise OSError("no route to host")

    monkeypatch.setattr("eco_m2f.checkpoint.checkpointer.PathManager.get_local_path", refuse)
    with pytest.raises(CheckpointError, match="https://x.invalid/m.pth cannot be fetched.*no route.*download it"):
        Checkpointer(model).load("https://x.invalid/m.pth")
