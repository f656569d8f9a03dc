"""The paper's equations on exits: loss weights (Eq. 3), utility (Eq. 4), exit targets (Eq. 5), gate losses (Table T2).

These are functions of tensors, without model, dataset or config. An exit is an int, the number of encoder layers run.
Source: "Efficient Transformer Encoders for Mask2Former-style models" (arXiv 2404.15244). The paper leaves open the
values of alpha, the sampling of exits and the tie rule; here they are this project's choices.
"""

import math
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_SOURCES = ("res5", "projected")  # maps that a gate may read


def exit_weights(kind: str | Sequence[float], exits: Sequence[int], num_layers: int) -> dict[int, float]:
    """The loss weight alpha_k of each exit k (Eq. 3).

    kind: "linear" gives k / num_layers. "uniform" gives 1 (the ablation USD). A sequence gives one positive number per
    exit; these must strictly increase. Raises ValueError for other kinds, lengths and weights.
    """
    exits = check_exits(exits)
    if exits[-1] > num_layers:
        raise ValueError(f"exit {exits[-1]} is beyond the encoder's {num_layers} layers: shorten the exits {exits}")
    if kind == "uniform":
        return dict.fromkeys(exits, 1.0)
    if kind == "linear":
        return {k: k / num_layers for k in exits}
    if not isinstance(kind, list | tuple) or not all(isinstance(a, int | float) for a in kind):
        raise ValueError(f"unknown alpha {kind!r}: use 'linear', 'uniform', or a list with one weight per exit")
    return dict(zip(exits, _check_increasing([float(a) for a in kind], exits), strict=True))


class ExitSampler:
    """The exits that an iteration trains, and their weights: `sampler(iteration) -> {exit: weight}`.

    With `exits_per_step` = len(exits) each step is exactly Eq. 3. With fewer, it draws that many exits without
    replacement and scales their weights by len(exits) / exits_per_step. The expected loss is then Eq. 3. The draw
    depends only on (seed, iteration): all ranks draw the same, and a resumed run repeats it.
    """

    def __init__(self, exits: Sequence[int], weights: Mapping[int, float], exits_per_step: int, seed: int = 0):
        self.exits = check_exits(exits)
        if set(weights) != set(self.exits):
            raise ValueError(f"weights are given for exits {sorted(weights)}, but the exits are {list(self.exits)}")
        if not 1 <= exits_per_step <= len(self.exits):
            raise ValueError(f"exits_per_step must be in 1..{len(self.exits)}, the number of exits: {exits_per_step}")
        if seed < 0:
            raise ValueError(f"seed must not be negative: {seed}")
        self.weights = {k: float(weights[k]) for k in self.exits}
        self.exits_per_step = exits_per_step
        self.seed = seed

    def __call__(self, iteration: int) -> dict[int, float]:
        keys = np.random.default_rng([self.seed, iteration]).random(len(self.exits))
        drawn = sorted(np.argsort(keys)[: self.exits_per_step])
        scale = len(self.exits) / self.exits_per_step
        return {self.exits[i]: self.weights[self.exits[i]] * scale for i in drawn}


def combine_exit_losses(
    losses: Mapping[int, Mapping[str, Tensor]], weights: Mapping[int, float], last_exit: int
) -> dict[str, Tensor]:
    """One flat dict of weighted losses; their sum is sum_k alpha_k L_k (Eq. 3).

    The last exit keeps the parent's names ("loss_ce", "loss_mask_3"). An earlier exit k gets "exit{k}/loss_ce".
    losses: {exit: {name: scalar}} of the exits of this step. weights: {exit: alpha_k} of the same exits.
    last_exit: the largest configured exit, also if this step does not run it.
    """
    if set(losses) != set(weights):
        raise ValueError(f"losses are given for exits {sorted(losses)}, but weights for {sorted(weights)}")
    beyond = [k for k in losses if k > last_exit]
    if beyond:
        raise ValueError(f"exits {beyond} are beyond the last configured exit {last_exit}")
    combined = {}
    for k in sorted(losses):
        prefix = "" if k == last_exit else f"exit{k}/"
        combined.update({prefix + name: value * weights[k] for name, value in losses[k].items()})
    return combined


def utility(quality, exits: Sequence[int], beta: float, costs=None) -> Tensor:
    """u(k) = q_k - beta * k (Eq. 4), where k is the layer number.

    quality: [N, E], per image and exit; higher is better. costs: [E] or [N, E], used instead of k, for instance GFLOPs
    or milliseconds. Returns [N, E] float64, in which ties and tiny betas stay exact. Raises ValueError for a beta that
    is negative or not finite, a quality or cost that is not finite, and shapes that disagree.
    """
    exits = check_exits(exits)
    check_beta(beta)
    quality = _finite(quality, "quality")
    if quality.dim() != 2 or quality.shape[1] != len(exits):
        raise ValueError(f"quality must be [N, {len(exits)}] for exits {exits}, not {list(quality.shape)}")
    costs = _finite(exits if costs is None else costs, "costs").to(quality.device)
    if costs.shape not in (quality.shape[1:], quality.shape):
        raise ValueError(f"costs must be [E] or [N, E] = {list(quality.shape)}, not {list(costs.shape)}")
    return quality - beta * costs


def exit_targets(quality, exits: Sequence[int], beta: float, max_exit: int, costs=None) -> Tensor:
    """t = argmax_k u(k) over the exits k <= max_exit (Eq. 5). Ties go to the smaller k.

    Arguments as in `utility`. Returns exits (layer numbers, not indices), int64 [N]. Raises ValueError if max_exit is
    not one of the exits.
    """
    allowed = exits_up_to(exits, max_exit)
    utilities = utility(quality, exits, beta, costs)[:, : len(allowed)]
    return torch.tensor(allowed, device=utilities.device)[utilities.argmax(dim=1)]


def gate_loss(name: str, logits: Tensor, utilities: Tensor) -> Tensor:
    """The gate's training loss, one of `GATE_LOSSES` (Table T2), mean over the batch.

    logits, utilities: [B, E'] over the same exits. Table T2 prints the cross-entropies without their minus sign; here
    they have it. Negative utilities enter u_ce unchanged.
    """
    if name not in GATE_LOSSES:
        raise ValueError(f"unknown gate loss {name!r}: choose one of {', '.join(GATE_LOSSES)}")
    if logits.shape != utilities.shape or logits.dim() != 2:
        raise ValueError(f"logits {list(logits.shape)} and utilities {list(utilities.shape)} must both be [B, E]")
    return GATE_LOSSES[name](logits, utilities).mean().to(logits.dtype)


def _hard_ce(logits: Tensor, utilities: Tensor) -> Tensor:
    return F.cross_entropy(logits, utilities.argmax(dim=1), reduction="none")


def _u_ce(logits: Tensor, utilities: Tensor) -> Tensor:
    return -(utilities * logits.log_softmax(dim=1)).sum(dim=1)


def _soft_ce(logits: Tensor, utilities: Tensor) -> Tensor:
    return -(utilities.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)


def _soft_mse(logits: Tensor, utilities: Tensor) -> Tensor:
    return (utilities.softmax(dim=1) - logits.softmax(dim=1)).square().sum(dim=1)


GATE_LOSSES = {"hard_ce": _hard_ce, "u_ce": _u_ce, "soft_ce": _soft_ce, "soft_mse": _soft_mse}


# Without a minimum where an exit's mean utility is negative: the loss falls without end as the gate excludes that exit.
UNBOUNDED_LOSSES = ("u_ce",)


def largest_beta(loss: str, quality, exits: Sequence[int], max_exit: int, costs=None) -> float:
    """The largest beta at which a gate loss has a minimum; infinity for most losses.

    `UNBOUNDED_LOSSES` have one if no exit's mean utility is negative, or if there is only one exit. Arguments as in
    `exit_targets`.
    """
    allowed = exits_up_to(exits, max_exit)
    if loss not in UNBOUNDED_LOSSES or len(allowed) == 1:
        return math.inf
    quality = utility(quality, exits, 0.0)  # [N, E]
    prices = -utility(torch.zeros_like(quality), exits, 1.0, costs)  # [N, E]
    return (quality.mean(dim=0) / prices.mean(dim=0))[: len(allowed)].min().item()


def check_has_minimum(loss: str, quality, exits: Sequence[int], beta: float, max_exit: int, costs=None) -> None:
    """Raises ValueError if a gate loss has no minimum at this beta; see `largest_beta`."""
    check_beta(beta)
    largest = largest_beta(loss, quality, exits, max_exit, costs)
    if beta > largest * (1 + 1e-9):
        raise ValueError(
            f"the loss {loss} has no minimum at beta {beta:g} and K {max_exit}: the mean utility of an exit is "
            "negative, so the loss falls without end as the gate excludes that exit. Take a beta of at most "
            f"{largest:.4g}, or another loss; the paper's is hard_ce"
        )


def check_exits(exits: Sequence[int]) -> tuple[int, ...]:
    """The exits as a tuple of ints. Raises ValueError unless they are positive whole numbers that strictly increase."""
    values = tuple(int(k) for k in exits)
    good = values and values == tuple(exits) and values[0] >= 1 and values[-1] < 2**31  # int32 in derived datasets
    if not good or any(a >= b for a, b in zip(values, values[1:])):
        raise ValueError(f"exits must be positive layer numbers in increasing order, such as [2, 3, 4, 5, 6]: {exits}")
    return values


def exits_up_to(exits: Sequence[int], max_exit: int) -> tuple[int, ...]:
    """The exits k <= max_exit (the paper's K). Raises ValueError if max_exit is not one of them."""
    exits = check_exits(exits)
    if max_exit not in exits:
        raise ValueError(f"max_exit must be one of the exits {list(exits)}, not {max_exit}")
    return exits[: exits.index(max_exit) + 1]


def check_beta(beta: float) -> None:
    """Raises ValueError unless beta is a finite number >= 0."""
    if not 0 <= beta <= sys.float_info.max:  # an int may exceed all floats
        raise ValueError(f"beta must be a finite number >= 0, not {beta}: at 10 all images take the first exit")


def _check_increasing(weights: list[float], exits: Sequence[int]) -> list[float]:
    if len(weights) != len(exits):
        raise ValueError(f"alpha has {len(weights)} weights for {len(exits)} exits {exits}: give one per exit")
    increasing = all(a < b for a, b in zip(weights, weights[1:]))
    if not increasing or not all(math.isfinite(a) and a > 0 for a in weights):
        raise ValueError(f"alpha must be positive and strictly increase with the exit, or be 'uniform': {weights}")
    return weights


def _finite(values, name: str) -> Tensor:
    tensor = torch.as_tensor(values).to(torch.float64)
    if not tensor.isfinite().all():
        where = (~tensor.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{name} must be finite, but is {tensor[tuple(where)].item()} at index {where}")
    return tensor
