"""Damage to files, for tests of what reads them. The environment variable ECO_M2F_FUZZ=<factor> makes more of it."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

FACTOR = float(os.environ.get("ECO_M2F_FUZZ", "1"))


def damaged(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Damaged copies, `count` times the factor: bits flipped, parts cut, doubled or overwritten, ends cut off."""
    random_numbers = random.Random(seed)
    for i in range(round(count * FACTOR)):
        kind = DAMAGE[i % len(DAMAGE)]
        yield kind(bytearray(content), random_numbers)


def _flip(data: bytearray, numbers: random.Random, times: int = 1) -> bytes:
    for _ in range(times):
        data[numbers.randrange(len(data))] ^= 1 << numbers.randrange(8)
    return bytes(data)


def _flip_many(data: bytearray, numbers: random.Random) -> bytes:
    return _flip(data, numbers, numbers.randrange(2, 20))


def _truncate(data: bytearray, numbers: random.Random) -> bytes:
    return bytes(data[: numbers.randrange(len(data))])


def _part(data: bytearray, numbers: random.Random) -> tuple[int, int]:
    first = numbers.randrange(len(data))
    return first, min(len(data), first + numbers.randrange(1, 64))


def _cut(data: bytearray, numbers: random.Random) -> bytes:
    first, last = _part(data, numbers)
    return bytes(data[:first] + data[last:])


def _double(data: bytearray, numbers: random.Random) -> bytes:
    first, last = _part(data, numbers)
    return bytes(data[:last] + data[first:])


def _overwrite(data: bytearray, numbers: random.Random) -> bytes:
    first, last = _part(data, numbers)
    return bytes(data[:first] + numbers.randbytes(last - first) + data[last:])


DAMAGE = (_flip, _flip, _flip_many, _truncate, _cut, _double, _overwrite)


def outcome(read: Callable[[Path], object], path: Path, content: bytes, refusal: type[Exception] = ValueError):
    """What reading the content from that path gives; None where it is refused, which must be by an error naming it."""
    path.write_bytes(content)
    try:
        return read(path)
    except refusal as error:
        assert path.name in str(error), f"the message does not name the file: {error}"
        return None


VALUES = (None, True, -1, 0, 1.5, float("nan"), float("inf"), 2**70, "", "text", [], {}, [[]], {"a": [1]})


def other_values(tree: object) -> Iterator[object]:
    """Copies of a tree of dicts and lists, in each of which one value is another, is gone, or is added."""
    if isinstance(tree, dict):
        yield {**tree, "unknown": 1}
        for key, value in tree.items():
            yield {k: v for k, v in tree.items() if k != key}
            yield from ({**tree, key: other} for other in (*VALUES, *other_values(value)))
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            yield tree[:i] + tree[i + 1 :]
            yield tree[: i + 1] + tree[i:]
            yield from ([*tree[:i], other, *tree[i + 1 :]] for other in other_values(value))
