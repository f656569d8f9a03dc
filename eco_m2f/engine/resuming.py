"""Compares the settings of a resumed training with those it was started with."""

import logging
from collections.abc import Mapping
from pathlib import Path

import yaml

from ..config import leaves, without_idle

logger = logging.getLogger(__name__)
SECTIONS = ("MODEL", "INPUT", "DATASETS", "SOLVER", "SEED")  # what the weights depend on
ABSENT = "absent"


def settings_before(output_dir: str, batch: int) -> dict | None:
    """The config of the run that `--resume` continues, which detectron2 wrote into the run's folder.

    batch: SOLVER.IMS_PER_BATCH of the new run. Returns None if there is no run to continue. Call it before the new run
    writes its own config. Raises ValueError if the earlier run accumulated gradients over another number of images.
    """
    path = Path(output_dir) / "config.yaml"
    if not (path.is_file() and (path.parent / "last_checkpoint").is_file()):
        return None
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.warning("%s cannot be read (%s): changed settings will not be reported", path, error)
        return None
    return _without_accumulation(settings, path, batch) if isinstance(settings, dict) else None


def _without_accumulation(settings: dict, path: Path, batch: int) -> dict:
    """The settings in today's keys. In earlier versions a step took ACCUMULATION_STEPS batches of IMS_PER_BATCH."""
    settings = without_idle(settings)
    steps, images = (leaves(settings).get(f"SOLVER.{key}") for key in ("ACCUMULATION_STEPS", "IMS_PER_BATCH"))
    if not (isinstance(steps, int) and isinstance(images, int)):
        return settings
    before = steps * images
    if before != batch:
        raise ValueError(
            f"the run in {path.parent} was started with SOLVER.ACCUMULATION_STEPS {steps} and IMS_PER_BATCH {images}, "
            f"but SOLVER.IMS_PER_BATCH is now {batch}. To continue, set SOLVER.IMS_PER_BATCH {before}, and "
            "SOLVER.IMS_PER_GPU to the images that a GPU takes at once"
        )
    rest = {key: value for key, value in settings["SOLVER"].items() if key != "ACCUMULATION_STEPS"}
    return {**settings, "SOLVER": {**rest, "IMS_PER_BATCH": before}}


def warn_of_changes(before: Mapping, now: Mapping) -> None:
    """Logs a warning for every setting that differs: key, old value, new value."""
    for key, old, new in changed_settings(before, now):
        logger.warning("--resume continues with another setting: %s was %r, and is now %r", key, old, new)


def changed_settings(before: Mapping, now: Mapping) -> list[tuple[str, object, object]]:
    """(dotted key, old value, new value) of each difference in `SECTIONS`, sorted. Both configs are plain YAML."""
    old, new = leaves(before), leaves(now)
    keys = sorted(k for k in old.keys() | new.keys() if k.split(".")[0] in SECTIONS)
    pairs = ((key, old.get(key, ABSENT), new.get(key, ABSENT)) for key in keys)
    return [(key, a, b) for key, a, b in pairs if a != b]
