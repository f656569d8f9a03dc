"""Copies of trees with one value changed, and reading of damaged files."""

from collections.abc import Callable, Iterator
from pathlib import Path


def outcome(read: Callable[[Path], object], path: Path, content: bytes, refusal: type[Exception] = ValueError):
    """The result of reading the content from this path, or None if it is refused. The error must name the path."""
    path.write_bytes(content)
    try:
        return read(path)
    except refusal as error:
        assert path.name in str(error), f"the message does not name the file: {error}"
        return None


VALUES = (None, True, -1, 0, 1.5, float("nan"), float("inf"), 2**70, "", "text", [], {}, [[]], {"a": [1]})


def other_values(tree: object) -> Iterator[object]:
    """Copies of a tree of dicts and lists. In each, one value is changed, removed or added."""
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
