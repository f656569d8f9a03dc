"""Reads config files safely: YAML without tags that run code, with `_BASE_`, and with limits of size.

When PyYAML's safe loader refuses a config, detectron2 takes the unsafe one, which runs any code in the file. Official
YAMLs do not need it: they hold numbers, strings, lists and mappings.
"""

import copy
import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

BASE = "_BASE_"
MAX_BYTES = 2**20  # a whole config, as training writes it, has about 10^4
MAX_NODES = 10**5  # each use of an anchor counted
MAX_DEPTH = 20
MAX_TEXT = 10_000  # characters of one value
MAX_FILES = 50  # in a chain of _BASE_
_SIMPLE = (str, bool, int, float, type(None))


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with tuples, which some configs have."""


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node)))


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """The keys and values of a config file, over those of its `_BASE_`.

    `_BASE_` is a local path or a list of paths, relative to the file that names it.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file or one of its bases is not a config. The message names the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"config file {str(path)!r} does not exist: see the folder configs/")
    return _with_bases(Path(path), (), [])


def _with_bases(path: Path, chain: tuple[Path, ...], opened: list[Path]) -> dict[str, Any]:
    """The config of a file. chain: the files that led to it. opened: all files opened so far."""
    real = path.resolve()
    if real in chain:
        raise ValueError(f"the config file {path} is its own {BASE}: {' -> '.join(p.name for p in (*chain, real))}")
    opened.append(real)
    label = f"{path} (the {BASE} of {chain[-1]})" if chain else str(path)
    if len(opened) > MAX_FILES:
        raise ValueError(f"the config file {chain[0]} has more than {MAX_FILES} files as its {BASE}")
    own = _read(path, label)
    bases = own.pop(BASE, [])
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        _merge(_with_bases(_base_path(base, path), (*chain, real), opened), merged, path)
    _merge(own, merged, path)
    return merged


def _base_path(base: object, path: Path) -> Path:
    if not isinstance(base, str) or "://" in base or not base:
        raise ValueError(f"the config file {path} has the {BASE} {base!r}: name a local file, and download it first")
    try:
        found = path.parent / Path(base).expanduser()
    except RuntimeError as error:
        raise ValueError(f"the config file {path} has the {BASE} {base!r}, a folder of an unknown user") from error
    if not found.is_file():
        state = "is a folder or a device" if found.exists() else "does not exist"
        raise ValueError(f"the config file {path} has the {BASE} {base!r}, but {found} {state}")
    return found


def _merge(new: Mapping[str, Any], into: dict[str, Any], path: Path, keys: str = "") -> None:
    """Merges `new` over `into`, mapping by mapping."""
    for key, value in new.items():
        if key in into and isinstance(value, dict) != isinstance(into[key], dict):
            raise ValueError(
                f"the config file {path}: {keys}{key} is a group of keys in one file and a value in another"
            )
        if key in into and isinstance(value, dict):
            _merge(value, into[key], path, f"{keys}{key}.")
        else:
            into[key] = value


def _read(path: Path, label: str) -> dict[str, Any]:
    """Reads and checks one file. label: its name in messages."""
    try:
        content = _parse(path)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OSError, RecursionError) as error:
        raise ValueError(f"the config file {label} cannot be used: {_reason(error)}") from error
    if not isinstance(content, dict) or not content:
        kind = "nothing" if content is None else "an empty mapping" if content == {} else f"a {type(content).__name__}"
        raise ValueError(f"the config file {label} holds {kind}, but KEY: value was expected; see configs/")
    return content


def _reason(error: Exception) -> str:
    """The message and the place of a YAML error. It quotes no text of the file, because `_BASE_` may name any file."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        what = ", ".join(part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part)
        return f"line {mark.line + 1}, column {mark.column + 1}: {what}"
    if isinstance(error, yaml.YAMLError | UnicodeDecodeError):
        return "it is not text, or has characters that YAML does not allow"
    return str(error) or type(error).__name__


def _parse(path: Path) -> Any:
    with open(path, "rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    return copy.deepcopy(_parsed(text))  # for the caller to change


@functools.lru_cache(maxsize=32)  # configs share their bases, and a process may read one several times
def _parsed(text: bytes) -> Any:
    loader = _Loader(text.decode("utf-8-sig"))
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node)
        return _checked(loader.construct_document(node))
    finally:
        loader.dispose()


def _check_nodes(root: yaml.Node) -> None:
    """Raises ValueError for a document that is large once its anchors are expanded, or that repeats a key."""
    count, rest = 0, [(root, 0)]
    while rest:
        node, depth = rest.pop()
        count += 1
        if count > MAX_NODES or depth > MAX_DEPTH:
            raise ValueError("it is nested too deeply, or its anchors make it too large")
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            rest.extend((part, depth + 1) for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            rest.extend((part, depth + 1) for part in node.value)


def _check_keys(node: yaml.MappingNode) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"line {line}: a key is not a word")
        if key.value in seen:
            raise ValueError(f"line {line}: the key {key.value[:80]!r} is already in line {seen[key.value]}")
        seen[key.value] = line


def _checked(value: Any, keys: str = "") -> Any:
    """Returns the value. Raises ValueError, naming the key, for anything that does not belong in a config."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{keys}{key!r} is not a word but a {type(key).__name__}")
            _checked(item, f"{keys}{key[:80]}.")
    elif isinstance(value, list | tuple):
        for item in value:
            _checked(item, keys)
    elif not isinstance(value, _SIMPLE):
        raise ValueError(f"{keys[:-1]} is a {type(value).__name__}: write it as text or number")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{keys[:-1]} is {value}: a config needs finite numbers")
    elif isinstance(value, str) and len(value) > MAX_TEXT:
        raise ValueError(f"{keys[:-1]} is a text of {len(value)} characters: at most {MAX_TEXT} are allowed")
    return value
