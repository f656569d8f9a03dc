"""Damaged checkpoints and configs are read unchanged, or refused with one error that names the file."""

import pickle
import random

import numpy as np
import pytest
import torch
from fuzzing import damaged, tries

from eco_m2f.checkpoint.safe_load import SHA256, CheckpointError, read_checkpoint, weights_sha256, write_weights
from eco_m2f.engine.config_file import read_config

WEIGHTS = {
    "backbone.conv.weight": torch.linspace(-1, 1, 12).reshape(3, 4),
    "backbone.norm.num_batches_tracked": torch.tensor(7),
    "head.bias": torch.full((5,), 0.5, dtype=torch.float16),
}
STATE = {"model": WEIGHTS, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "lr": [0.1, 0.2]}, "iteration": 41}
ARRAYS = {name: value.numpy() for name, value in WEIGHTS.items()}


def archive(path):
    torch.save(STATE, path)


def older(path):
    torch.save(STATE, path, _use_new_zipfile_serialization=False)


def pickled(path, protocol=4):
    content = {"model": ARRAYS, "__author__": "x", "lr": np.float64(0.5), SHA256: weights_sha256(WEIGHTS)}
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def exported(path):
    write_weights(path, WEIGHTS)


# Whether damage to the weights is always found.
KINDS = {
    "archive": (archive, "m.pth", True),
    "older": (older, "m.pth", False),
    "pickle 2": (lambda path: pickled(path, 2), "m.pkl", True),
    "pickle 4": (pickled, "m.pkl", True),
    "pickle 5": (lambda path: pickled(path, 5), "m.pkl", True),
    "safetensors": (exported, "m.safetensors", True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_equal_or_refused(tmp_path, kind):
    write, name, seen = KINDS[kind]
    path = tmp_path / name
    write(path)
    good = read_checkpoint(path)["model"]
    assert weights_sha256(good) == weights_sha256(WEIGHTS)
    refused, count = 0, tries(300)
    for content in damaged(path.read_bytes(), count):
        path.write_bytes(content)
        try:
            found = read_checkpoint(path)["model"]
        except CheckpointError as error:
            assert str(path) in str(error), error
            refused += 1
            continue
        assert all(isinstance(value, torch.Tensor) for value in found.values())
        for value in found.values():
            value.sum()  # within its storage
        if seen and (name == "m.pth" or SHA256.encode() in content):  # otherwise the checksum itself was damaged
            assert weights_sha256(found) == weights_sha256(good)
    assert refused > count / 4


CONFIG = """# a comment
VERSION: 2
MODEL:
  META_ARCHITECTURE: "EcoMaskFormer"
  PIXEL_MEAN: [123.675, 116.280, 103.530]
  ECO: {EXITS: [2, 3, 4], BETA: 0.003}
SOLVER: &solver
  BASE_LR: 0.0001
  STEPS: (327778, 355092)
OTHER: *solver
"""


def plain(value) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return isinstance(value, str | bool | int | float | None)


def test_a_damaged_config_is_plain_or_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    assert plain(read_config(path))
    pieces = [b"!!python/object/apply:os.system [x]", b"*solver", b"&a ", b"<<: ", b"? ", b"[", b"{", b".nan", b"\x00"]
    rng, refused = random.Random(0), 0
    for i, content in enumerate(damaged(CONFIG.encode(), tries(400))):
        if i % 2:
            place = rng.randrange(len(content) + 1)
            content = content[:place] + rng.choice(pieces) + content[place:]
        path.write_bytes(content)
        try:
            assert plain(read_config(path))
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 50
