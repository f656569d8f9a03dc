"""The optimizer with Mask2Former's parameter groups, gradient clipping and mixed precision."""

from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import reduce_param_groups
from torch import nn


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD with Mask2Former's parameter groups. Gradients are clipped before each step."""
    kinds = {"ADAMW": torch.optim.AdamW, "SGD": torch.optim.SGD}
    if cfg.SOLVER.OPTIMIZER not in kinds:
        raise ValueError(f"SOLVER.OPTIMIZER {cfg.SOLVER.OPTIMIZER!r} is unknown: choose one of {sorted(kinds)}")
    options = {"momentum": cfg.SOLVER.MOMENTUM} if cfg.SOLVER.OPTIMIZER == "SGD" else {}
    optimizer = kinds[cfg.SOLVER.OPTIMIZER](parameter_groups(cfg, model), lr=cfg.SOLVER.BASE_LR, **options)
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED:
        optimizer.register_step_pre_hook(gradient_clipper(clip.CLIP_TYPE, clip.CLIP_VALUE, clip.NORM_TYPE))
    return optimizer


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict]:
    """Learning rate and weight decay of every parameter.

    The backbone's rate is multiplied by BACKBONE_MULTIPLIER. Norms and embeddings have their own weight decays (0 in
    the published configs); the backbone's position tables have none.
    """
    norms = (
        nn.modules.batchnorm._BatchNorm,
        nn.modules.instancenorm._NormBase,
        nn.GroupNorm,
        nn.LayerNorm,
        nn.LocalResponseNorm,
    )
    groups, seen = [], set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            lr, decay = cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY
            if "backbone" in module_name:
                lr *= cfg.SOLVER.BACKBONE_MULTIPLIER
            if any(n in name for n in ("relative_position_bias_table", "pos_embed", "cls_token")):
                decay = 0.0
            if isinstance(module, norms):
                decay = cfg.SOLVER.WEIGHT_DECAY_NORM
            if isinstance(module, nn.Embedding):
                decay = cfg.SOLVER.WEIGHT_DECAY_EMBED
            groups.append({"params": [parameter], "lr": lr, "weight_decay": decay})
    return reduce_param_groups(groups)


def gradient_clipper(kind: str, limit: float, norm_type: float) -> Callable:
    """A hook that clips gradients before an optimizer's step: all together, or each by its norm or its values."""

    def clip(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if kind == "full_model":
            nn.utils.clip_grad_norm_(parameters, limit, norm_type)
        elif kind == "norm":
            for p in parameters:
                nn.utils.clip_grad_norm_(p, limit, norm_type)
        else:
            nn.utils.clip_grad_value_(parameters, limit)

    if kind not in ("full_model", "norm", "value"):
        raise ValueError(f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE {kind!r} is unknown: choose full_model, norm or value")
    return clip


def autocast(cfg: CfgNode, device_type: str, enabled: bool) -> torch.autocast:
    """The context of mixed precision with SOLVER.AMP.PRECISION. enabled False: it does nothing."""
    dtypes = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    precision = cfg.SOLVER.AMP.PRECISION
    if precision not in dtypes:
        raise ValueError(f"SOLVER.AMP.PRECISION {precision!r} is unknown: choose {' or '.join(dtypes)}")
    return torch.autocast(device_type, dtypes[precision], enabled=enabled)
