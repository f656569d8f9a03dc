"""Bad input of Steps B and C ends in one message with the cause and the remedy."""

import shutil

import pytest
import torch
from tiny import Tiny
from tried_tools import CHANNELS, assert_names

from eco_m2f.checkpoint.parent_hash import parent_sha256
from eco_m2f.gates.gate import Gate

pytestmark = pytest.mark.slow


def make_gate(path, parent: str, exits=(2, 3, 4, 5, 6), channels: int = CHANNELS):
    torch.manual_seed(0)
    weight, bias = torch.randn(len(exits), channels), torch.zeros(len(exits))
    gate = Gate(weight, bias, exits, 0.001, "hard_ce", "res5", parent)
    gate.save(path)
    return path


def gated(path) -> list:
    return ["MODEL.ECO.POLICY", "LinearGate", "MODEL.ECO.GATE", path]


def parent_of(good: Tiny) -> str:
    return parent_sha256(torch.load(good.base / "model.pth")["model"])


def test_a_gate_that_fits_is_taken(tools, good, tmp_path):
    assert tools.evaluate(*gated(make_gate(tmp_path / "gate.pth", parent_of(good)))) == 0


@pytest.mark.parametrize("path", ["", "gone.pth"])
def test_missing_gate(tools, path):
    assert_names(tools.message(tools.evaluate(*gated(path))), f"no gate at '{path}'", "train_gate.py")


def test_gate_of_another_parent(tools, tmp_path):
    path = make_gate(tmp_path / "gate.pth", "b" * 64)
    assert_names(tools.message(tools.evaluate(*gated(path))), path, "bbbbbbbbbbbb", "load that parent")


def test_gate_of_other_exits_and_other_channels(tools, good, tmp_path):
    path = make_gate(tmp_path / "gate.pth", parent_of(good), channels=12)
    assert_names(tools.message(tools.evaluate(*gated(path))), path, "12 channels", CHANNELS)
    path = make_gate(tmp_path / "gate.pth", parent_of(good), exits=(1, 6))
    assert_names(tools.message(tools.evaluate(*gated(path))), path, "(1, 6)")


def test_truncated_gate(tools, good, tmp_path):
    path = make_gate(tmp_path / "gate.pth", parent_of(good))
    path.write_bytes(path.read_bytes()[:500])
    assert_names(tools.message(tools.evaluate(*gated(path))), path, "train_gate.py")


@pytest.mark.parametrize("beta", ["-0.1", "nan", "inf"])
def test_beta_that_is_no_price(tools, derived, tmp_path, beta):
    message = tools.message(tools.fit("--train", derived, f"--beta={beta}", "--output", tmp_path / "gate.pth"))
    assert_names(message, "beta must be a finite number >= 0", beta)
    oracle = ["MODEL.ECO.POLICY", "OracleExit", "MODEL.ECO.DERIVED", derived, "MODEL.ECO.BETA", float(beta)]
    assert_names(tools.message(tools.evaluate(*oracle)).lower(), "beta", beta)
    assert not (tmp_path / "gate.pth").exists()


@pytest.mark.parametrize("k", [1, 7])
def test_max_exit_outside_the_exits(tools, derived, tmp_path, k):
    options = ["--beta", 0.1, "--max-exit", k, "--output", tmp_path / "gate.pth"]
    message = tools.message(tools.fit("--train", derived, "--val", derived, *options))
    assert_names(message, "one of the exits [2, 3, 4, 5, 6]", f"not {k}")


def test_missing_derived_dataset(tools, tmp_path):
    message = tools.message(tools.fit("--train", tmp_path, "--beta", 0.1, "--output", tmp_path / "gate.pth"))
    assert_names(message, tmp_path, "derive_dataset.py")
    message = tools.message(tools.evaluate("MODEL.ECO.POLICY", "OracleExit", "MODEL.ECO.DERIVED", tmp_path))
    assert_names(message, tmp_path, "derive_dataset.py")


def test_step_c_after_a_killed_step_b(tools, derived, tmp_path):
    shutil.copytree(derived, tmp_path / "killed")
    next((tmp_path / "killed").glob("*1.parquet")).unlink()
    message = tools.message(tools.fit("--train", tmp_path / "killed", "--beta", 0.1, "--output", tmp_path / "g.pth"))
    assert_names(message, tmp_path / "killed", "1 of 2 shards", "run derive_dataset.py again to continue it")


def test_damaged_shard(tools, derived, tmp_path):
    shutil.copytree(derived, tmp_path / "damaged")
    shard = next((tmp_path / "damaged").glob("*1.parquet"))
    shard.write_bytes(shard.read_bytes()[:-9])
    message = tools.message(tools.fit("--train", tmp_path / "damaged", "--beta", 0.1, "--output", tmp_path / "g.pth"))
    assert_names(message, shard, "run derive_dataset.py again to rewrite it")


def test_oracle_of_another_split(tools, derived):
    oracle = ["MODEL.ECO.POLICY", "OracleExit", "MODEL.ECO.DERIVED", derived]
    message = tools.message(tools.evaluate(*oracle))
    assert_names(message, derived, f"is of '{tools.good.name}_train'", f"'{tools.good.name}_val' is evaluated")


def test_oracle_of_other_weights(tools, derived, tmp_path):
    state = torch.load(tools.good.base / "model.pth")["model"]
    state["sem_seg_head.predictor.class_embed.bias"] += 1
    torch.save({"model": state}, tmp_path / "other.pth")
    test = ["DATASETS.TEST", f"('{tools.good.name}_train',)"]
    oracle = [*test, "MODEL.ECO.POLICY", "OracleExit", "MODEL.ECO.DERIVED", derived]
    assert tools.evaluate(*oracle) == 0
    message = tools.message(tools.evaluate(*oracle, "MODEL.WEIGHTS", tmp_path / "other.pth"))
    assert_names(message, derived, "other weights", "derive it again")


def test_step_b_of_the_parent_alone(tools):
    assert_names(tools.message(tools.derive("MODEL.META_ARCHITECTURE", "MaskFormer")), "EcoMaskFormer")


def test_step_b_of_an_unknown_split(tools, good):
    assert_names(tools.message(tools.derive(split="none")), f"{good.name}_none")


def test_step_b_into_another_datasets_folder(tools, derived):
    tools.output = derived.parent
    message = tools.message(tools.derive(split="val", flags=["--shard-size", 1]))
    assert_names(message, derived, "another origin", "dataset", "Use another directory")


def test_step_b_with_shards_of_nothing(tools):
    assert_names(tools.message(tools.derive(flags=["--shard-size", 0])), "shard_size", "0")
