"""Whether weights fit a model, and what differs where they do not."""

import re
from collections.abc import Mapping

import torch

from .errors import CheckpointError

EXIT_POLICY = "exit_policy."  # a gate is a file of its own, so a parent may lack it


SHOWN = 5  # names listed in a message before "..."


def check_fits(weights: Mapping[str, torch.Tensor], model: Mapping[str, torch.Tensor], source: str) -> None:
    """Every key and shape of the two state dicts must agree, those of the exit policy aside.

    Raises:
        CheckpointError: says what the checkpoint looks like instead, or lists the first keys that do not fit.
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
    """What the model will take must be dense, of its kind of number (any float for a float), and finite once it is.

    Raises:
        CheckpointError: lists the first keys of which this is not so.
    """
    taken = (k for k in model if k in weights and weights[k].shape == model[k].shape)
    faults = [f"{k}: {fault}" for k in taken if (fault := _fault(weights[k], model[k].dtype))]
    if faults:
        lines = [f"{source} holds values that no training leaves; take an earlier or another checkpoint."]
        raise CheckpointError("\n  ".join([*lines, *listing("not as in the model", faults)]))


def _fault(value: torch.Tensor, wanted: torch.dtype) -> str:
    """What keeps a tensor from being loaded as one of that type; "" where nothing does."""
    if value.is_meta or value.is_quantized or value.layout != torch.strided:
        return "it is a " + ("meta" if value.is_meta else "quantized" if value.is_quantized else "sparse") + " tensor"
    if _kind(value.dtype) != _kind(wanted):
        return f"{value.dtype} in the checkpoint, {wanted} in the model"
    try:
        taken = value.to(wanted)
    except NotImplementedError:  # such as two numbers in a byte
        return f"{value.dtype} in the checkpoint, of which PyTorch makes no {wanted}"
    broken = value.numel() - int(torch.isfinite(taken).sum())
    return f"{broken} of {value.numel()} values are NaN or infinite" if broken else ""


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "float" if dtype.is_floating_point else "bool" if dtype == torch.bool else "int"


def is_optional(key: str) -> bool:
    """BatchNorm's step counter is optional too: no result depends on it, and a frozen BatchNorm has none."""
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
    """What the names and shapes of a state dict tell of the model; what they do not tell is left out."""
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
    """Size along an axis of the first tensor whose name ends in the pattern; 0 where there is none."""
    shapes = (v.shape for k, v in state_dict.items() if re.search(rf"(^|\.){name}$", k))
    return next((shape[axis] for shape in shapes if len(shape) > axis), 0)


def _distinct(state_dict: Mapping[str, torch.Tensor], prefix: str) -> int:
    """How many different prefixes of that pattern the names have."""
    return len({match[0] for key in state_dict if (match := re.search(rf"(^|\.){prefix}", key))})


def _differences(found: dict[str, object], wanted: dict[str, object]) -> list[str]:
    lines = []
    if not found:
        lines.append("None of its names is Mask2Former's; convert it first, or check MODEL.WEIGHTS.")
    other = [
        f"{found[n]} vs {wanted[n]} {n}" for n in found if n in wanted and found[n] != wanted[n] and n != "classes"
    ]
    if other:
        lines.append(
            f"It looks like another architecture (checkpoint vs model): {', '.join(other)}. "
            "Use the config it was trained with."
        )
    classes, model_classes = found.get("classes"), wanted.get("classes")
    if classes and model_classes and classes != model_classes:
        lines.append(
            f"It has {classes} classes and the model {model_classes} (class_embed, empty_weight): set "
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES {classes} to evaluate it, or train it on the new classes first."
        )
    return lines
