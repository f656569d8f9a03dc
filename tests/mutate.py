"""Trees of values in which one is another, and what reading a damaged file comes to."""

from collections.abc import Callable, Iterator
from pathlib import Path


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
