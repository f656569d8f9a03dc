"""Weights from untrusted files: archives of torch.save, its older form, safetensors, other frameworks."""

import io
import json
import pickle
import shutil
import struct
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from eco_m2f.checkpoint.safe_load import (
    CheckpointError,
    check_archive,
    read_checkpoint,
    read_plain,
    weights_sha256,
    write_weights,
)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
DTYPES += (torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128)
OLDER = {"_use_new_zipfile_serialization": False}


def every_kind() -> dict[str, torch.Tensor]:
    """Tensors of every type and of unusual layouts."""
    base = torch.arange(24).reshape(2, 3, 4)
    tensors = {str(dtype): base.to(dtype) for dtype in DTYPES}
    floats = base.float()
    views = {"view": floats[1, :, 1::2], "turned": floats.permute(2, 0, 1), "shared": floats}
    return {
        **tensors,
        **views,
        "number": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": nn.Parameter(floats),
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) and not a.requires_grad


@pytest.mark.parametrize("options", [{}, OLDER], ids=["archive", "older"])
@pytest.mark.parametrize("name", ["m.pth", "m.pt"])
def test_tensors_of_every_kind(tmp_path, options, name):
    torch.save({"model": every_kind()}, tmp_path / name, **options)
    found = read_checkpoint(tmp_path / name)["model"]
    expected = every_kind()
    assert found.keys() == expected.keys()
    assert all(same(found[key], expected[key].detach()) for key in expected)
    found["view"].add_(1)  # they have their own writable memory; views stay views
    assert found["shared"][1, 0, 1] == expected["shared"][1, 0, 1] + 1


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_tensors_in_a_bare_pickle(tmp_path, protocol):
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"model": every_kind()}, protocol=protocol))
    found, expected = read_checkpoint(tmp_path / "m.pkl")["model"], every_kind()
    assert all(same(found[key], expected[key].detach()) for key in expected)


@pytest.mark.parametrize("options", [{}, OLDER], ids=["archive", "older"])
def test_the_state_of_a_training(tmp_path, options):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    model(torch.ones(4, 2)).square().sum().backward()
    optimizer.step()
    scheduler.step()
    state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "lr": np.float64(0.1)}
    state |= {"device": torch.device("cuda", 1), "dtype": torch.float16, "size": torch.zeros(2, 3).shape}
    torch.save({"model": model.state_dict(), **state}, tmp_path / "m.pth", **options)
    found = read_checkpoint(tmp_path / "m.pth")
    assert weights_sha256(found["model"]) == weights_sha256(model.state_dict())
    assert found["scheduler"] == state["scheduler"] and isinstance(found["scheduler"]["milestones"], Counter)
    assert found["lr"] == 0.1 and found["dtype"] == torch.float16 and found["size"] == (2, 3)
    assert found["device"] == "cuda:1"
    other = torch.optim.AdamW(model.parameters())
    other.load_state_dict(found["optimizer"])
    assert str(other.state_dict()) == str(optimizer.state_dict())


def rewrite(path, change, **options) -> None:
    """Writes an archive with changed records. change(name, content) -> content, or None to leave the record out."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in records.items():
            if (new := change(name, content)) is not None:
                archive.writestr(name, new)


@pytest.fixture
def saved(tmp_path):
    torch.save({"model": {"a": torch.arange(64.0), "b": torch.ones(3)}}, tmp_path / "m.pth")
    return tmp_path / "m.pth"


def test_an_archive_that_is_whole_passes(saved):
    check_archive(saved)


def test_a_flipped_bit_is_reported_with_its_record(saved):
    content = bytearray(saved.read_bytes())
    content[content.index(struct.pack("<f", 40.0))] ^= 1
    saved.write_bytes(content)
    for read in (check_archive, read_checkpoint):
        with pytest.raises(CheckpointError, match=r"m\.pth .*Bad CRC-32 for file 'm/data/0'.*damaged"):
            read(saved)


def test_an_archive_without_its_end_is_recognised(saved):
    saved.write_bytes(saved.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match=r"m\.pth .*the end is missing\): it may be truncated"):
        read_checkpoint(saved)


def test_what_is_no_archive_does_not_pass(tmp_path):
    (tmp_path / "m.pth").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(CheckpointError, match=r"m\.pth .*not a zip file"):
        check_archive(tmp_path / "m.pth")


HARMS = {
    "a storage too short": (lambda name, data: data[:-4] if name.endswith("data/0") else data, "type or length"),
    "a storage too long": (lambda name, data: data + b"1234" if name.endswith("data/0") else data, "type or length"),
    "a storage that ends within a number": (lambda n, data: data[:-1] if n.endswith("data/0") else data, "within a nu"),
    "no storage": (lambda name, data: None if name.endswith("data/0") else data, "data/0"),
    "no pickle": (lambda name, data: None if name.endswith("data.pkl") else data, "not one of torch.save"),
    "big endian": (lambda name, data: b"big" if name.endswith("byteorder") else data, "byte order"),
}


@pytest.mark.parametrize("name", HARMS)
def test_an_archive_that_contradicts_itself_is_refused(saved, name):
    change, reason = HARMS[name]
    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=rf"m\.pth .*{reason}"):
        read_checkpoint(saved)


def test_an_archive_that_inflates_is_refused(saved):
    """A zip bomb: its records are larger than the file."""
    bomb = lambda name, data: b"\x00" * 10**7 if name.endswith("data/1") else data  # noqa: E731
    rewrite(saved, bomb, compression=zipfile.ZIP_DEFLATED)
    assert saved.stat().st_size < 50_000
    with pytest.raises(CheckpointError, match=r"m\.pth .*far larger than the file"):
        read_checkpoint(saved)


def test_compression_whose_output_has_no_bound_is_refused(saved):
    rewrite(saved, lambda name, data: data, compression=zipfile.ZIP_BZIP2)
    with pytest.raises(CheckpointError, match=r"m\.pth .*torch.save does not know"):
        read_checkpoint(saved)


def test_a_compressed_archive_is_read_if_it_is_no_bomb(tmp_path):
    weights = {"a": torch.randn(1000)}
    torch.save({"model": weights}, tmp_path / "m.pth")
    rewrite(tmp_path / "m.pth", lambda name, data: data, compression=zipfile.ZIP_DEFLATED)
    assert torch.equal(read_checkpoint(tmp_path / "m.pth")["model"]["a"], weights["a"])


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_record_that_says_to_be_larger_than_the_file_is_refused_unread(saved):
    content = bytearray(saved.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 20 : entry + 24] = struct.pack(
        "<I", 2**31
    )  # its compressed size, for which zipfile reserves memory
    saved.write_bytes(content)
    with pytest.raises(CheckpointError, match="a record claims to be larger than the file"):
        check_archive(saved)


def test_two_records_of_one_name_are_refused(saved):
    with zipfile.ZipFile(saved, "a") as archive:
        archive.writestr("m/data/0", b"\x00" * 256)
    with pytest.raises(CheckpointError, match=r"m\.pth .*same name"):
        read_checkpoint(saved)


def crafted(path, offset=0, size=(4,), stride=(1,), count=4, dtype="FloatStorage", name="0"):
    """An archive with one tensor of 4 floats, or with other metadata."""

    class Name:
        def __init__(self, module, name):
            self.module, self.name = module, name

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj):
            return ("storage", Name("torch", dtype), name, "cpu", count) if obj == "the storage" else None

        def save(self, obj, *args, **kwargs):
            if isinstance(obj, Name):
                self.write(f"c{obj.module}\n{obj.name}\n".encode())
            else:
                super().save(obj, *args, **kwargs)

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, ("the storage", offset, size, stride, False, OrderedDict())

    with zipfile.ZipFile(path, "w") as archive, archive.open("m/data.pkl", "w") as file:
        Pickler(file, protocol=2).dump({"model": {"a": Tensor()}})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("m/data/0", struct.pack("<4f", 1, 2, 3, 4))
    return path


def test_a_crafted_tensor_is_read(tmp_path):
    path = crafted(tmp_path / "m.pth", offset=1, size=(2, 1), stride=(2, 9))
    assert read_checkpoint(path)["model"]["a"].tolist() == [[2], [4]]


REACHES = {
    "offset": {"offset": 1},
    "negative offset": {"offset": -1},
    "far offset": {"offset": 2**61},
    "offset of nothing": {"offset": 5, "size": (0,)},
    "size": {"size": (5,)},
    "negative size": {"size": (-1,)},
    "stride": {"size": (2, 2), "stride": (3, 1)},
    "negative stride": {"stride": (-1,)},
    "product that wraps round": {"size": (2**32, 2**32), "stride": (0, 0)},
    "repetition": {"size": (1000,), "stride": (0,)},
    "no strides": {"stride": ()},
    "many axes": {"size": (1,) * 100, "stride": (1,) * 100},
    "float as size": {"size": (4.0,)},
    "storage longer than its record": {"count": 5},
    "storage of a negative length": {"count": -1},
    "storage of another type": {"dtype": "DoubleStorage"},
    "quantized": {"dtype": "QInt8Storage"},
    "unknown storage": {"name": "1"},
    "storage elsewhere": {"name": "../data.pkl"},
}


@pytest.mark.parametrize("name", REACHES)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"m\.pth"):
        read_checkpoint(crafted(tmp_path / "m.pth", **REACHES[name]))


def test_an_older_file_that_declares_more_than_it_has_is_refused(tmp_path):
    path = tmp_path / "m.pth"
    torch.save({"a": torch.ones(1000)}, path, **OLDER)
    content = path.read_bytes()
    assert content.count(struct.pack("<H", 1000)) == 3  # of the storage, of the tensor, and before the numbers
    path.write_bytes(content.replace(b"M" + struct.pack("<H", 1000), b"J" + struct.pack("<i", 2**31 - 1)))
    with pytest.raises(CheckpointError, match=r"m\.pth .*more than the file"):
        read_checkpoint(path)
    path.write_bytes(content.replace(struct.pack("<q", 1000), struct.pack("<q", 999)))
    with pytest.raises(CheckpointError, match=r"m\.pth .*1000 numbers has 999"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore")
def test_a_pickles_storage_is_a_storage(tmp_path):
    buffer = io.BytesIO()
    torch.save(["no storage"], buffer, **OLDER)

    class Attack:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (buffer.getvalue(),)

    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"model": {"a": Attack()}}))
    with pytest.raises(CheckpointError, match=r"m\.pkl .*hold something else"):
        read_checkpoint(tmp_path / "m.pkl")


def test_a_thousand_views_of_one_storage_are_refused(tmp_path):
    base = torch.zeros(100_000)
    torch.save({str(i): base.view(-1) for i in range(1000)}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"m\.pth .*far more memory than its own size"):
        read_checkpoint(tmp_path / "m.pth")


def test_the_hostile_cases_are_refused(shared, tmp_path):
    """Such files made a reader that called numpy crash or run forever."""
    cases = sorted((shared / "cases" / "hostile").glob("numpy_object__*"))
    assert cases
    for case in [*cases, shared / "cases" / "hostile" / "bitflip.pth"]:
        copy = shutil.copy(case, tmp_path)
        with pytest.raises(CheckpointError, match=case.name):
            read_checkpoint(copy)


def test_safetensors_are_read_and_written(tmp_path):
    expected = {name: value.detach() for name, value in every_kind().items() if not value.is_complex()}
    path = tmp_path / "m.safetensors"
    write_weights(path, expected, __author__="third_party", matching_heuristics="True", note="kept in the file alone")
    found = read_checkpoint(path)
    assert all(same(found["model"][name], value) for name, value in expected.items())
    assert {k: v for k, v in found.items() if k != "model"} == {
        "__author__": "third_party",
        "matching_heuristics": True,
    }
    assert list(tmp_path.iterdir()) == [path]


def test_safetensors_of_others_have_no_sha256(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3)}, tmp_path / "m.safetensors")
    assert read_checkpoint(tmp_path / "m.safetensors").keys() == {"model"}


def test_changed_safetensors_are_damaged(tmp_path):
    path = tmp_path / "m.safetensors"
    write_weights(path, {"a": torch.arange(5.0)})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m\.safetensors is damaged.*sha256"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8 + b"{}", b"\x02\x00\x00\x00\x00\x00\x00\x00{}", b"<html></html>"])
def test_what_is_no_safetensors_is_refused(tmp_path, content):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        read_checkpoint(tmp_path / "m.safetensors")


def test_a_name_that_safetensors_hold_twice_is_refused(tmp_path):
    header = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}'
    )
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CheckpointError, match="w.safetensors .*its header holds a name twice"):
        read_checkpoint(tmp_path / "w.safetensors")


def test_a_tensor_beyond_the_end_of_safetensors_is_refused(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\x00" * 16)
    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        read_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "model_state", "model_ema"])
def test_a_state_dict_is_found_under_its_usual_names(tmp_path, key):
    torch.save({"epoch": 3, key: {"a": torch.ones(2)}}, tmp_path / "m.pth")
    found = read_checkpoint(tmp_path / "m.pth")
    assert found["model"]["a"].tolist() == [1, 1] and found["epoch"] == 3


def test_the_weights_come_before_their_average(tmp_path):
    torch.save({"model_ema": {"a": torch.zeros(1)}, "state_dict": {"a": torch.ones(1)}}, tmp_path / "m.pth")
    assert read_checkpoint(tmp_path / "m.pth")["model"]["a"] == 1


FOREIGN = {
    "Mask2Former": ({"state_dict": {"panoptic_head.query_feat.weight": torch.ones(1)}}, "mmdetection (panoptic_head."),
    "DETR": ({"meta": {}, "state_dict": {"module.bbox_head.fc_cls.weight": torch.ones(1)}}, "mmdetection"),
    "meta": ({"meta": {"mmdet_version": "3.3.0"}, "state_dict": {"x": torch.ones(1)}}, "mmdetection (its meta"),
    "segmentor": ({"state_dict": {"decode_head.conv_seg.weight": torch.ones(1)}}, "mmsegmentation"),
    "hf": ({"model.pixel_level_module.encoder.a": torch.ones(1)}, "Hugging Face transformers"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_checkpoints_of_other_frameworks_are_refused_by_name(tmp_path, name):
    content, sign = FOREIGN[name]
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(tmp_path / "m.pth")
    assert f"m.pth is a checkpoint of {sign}" in str(error.value) and "other names" in str(error.value)


def test_a_class_of_openmmlab_tells_whose_file_it_is(tmp_path):
    (tmp_path / "m.pkl").write_bytes(b"\x80\x02cmmengine.logging.history_buffer\nHistoryBuffer\n.")
    with pytest.raises(CheckpointError, match=r"m\.pkl is a checkpoint of OpenMMLab \(mmengine\.logging"):
        read_plain(tmp_path / "m.pkl")
