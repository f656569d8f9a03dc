"""Checkpoints: safe to open, strict where a missing tensor would falsify a result, and written whole.

`Checkpointer` replaces detectron2's DetectionCheckpointer. It differs from it as follows:

- A file cannot run code. A pickle may hold only arrays and builtin containers. A damaged archive is refused.
- Official Mask2Former checkpoints load under their current and their legacy names (`upgrade_keys`).
- Values are checked before the model changes: they must be dense, finite and of the model's kind (`check_values`).
- For evaluation every key must fit (`check_fits`). For training from other weights, it reports what does not fit. If no
  tensor of the backbone fits, it is an error.
- Weights with matching heuristics are matched only with the backbone. So the last `norm.weight` of an ImageNet model
  cannot get into a head of the same width.
- A checkpoint is written whole or not at all, and `last_checkpoint` only after it.
"""

import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.utils.file_io import PathManager

from ..data.categories import check_same_classes
from ..data.classes import check_stored
from ..files import atomic_write, remove_leftovers
from .errors import CheckpointError
from .fits import architecture, check_fits, check_values, is_optional, listing, misshapen
from .names import upgrade_keys
from .safe_load import check_archive, read_checkpoint

logger = logging.getLogger(__name__)


class Checkpointer(DetectionCheckpointer):
    """Loads and saves a model with its checkpointables (the trainer), in a local folder."""

    def load(self, path: str, checkpointables: list[str] | None = None, *, strict: bool = False) -> dict:
        """Loads weights from a path or URL. An empty path leaves the model unchanged.

        Args:
            checkpointables: the names to load besides the model. None: all that the file holds.
            strict: every key must fit, as for evaluation and resuming. Otherwise tensors that do not fit are reported
                and keep their initial values, as for training from other weights.

        Returns:
            the rest of the file, such as the iteration.

        Raises:
            FileNotFoundError, CheckpointError: the model is still unchanged.
        """
        if not path:
            logger.info("no checkpoint given; the model keeps its initial weights")
            return {}
        logger.info("loading %s", path)
        file, heuristics = self._fetch(path)
        checkpoint = read_checkpoint(file)
        if heuristics:
            checkpoint["matching_heuristics"] = True
        names = list(self.checkpointables) if checkpointables is None else checkpointables
        absent = [name for name in names if name not in checkpoint]
        if strict and absent:
            raise CheckpointError(
                f"{path} holds no state of {', '.join(absent)}. It has only weights, so no training can resume from it"
            )
        classes = self._check_classes(checkpoint.pop("classes", None), path, strict)
        self._load_weights(checkpoint, path, strict)
        if strict and classes:
            self.model.set_classes(classes)
        for name in (name for name in names if name in checkpoint):
            self._load_state(name, checkpoint.pop(name), path)
        return checkpoint

    def load_for_evaluation(self, path: str) -> dict:
        """Loads a whole model strictly, without its training state.

        Raises:
            CheckpointError: the path is empty, because a result of random weights means nothing; or see `load`.
        """
        if not path:
            raise CheckpointError("MODEL.WEIGHTS is empty: evaluation needs a checkpoint (MODEL.WEIGHTS model.pth)")
        return self.load(path, checkpointables=[], strict=True)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """Resumes from the newest checkpoint in `save_dir`. Without one or without `resume`, loads weights from path.

        It also removes the unfinished files of killed runs in `save_dir`.

        Raises:
            CheckpointError: the file named by `last_checkpoint` is missing, damaged or has no training state.
        """
        if self.save_dir and self.save_to_disk:
            remove_leftovers(self.save_dir)
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        return self.load(str(self._check_resumable()), strict=True)

    def save(self, name: str, **extra) -> None:
        """Writes model, checkpointables and extra to `name`.pth in `save_dir`, whole or not at all.

        Raises:
            ValueError: the name contains a folder.
            OSError, RuntimeError: writing failed, such as on a full disk. Older checkpoints are unchanged.
        """
        if not (self.save_dir and self.save_to_disk):
            return
        file = f"{name}.pth"
        if os.path.basename(file) != file:
            raise ValueError(
                f"checkpoint name {name!r} contains a folder: use a bare name, the folder is {self.save_dir}"
            )
        data = {"model": self.model.state_dict()}
        data |= {key: item.state_dict() for key, item in self.checkpointables.items()}
        if getattr(self.model, "classes", None):
            data["classes"] = self.model.classes
        logger.info("saving %s", os.path.join(self.save_dir, file))
        with atomic_write(os.path.join(self.save_dir, file)) as handle:
            torch.save(data | extra, handle)
        self.tag_last_checkpoint(file)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Records the checkpoint from which `resume_or_load` resumes."""
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint"), "w") as handle:
            handle.write(last_filename_basename)

    def _fetch(self, path: str) -> tuple[str, bool]:
        """The local file of a path or URL, and whether the path ended in `?matching_heuristics=True`."""
        bare = path.removesuffix("?matching_heuristics=True")
        try:
            return PathManager.get_local_path(bare), bare != path
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be fetched ({error}): download it in another way, and set MODEL.WEIGHTS to the file"
            ) from error

    def _check_classes(self, classes: object, source: str, strict: bool) -> list[dict] | None:
        """The checkpoint's classes, if it has any. They must be the model's, or class i would mean something else.

        Raises:
            CheckpointError: they are not the model's. Training from other weights (not `strict`) may change the
                classes, so this is only logged then.
        """
        if classes is None or not hasattr(self.model, "set_classes"):
            return None
        try:
            stored = check_stored(classes, source)
            if self.model.classes:
                check_same_classes(stored, self.model.classes, f"the checkpoint {source}", "the dataset of the config")
            count = architecture(self.model.state_dict()).get("classes", len(stored))
            if count != len(stored):
                raise ValueError(
                    f"{source} holds {len(stored)} classes and the model has {count}: set "
                    f"MODEL.SEM_SEG_HEAD.NUM_CLASSES to {len(stored)}"
                )
        except ValueError as error:
            if strict:
                raise CheckpointError(
                    f"{error}. Set DATASETS.TRAIN to the dataset that the model was trained on, or to () to use the "
                    "classes of the checkpoint"
                ) from error
            logger.warning("%s; only the weights with matching shapes are loaded", error)
            return None
        return stored

    def _load_weights(self, checkpoint: dict, source: str, strict: bool) -> None:
        """Renames and checks the weights, and only then copies them into the model."""
        model = self.model.state_dict()
        weights = upgrade_keys(checkpoint.pop("model"))
        if checkpoint.pop("matching_heuristics", False) is True:
            weights = _matched(weights, _backbone_part(model), checkpoint.get("__author__") == "Caffe2", source)
        if strict:
            check_fits(weights, model, source)
        else:
            _report(weights, model, source)
        check_values(weights, model, source)
        fitting = {k: v for k, v in weights.items() if k in model and v.shape == model[k].shape}
        self.model.load_state_dict(fitting, strict=False)

    def _load_state(self, name: str, state: object, source: str) -> None:
        """Loads the state of a checkpointable. Any error becomes a CheckpointError."""
        try:
            self.checkpointables[name].load_state_dict(state)
        except Exception as error:
            raise CheckpointError(
                f"the state of {name} in {source} does not fit this run ({type(error).__name__}: {error}). Resume with "
                "the config it was saved with, or start again from its weights, without --resume"
            ) from error

    def _check_resumable(self) -> Path:
        """The file that `last_checkpoint` names. Raises CheckpointError if a record of it fails its checksum."""
        note = Path(self.save_dir, "last_checkpoint")
        try:
            last = Path(self.get_checkpoint_file())
        except ValueError as error:
            raise CheckpointError(f"{note} holds no file name ({error}): write a checkpoint's name into it") from error
        fault = _damage(last)
        if not fault:
            return last
        others = sorted(Path(self.save_dir).glob("*.pth"), key=lambda p: p.stat().st_mtime, reverse=True)
        newest = next((p for p in others if p != last and not _damage(p)), None)
        remedy = (
            f"to resume from {newest.name}, the newest whole one, write that name into it" if newest else "start again"
        )
        raise CheckpointError(f"{note} names {last.name}, but that {fault}; {remedy}")


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint that was written here; "" if nothing is."""
    if not path.is_file():
        return "does not exist"
    try:
        if not zipfile.is_zipfile(path):  # an archive's index is at its end
            return f"is truncated ({path.stat().st_size} bytes)"
        check_archive(path)
    except CheckpointError as error:
        return f"is damaged: {error.__cause__}"
    except zipfile.BadZipFile as error:  # from is_zipfile: the end of the index is damaged
        return f"is damaged: {error}"
    return ""


def _matched(weights: dict, backbone: dict[str, torch.Tensor], caffe2: bool, source: str) -> dict[str, torch.Tensor]:
    """The weights, renamed to the backbone's names by detectron2's heuristics."""
    try:
        return align_and_update_state_dicts(backbone, weights, c2_conversion=caffe2)
    except Exception as error:  # it expects the weights of a backbone
        raise CheckpointError(
            f"the names in {source} cannot be matched with the backbone's ({type(error).__name__}: {error}). Is it for "
            "another backbone?"
        ) from error


def _backbone_part(model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The backbone's entries of a model's state dict; all entries if no key names a backbone."""
    return {k: v for k, v in model.items() if "backbone" in k.split(".")} or model


def _report(weights: Mapping[str, torch.Tensor], model: dict[str, torch.Tensor], source: str) -> None:
    """Logs what fits and what does not.

    Raises:
        CheckpointError: no tensor of the backbone fits.
    """
    backbone = _backbone_part(model)
    fitting = [k for k in model if k in weights and weights[k].shape == model[k].shape]
    matched = [k for k in fitting if k in backbone]
    if not matched:
        raise CheckpointError(
            f"none of the {len(weights)} tensors of {source} (such as {', '.join(sorted(weights)[:3])}) fits any of "
            f"the backbone's {len(backbone)} (such as {', '.join(sorted(backbone)[:3])}). Is it for another backbone?"
        )
    others = f"{len(fitting) - len(matched)} of {len(model) - len(backbone)} others"
    logger.info("%s: %d of %d backbone tensors and %s loaded", source, len(matched), len(backbone), others)
    initial = [k for k in backbone if k not in set(matched) and not is_optional(k)]
    lines = listing("backbone tensors keep their initial values", initial)
    lines += listing("left out, because their shapes differ", misshapen(weights, model))
    if lines:
        logger.warning("\n  ".join([f"{source} fits only in part:", *lines]))
