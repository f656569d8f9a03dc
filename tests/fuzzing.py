"""Damages files for tests of readers: flipped bits, cuts, doubled and exchanged pieces, the same for a seed.

ECO_M2F_FUZZ=20 tries twenty times as much.
"""

import os
import random
from collections.abc import Iterator


def tries(count: int) -> int:
    """The number of tries, multiplied by ECO_M2F_FUZZ."""
    return int(count * float(os.environ.get("ECO_M2F_FUZZ", "1")))


def damaged(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` damaged copies of a file's content, all different from it."""
    rng = random.Random(seed)
    made = 0
    while made < count:
        copy = bytes(rng.choice(_DAMAGE)(bytearray(content), rng))
        if copy != content:
            made += 1
            yield copy


def _flip(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _overwrite(data: bytearray, rng: random.Random) -> bytearray:
    start, size = rng.randrange(len(data)), rng.choice((1, 2, 4, 8))
    data[start : start + size] = rng.choice((b"\x00", b"\xff", b"\x7f", rng.randbytes(1))) * size
    return data[: len(data)]


def _cut(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.randrange(len(data))]


def _move(data: bytearray, rng: random.Random) -> bytearray:
    """Removes, doubles or moves a piece."""
    start, target, size = rng.randrange(len(data)), rng.randrange(len(data)), rng.choice((1, 3, 16, 64))
    piece = data[start : start + size]
    if rng.random() < 0.5:
        del data[start : start + size]
    return data[:target] + piece + data[target:] if rng.random() < 0.7 else data


_DAMAGE = (_flip, _flip, _overwrite, _cut, _move)
