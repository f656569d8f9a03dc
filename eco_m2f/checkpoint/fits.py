"""Checks whether weights fit a model, and describes the differences."""

import re
from collections.abc import Mapping

import torch

from .errors import CheckpointError

EXIT_POLICY = "exit_policy."  # a parent may lack it, because a gate has its own file
SHOWN = 5  # names listed in a message before "..."


def check_fits(weights: Mapping[str, torch.Tensor], model: Mapping[str, torch.Tensor], source: str) -> None:
    """Compares the keys and shapes of two state dicts, except those of the exit policy.

    Raises:
        CheckpointError: they differ. The message describes the checkpoint's model and lists the first such keys.
    """
    missing = [k for k in model if k not in weights and not is_optional(k)]
    unexpected = [k for k in weights if k not in model and not is_optional(k)]
    wrong = misshapen(weights, model)
    if not (missing or unexpected or wrong):
        return
    lines = [f"{source} does not fit the model."]
    lines += _differences(architecture(weights), architecture(model))
    lines += listing("missing in the checkpoint", missing)
    lines += listing("not in the model", unexpected)
    lines += listing("of another shape", wrong)
    raise CheckpointError("\n  ".join(lines))


def check_values(weights: Mapping[str, torch.Tensor], model: Mapping[str, torch.Tensor], source: str) -> None:
    """Checks the tensors that will be loaded. They must be dense, of the model's kind of number, and finite there.

    Raises:
        CheckpointError: lists the first keys with faults.
    """
    taken = (k for k in model if k in weights and weights[k].shape == model[k].shape)
    faults = [f"{k}: {fault}" for k in taken if (fault := _fault(weights[k], model[k].dtype))]
    if faults:
        lines = [f"{source} holds invalid values; use an earlier or another checkpoint."]
        raise CheckpointError("\n  ".join([*lines, *listing("not as in the model", faults)]))


def _fault(value: torch.Tensor, wanted: torch.dtype) -> str:
    """Why a tensor cannot be loaded as one of type `wanted`; "" if it can."""
    if value.is_meta or value.is_quantized or value.layout != torch.strided:
        return "it is a " + ("meta" if value.is_meta else "quantized" if value.is_quantized else "sparse") + " tensor"
    if _kind(value.dtype) != _kind(wanted):
        return f"{value.dtype} in the checkpoint, {wanted} in the model"
    try:
        taken = value.to(wanted)
    except NotImplementedError:  # such as two numbers in a byte
        return f"{value.dtype} in the checkpoint, but PyTorch cannot convert it to {wanted}"
    broken = value.numel() - int(torch.isfinite(taken).sum())
    return f"{broken} of {value.numel()} values are NaN or infinite" if broken else ""


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "float" if dtype.is_floating_point else "bool" if dtype == torch.bool else "int"


def is_optional(key: str) -> bool:
    """Whether a key may be missing: the exit policy's, and BatchNorm's step counter, which affects no result."""
    return key.startswith(EXIT_POLICY) or key.endswith(".num_batches_tracked")


def misshapen(weights: Mapping[str, torch.Tensor], model: Mapping[str, torch.Tensor]) -> list[str]:
    shared = (k for k in model if k in weights and not is_optional(k))
    pairs = ((k, tuple(weights[k].shape), tuple(model[k].shape)) for k in shared)
    return [f"{k}: {found} in the checkpoint, {wanted} in the model" for k, found, wanted in pairs if found != wanted]


def listing(title: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = [f"  ... and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return [f"{len(names)} {title}:", *(f"  {name}" for name in names[:SHOWN]), *more]


def architecture(state_dict: Mapping[str, torch.Tensor]) -> dict[str, object]:
    """Facts about a model that follow from the names and shapes of its state dict."""
    facts = {
        "backbone": _backbone(state_dict),
        "backbone width": _size(state_dict, r"backbone\.(stem\.conv1|patch_embed\.proj)\.weight", 0),
        "backbone blocks": _distinct(state_dict, r"backbone\.(res\d|(layers\.\d+\.)?blocks)\.\d+\."),
        "encoder layers": _distinct(state_dict, r"transformer\.encoder\.layers\.\d+\."),
        "decoder layers": _distinct(state_dict, r"(transformer_cross_attention_layers|decoder\.layers)\.\d+\."),
        "queries": _size(state_dict, r"query_(feat|embed)\.weight", 0),
        "hidden width": _size(state_dict, r"query_(feat|embed)\.weight", 1),
        "classes": max(_size(state_dict, r"class_embed\.weight", 0) - 1, 0),  # without "no object"
    }
    return {name: value for name, value in facts.items() if value}


def _backbone(state_dict: Mapping[str, torch.Tensor]) -> str:
    if "backbone.pos_embed" in state_dict:
        return "ViT"
    if "backbone.patch_embed.proj.weight" in state_dict:
        return "Swin"
    return "ResNet" if "backbone.stem.conv1.weight" in state_dict else ""


def _size(state_dict: Mapping[str, torch.Tensor], name: str, axis: int) -> int:
    """Size along an axis of the first tensor whose name ends in the pattern; 0 if there is none."""
    shapes = (v.shape for k, v in state_dict.items() if re.search(rf"(^|\.){name}$", k))
    return next((shape[axis] for shape in shapes if len(shape) > axis), 0)


def _distinct(state_dict: Mapping[str, torch.Tensor], prefix: str) -> int:
    """The number of different matches of the pattern in the names."""
    return len({match[0] for key in state_dict if (match := re.search(rf"(^|\.){prefix}", key))})


def _differences(found: dict[str, object], wanted: dict[str, object]) -> list[str]:
    lines = []
    if not found:
        lines.append("It has none of Mask2Former's names. Convert it first, or check MODEL.WEIGHTS.")
    other = [
        f"{found[n]} vs {wanted[n]} {n}" for n in found if n in wanted and found[n] != wanted[n] and n != "classes"
    ]
    if other:
        lines.append(
            f"It looks like another architecture (checkpoint vs model): {', '.join(other)}. "
            "Use the config that it was trained with."
        )
    classes, model_classes = found.get("classes"), wanted.get("classes")
    if classes and model_classes and classes != model_classes:
        lines.append(
            f"It has {classes} classes and the model {model_classes} (class_embed, empty_weight): set "
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES {classes} to evaluate it, or train it on the new classes first."
        )
    return lines
