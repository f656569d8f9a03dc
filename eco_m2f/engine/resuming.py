"""Whether a training goes on with other settings than it was begun with."""

import logging
from collections.abc import Mapping
from pathlib import Path

import yaml

from ..config import leaves

logger = logging.getLogger(__name__)
SECTIONS = ("MODEL", "INPUT", "DATASETS", "SOLVER", "SEED")  # what the weights depend on
ABSENT = "not there"


def settings_before(output_dir: str) -> dict | None:
    """The config of the run that `--resume` goes on from, as detectron2 wrote it into its folder.

    None where there is nothing to go on from. To be called before the new run writes its own.
    """
    path = Path(output_dir) / "config.yaml"
    if not (path.is_file() and (path.parent / "last_checkpoint").is_file()):
        return None
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.warning("%s cannot be read (%s): whether settings have changed is not known", path, error)
        return None
    return settings if isinstance(settings, dict) else None


def warn_of_changes(before: Mapping, now: Mapping) -> None:
    """A warning for every setting that differs: its key, the value before and the value now."""
    for key, old, new in changed_settings(before, now):
        logger.warning("--resume goes on with another setting: %s was %r, and is %r from here on", key, old, new)


def changed_settings(before: Mapping, now: Mapping) -> list[tuple[str, object, object]]:
    """(dotted key, old value, new value) of each that differs in `SECTIONS`, sorted; both configs as plain YAML."""
    old, new = leaves(before), leaves(now)
    keys = sorted(k for k in old.keys() | new.keys() if k.split(".")[0] in SECTIONS)
    pairs = ((key, old.get(key, ABSENT), new.get(key, ABSENT)) for key in keys)
    return [(key, a, b) for key, a, b in pairs if a != b]
