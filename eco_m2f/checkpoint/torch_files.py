"""Reads and checks files of torch.save: archives, and the older form from before PyTorch 1.6.

torch.load trusts the sizes and offsets in a file, and skips the archive's checksums. Here a damaged record is an error.
"""

import io
import os
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from .plain_pickle import Budget, PlainUnpickler
from .plain_values import NAMES, Storage, storage_size

MAX_INFLATION = 4  # torch.save does not compress, and compressed weights hardly shrink
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the older form


def check_records(archive: zipfile.ZipFile, size: int) -> None:
    """Compares an archive's table of contents with its size, without reading the records.

    Raises:
        ValueError: two records have the same name, or the records are far larger than the file (a zip bomb).
    """
    records = archive.infolist()
    if any(record.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for record in records):
        raise ValueError("its records are compressed in a way that torch.save does not know")  # possibly without limit
    if len({record.filename for record in records}) < len(records):
        raise ValueError("two of its records have the same name")
    if any(record.compress_size > size for record in records):  # zipfile would reserve that much
        raise ValueError("a record claims to be larger than the file")
    if sum(record.file_size for record in records) > MAX_INFLATION * size:
        raise ValueError("its records claim to be far larger than the file: torch.save does not compress them")


def check_checksums(path: str | os.PathLike) -> None:
    """Reads every record of an archive and compares it with its CRC-32.

    Raises:
        ValueError, zipfile.BadZipFile, OSError: it is no archive, or a record is damaged; it names the first one.
    """
    with zipfile.ZipFile(path) as archive:
        check_records(archive, os.path.getsize(path))
        for record in archive.infolist():
            archive.read(record)


def read_archive(path: str | os.PathLike) -> object:
    """The content of an archive as plain data. Every record that is read is compared with its CRC-32.

    Raises:
        RefusedName: it names something that is not plain data.
        ValueError, or an error of zipfile: it is malformed or damaged.
    """
    size = os.path.getsize(path)
    with zipfile.ZipFile(path) as archive:
        check_records(archive, size)
        root = _root(archive)
        if f"{root}byteorder" in archive.NameToInfo and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("it was written on a machine with another byte order")
        storages: dict[str, Storage] = {}

        def read(key: str, dtype: object, count: int) -> Storage:
            if key not in storages:
                storages[key] = Storage(dtype, bytearray(archive.read(f"{root}data/{key}")))
            return storages[key]

        data = io.BytesIO(archive.read(f"{root}data.pkl"))
        return PlainUnpickler(data, Budget(size), NAMES, _persistent_load(read)).load()


def _root(archive: zipfile.ZipFile) -> str:
    """The folder within the archive. It has the name that the file had when it was saved."""
    roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("it is an archive, but not one of torch.save")
    return roots[0]


def _persistent_load(read: Callable[[str, object, int], Storage]) -> Callable[[object], Storage]:
    """A function that makes the storage of a persistent id. A storage that is named again must be the same."""

    def load(key: object) -> Storage:
        if not isinstance(key, tuple) or len(key) not in (5, 6) or any(part is not None for part in key[5:]):
            raise ValueError("a storage in it is named in an unknown way")
        kind, dtype, name, _, count = key[:5]
        if kind != "storage" or not isinstance(name, str):
            raise ValueError("a storage in it is named in an unknown way")
        size = storage_size(dtype, count)
        storage = read(name, dtype, count)
        if storage.dtype != dtype or len(storage.content) != size:
            raise ValueError(f"the storage {ascii(name)[:40]} has another type or length than the file says")
        return storage

    return load


def read_legacy(stream: Any, size: int) -> object:
    """The content of a file in the older form, as plain data. It has no checksums, so damage may go unnoticed.

    Args:
        stream: the file's bytes, in memory or mapped.
        size: their number.

    Raises:
        RefusedName: it names something that is not plain data.
        ValueError or another error: it is malformed.
    """
    budget = Budget(size)
    header = [PlainUnpickler(stream, budget, {}).load() for _ in range(3)]
    if header[:2] != [MAGIC, PROTOCOL] or not isinstance(header[2], dict):
        raise ValueError("it is no file of torch.save")
    if header[2].get("little_endian") is not True:
        raise ValueError("it was written on a machine with another byte order")
    storages: dict[str, Storage] = {}

    def reserve(key: str, dtype: object, count: int) -> Storage:
        if key not in storages:
            length = storage_size(dtype, count)
            if length > size:
                raise ValueError(f"a storage in it claims to have {length} bytes, more than the file")
            budget.spend(length)
            storages[key] = Storage(dtype, bytearray(length))
        return storages[key]

    content = PlainUnpickler(stream, budget, NAMES, _persistent_load(reserve)).load()
    keys = PlainUnpickler(stream, budget, {}).load()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise ValueError("its list of storages is not that of its tensors")
    for key in keys:
        _fill(storages[str(key)], stream)
    return content


def _fill(storage: Storage, stream: Any) -> None:
    """Reads a storage's numbers, after their count."""
    (count,) = struct.unpack("<q", stream.read(8))
    if count != len(storage.flat):
        raise ValueError(f"a storage of {len(storage.flat)} numbers has {count} in the file")
    storage.fill(stream.read(len(storage.content)))


def storage_from_bytes(data: object) -> Storage:
    """Replaces torch.storage._load_from_bytes: a pickle holds a tensor's numbers as a whole file of torch.save."""
    if not isinstance(data, bytes | bytearray):
        raise ValueError("a storage in it is not written as bytes")
    storage = read_legacy(io.BytesIO(data), len(data))
    if not isinstance(storage, Storage):
        raise ValueError("the bytes of a storage in it hold something else")
    return storage
