"""A gate and its file, which is read unchanged or refused."""

import json
import math
import zipfile
from dataclasses import fields

import pytest
import safetensors.torch
import torch
from fuzzing import damaged, tries
from mutate import other_values, outcome

from eco_m2f.gates.file import FORMAT, OLD_FORMAT, write_gate
from eco_m2f.gates.gate import Gate

SOURCE = {"feature_source": "res5", "parent_sha256": "f" * 64}


def small_gate(**changes):
    options = {
        "weight": torch.arange(6.0).view(3, 2),
        "bias": torch.zeros(3),
        "exits": (2, 4, 6),
        "beta": 0.0005,
        "loss": "hard_ce",
        **SOURCE,
    }
    return Gate(**{**options, **changes})


SUFFIXES = ("pth", "safetensors")
each_suffix = pytest.mark.parametrize("suffix", SUFFIXES)


@each_suffix
def test_a_gate_is_read_as_it_was_saved(tmp_path, suffix):
    gate = small_gate(fit={"optimizer": "lbfgs", "seed": 3}, results={"pq": 51.5, "loss": "hard_ce"})
    path = tmp_path / "deep" / f"gate.{suffix}"
    gate.save(path)
    loaded = Gate.load(path)
    assert torch.equal(loaded.weight, gate.weight) and torch.equal(loaded.bias, gate.bias)
    for name in ("exits", "max_exit", "beta", "loss", "feature_source", "parent_sha256", "fit", "results"):
        assert getattr(loaded, name) == getattr(gate, name)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == [path.name]
    before = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == before


def test_the_file_is_what_its_name_says(tmp_path):
    small_gate().save(tmp_path / "gate.safetensors")
    with safetensors.safe_open(tmp_path / "gate.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"weight", "bias"} and json.loads(file.metadata()["eco_m2f"])["exits"] == [2, 4, 6]
    small_gate().save(tmp_path / "gate.pth")
    assert torch.load(tmp_path / "gate.pth", weights_only=True)["format"] == FORMAT


def test_numbers_that_are_no_numbers_survive(tmp_path):
    """The results of a gate may hold NaN, if there are no statistics."""
    small_gate(results={"pq": math.nan}).save(tmp_path / "gate.pth")
    assert math.isnan(Gate.load(tmp_path / "gate.pth").results["pq"])


def test_what_a_file_cannot_hold_is_refused_before_it_is_written(tmp_path):
    with pytest.raises(ValueError, match="gate.pth.*not JSON serializable"):
        small_gate(fit={"model": object()}).save(tmp_path / "gate.pth")
    assert not list(tmp_path.iterdir())


def content_of(gate: Gate) -> dict:
    return {f.name: getattr(gate, f.name) for f in fields(gate)}


def test_a_gate_of_the_older_format_is_still_read(tmp_path):
    """It has no digest, but the archive has checksums."""
    path = tmp_path / "gate.pth"
    torch.save({"format": OLD_FORMAT, **content_of(small_gate())}, path)
    assert torch.equal(Gate.load(path).weight, small_gate().weight)
    flipped = bytearray(path.read_bytes())
    flipped[flipped.index(small_gate().weight[2].numpy().tobytes())] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="gate.pth is no whole gate file .Bad CRC-32 for file .*data"):
        Gate.load(path)


def same(a: Gate, b: Gate) -> bool:
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("weight", "bias"))
    others = [f.name for f in fields(a) if f.name not in ("weight", "bias")]
    return tensors and all(getattr(a, name) == getattr(b, name) for name in others)


@each_suffix
def test_fuzz_damage_shows_or_does_no_harm(tmp_path, suffix):
    gate, path = small_gate(fit={"seed": 3}, results={"pq": 51.5}), tmp_path / f"gate.{suffix}"
    gate.save(path)
    found = [outcome(Gate.load, path, bad) for bad in damaged(path.read_bytes(), tries(300))]
    assert all(loaded is None or same(loaded, gate) for loaded in found)
    assert 3 * found.count(None) > 2 * len(found)


def test_fuzz_damage_to_the_older_format_shows_or_does_no_harm(tmp_path):
    gate, path = small_gate(), tmp_path / "gate.pth"
    torch.save({"format": OLD_FORMAT, **content_of(gate)}, path)
    found = [outcome(Gate.load, path, bad) for bad in damaged(path.read_bytes(), tries(200))]
    assert all(loaded is None or same(loaded, gate) for loaded in found)


@each_suffix
def test_a_value_that_was_changed_shows(tmp_path, suffix):
    """Every value in turn, with the old digest."""
    gate, path = small_gate(fit={"seed": 3}), tmp_path / f"gate.{suffix}"
    gate.save(path)
    if suffix == "pth":
        content = torch.load(path, weights_only=True)
        tensors = {name: content.pop(name) for name in ("weight", "bias")}
    else:
        with safetensors.safe_open(path, framework="pt") as file:
            content = json.loads(file.metadata()["eco_m2f"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    changed = [values for values in other_values(content) if repr(values) != repr(content)]
    assert len(changed) > 100
    for values in changed:
        if suffix == "pth":
            torch.save({**tensors, **values}, path)
        else:
            safetensors.torch.save_file(tensors, path, {"eco_m2f": json.dumps(values)})
        assert outcome(Gate.load, path, path.read_bytes()) is None, values


@each_suffix
@pytest.mark.parametrize("changes", [{"beta": 10**400}, {"exits": [2, 4, 10**30]}, {"weight": torch.zeros(3, 0)}])
def test_numbers_beyond_all_bounds_are_refused_by_name(tmp_path, suffix, changes):
    """With a correct digest."""
    path = tmp_path / f"gate.{suffix}"
    write_gate(path, {**content_of(small_gate()), **changes})
    message = f"cannot be used: .*{next(iter(changes))}|is no whole gate file .it holds an integer"
    with pytest.raises(ValueError, match=f"gate.{suffix} ({message})"):
        Gate.load(path)


BOMBS = {  # pickles that make PyTorch's own reader take gigabytes or minutes
    "a gigabyte of zeros": b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x40\x85R.",
    "keys that collide": b"\x80\x02}("
    + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(1, 1000))
    + b"u.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_it_takes_memory_or_time(tmp_path, name):
    small_gate().save(tmp_path / "sound.pth")
    with zipfile.ZipFile(tmp_path / "sound.pth") as sound, zipfile.ZipFile(tmp_path / "gate.pth", "w") as bomb:
        for record in sound.namelist():
            bomb.writestr(record, BOMBS[name] if record.endswith("data.pkl") else sound.read(record))
    with pytest.raises(ValueError, match="gate.pth is no whole gate file .(bytes in it|a dict or set in it)"):
        Gate.load(tmp_path / "gate.pth")


TENSORS = {
    "weight": ("text", None, torch.zeros(3, 2).double(), torch.zeros(3, 2).int(), torch.zeros(3, 2).to_sparse(),
               torch.zeros(3, 2, device="meta"), torch.zeros(3), torch.full((3, 2), math.inf),
               torch.zeros(1).expand(3, 2**40), torch.zeros(0, 2)),
    "bias": (0.0, torch.zeros(2), torch.zeros(3, 1), torch.zeros(3, dtype=torch.complex64), torch.full((3,), math.nan)),
}  # fmt: skip


def test_a_tensor_that_no_gate_can_have_is_refused_by_name(tmp_path):
    """In the older format, which has no digest to show a change."""
    path = tmp_path / "gate.pth"
    for name, others in TENSORS.items():
        for other in others:
            torch.save({"format": OLD_FORMAT, **content_of(small_gate()), name: other}, path)
            with pytest.raises(ValueError, match=r"gate\.pth"):
                Gate.load(path)


WRONG = {
    "exits": (None, 2, "246", [2, 4, 6.0], [2, 4, True], [2, 4, 4], [0, 2, 4], [], {"a": 1}, [2, 4]),
    "beta": (None, "0", True, [0.1], -1, math.nan, math.inf),
    "loss": (None, "mse", ["hard_ce"], {}),
    "feature_source": (None, "res4", ["res5"]),
    "parent_sha256": (None, "", "f" * 63, "F" * 64, 3),
    "fit": (None, [], "lbfgs"),
    "results": (None, 3.0),
}


@each_suffix
def test_a_value_that_no_gate_can_have_is_refused_by_name(tmp_path, suffix):
    """Also with a correct digest, as in a hand-made file."""
    path = tmp_path / f"gate.{suffix}"
    for name, others in WRONG.items():
        for other in others:
            write_gate(path, {**content_of(small_gate()), name: other})
            with pytest.raises(ValueError, match=rf"gate\.{suffix} cannot be used: .*{name.split('_')[0]}"):
                Gate.load(path)
    for content in ({**content_of(small_gate()), "more": 1}, {"weight": torch.zeros(1), "bias": torch.zeros(1)}):
        write_gate(path, content)
        with pytest.raises(ValueError, match=r"is no gate file: it lacks \[.*\] and has unknown fields \["):
            Gate.load(path)


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    path = tmp_path / "gate.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2**20))
    with pytest.raises(ValueError, match="gate.pth is no whole gate file .its records claim to be far larger"):
        Gate.load(path)


def test_a_gate_chooses_the_largest_logit_and_the_smaller_exit_of_equals():
    gate = small_gate(weight=torch.tensor([[1.0, 0], [0, 1], [0, 1]]))
    assert gate.choose(torch.tensor([[2.0, 1], [1, 2], [1, 1]])).tolist() == [2, 4, 2]
    assert torch.equal(gate.logits(torch.tensor([[2.0, 1]])), torch.tensor([[2.0, 1, 1]]))


def test_what_is_no_gate_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="tools/train_gate.py"):
        Gate.load(tmp_path / "none.pth")
    torch.save({"model": {}}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="is not a gate file"):
        Gate.load(tmp_path / "model.pth")
    for changes, message in [
        ({"weight": torch.zeros(2, 2)}, "needs weight"),
        ({"bias": torch.zeros(2)}, "needs weight"),
        ({"bias": torch.tensor([0, math.nan, 0])}, "not finite"),
        ({"exits": (6, 4, 2)}, "increasing order"),
        ({"beta": -1.0}, "beta must be"),
        ({"loss": "mse"}, "unknown gate loss 'mse'"),
    ]:
        with pytest.raises(ValueError, match=message):
            small_gate(**changes)
