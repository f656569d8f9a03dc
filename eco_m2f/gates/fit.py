"""Fits gates (Step C): softmax regression, which is convex for the paper's loss.

There are two optimizers: the paper's Adam, and L-BFGS, which runs to the optimum. Neither copies the features.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..exits import check_has_minimum, exits_up_to, gate_loss, utility
from .gate import Gate
from .side_by_side import minimise_side_by_side

OPTIMIZERS = ("lbfgs", "adam")
_ROWS = 8192  # rows of features multiplied at a time
_SAMPLE = 16384  # rows from which the scaling, and the start of a large fit, are computed
_SIDE_BY_SIDE = 16  # gates fitted at a time; each needs a few megabytes

Budget = tuple[float, int, str]  # beta, K, the loss of Table T2


@dataclass(frozen=True)
class AdamOptions:
    """Settings of "adam": learning rate, images per step, and either epochs or iterations.

    With neither it runs 10 epochs, and at least 300 iterations. Raises ValueError for impossible values.
    """

    lr: float = 3e-3
    batch: int = 256
    epochs: int = 0
    iterations: int = 0

    def __post_init__(self):
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"Adam's learning rate must be a finite number above 0, not {self.lr}")
        if self.batch < 1 or self.epochs < 0 or self.iterations < 0:
            raise ValueError(f"Adam's batch must be 1 or more, its epochs and iterations 0 or more: {self}")
        if self.epochs and self.iterations:
            raise ValueError(f"Adam takes {self.epochs} epochs or {self.iterations} iterations: set one of them to 0")

    def steps(self, num_images: int) -> int:
        """Iterations of a fit on this many images."""
        epochs = self.epochs or max(10, -(-300 * self.batch // num_images))
        return self.iterations or epochs * -(-num_images // self.batch)


def batched(items: Sequence, size: int) -> Iterator[Sequence]:
    """Slices of `size` items. itertools has this from Python 3.12 on."""
    return (items[first : first + size] for first in range(0, len(items), size))


def fit_gate(features, quality, exits: Sequence[int], beta: float, max_exit: int, loss: str = "hard_ce", **fit) -> Gate:
    """Fits the gate of one budget; see `fit_gates`."""
    return fit_gates(features, quality, exits, [(beta, max_exit, loss)], **fit)[0]


def fit_gates(
    features,
    quality,
    exits: Sequence[int],
    budgets: Sequence[Budget],
    *,
    feature_source: str,
    parent_sha256: str,
    optimizer: str = "lbfgs",
    l2: float | None = None,
    seed: int = 0,
    costs=None,
    scaling: "Scaling | None" = None,
    adam: AdamOptions = AdamOptions(),
) -> list[Gate]:
    """Fits a gate per budget: softmax regression of the utilities' loss (Table T2) on the pooled features.

    Args:
        features: [N, C] float32, one row per image.
        quality: [N, E], of each image at each exit.
        exits: the E exits. A gate may choose those up to its K.
        optimizer: "lbfgs" finds the optimum of the whole set, and fits all gates side by side. "adam" is the paper's:
            mini-batches as `adam` says, one gate after the other, without weight decay (l2 is not used).
        l2: weight of half the squared norm of the weights on standardised features, added to the mean loss. By default
            C / N, which keeps a small dataset from being learnt by heart.
        costs: see `utility`.
        scaling: that of these features, if known.

    The same arguments and the same number of threads give the same gates. Raises ValueError for shapes, exits or values
    that do not fit, for a budget whose loss has no minimum, and for a fit that diverged.
    """
    features = torch.as_tensor(features)
    if features.dim() != 2 or len(features) != len(quality) or len(features) == 0:
        raise ValueError(f"features must be [{len(quality)}, C], one row per image, not {list(features.shape)}")
    l2 = features.shape[1] / len(features) if l2 is None else l2
    _check_options(optimizer, l2)
    for beta, max_exit, loss in budgets:
        check_has_minimum(loss, quality, exits, beta, max_exit, costs)
    scaling = scaling or Scaling.of(features, l2, seed)
    fit = {"optimizer": optimizer, "seed": seed}
    if optimizer == "lbfgs":
        fit_problems, fit["l2"] = partial(_fit_lbfgs, scaling=scaling, l2=l2, seed=seed), l2
    else:
        fit_problems, l2 = partial(_fit_all_adam, scaling=scaling, seed=seed, options=adam), 0.0
        fit |= {"lr": adam.lr, "batch": adam.batch, "iterations": adam.steps(len(features))}
    gates = []
    for group in batched(budgets, _SIDE_BY_SIDE):
        problems = [_problem(quality, exits, budget, costs) for budget in group]
        for budget, problem, fitted in zip(group, problems, fit_problems(features, problems)):
            _check_sound(budget, features, problem, scaling, l2, fitted)
            gates.append(_gate(budget, exits, fitted, feature_source, parent_sha256, fit))
    return gates


Problem = tuple[str, Tensor]  # what a gate is fitted to: its loss, and its utilities [N, E]
Fitted = tuple[Tensor, Tensor, float]  # weight [E, C] and bias [E] in float64, and the value of the objective


def _check_options(optimizer: str, l2: float) -> None:
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}: choose one of {', '.join(OPTIMIZERS)}")
    if not (math.isfinite(l2) and l2 >= 0):
        raise ValueError(f"l2 must be a finite number >= 0, not {l2}")


def _problem(quality, exits: Sequence[int], budget: Budget, costs) -> Problem:
    beta, max_exit, loss = budget
    return loss, utility(quality, exits, beta, costs)[:, : len(exits_up_to(exits, max_exit))]


def _gate(
    budget: Budget, exits: Sequence[int], fitted: Fitted, feature_source: str, parent_sha256: str, fit: dict
) -> Gate:
    (beta, max_exit, loss), (weight, bias, value) = budget, fitted
    fit = {**fit, "train_loss": value}
    return Gate(
        weight.float(), bias.float(), exits_up_to(exits, max_exit), beta, loss, feature_source, parent_sha256, fit
    )


def _check_sound(
    budget: Budget, features: Tensor, problem: Problem, scaling: "Scaling", l2: float, fitted: Fitted
) -> None:
    """Raises ValueError if a fit diverged: the loss rose, or it still falls as the weights grow.

    A loss below 0 falls further if doubling the logits makes the objective more than half lower again. At a minimum
    doubling raises it. Losses that are never negative cannot fall without end.
    """
    (loss, utilities), (beta, max_exit, _), (weight, bias, value) = problem, budget, fitted
    start = gate_loss(loss, torch.zeros_like(utilities), utilities).item()
    about = f"the fit of beta {beta:g}, K {max_exit}, loss {loss} diverged"
    if not math.isfinite(start):
        raise ValueError(f"{about}: beta times the cost of an exit is not finite. Take a smaller beta")
    if not math.isfinite(value) or value > start + max(0.5 * abs(start), 0.05):
        raise ValueError(f"{about}: its loss went from {start:.4g} to {value:.4g}. Lower Adam's rate, or take lbfgs")
    if value < 0:
        (doubled,), _, _ = _losses_and_gradient(features, [problem], 2 * weight, 2 * bias)
        doubled += 0.5 * l2 * (2 * weight * scaling.std).square().sum().item()
        if not doubled > 1.5 * value:
            raise ValueError(
                f"{about}: its loss is {value:.4g}, and {doubled:.4g} with doubled weights, so it has no minimum. Take "
                "a smaller beta or another loss. With lbfgs a larger l2 helps too"
            )


@dataclass(frozen=True)
class Scaling:
    """Standardises and decorrelates features during a fit. Afterwards it is folded into the gate's weights.

    A gate over standardised features is V inverse(root) (z - mean) / std + b. In the coordinates V the features are
    nearly white, so an optimizer needs about ten passes over the data instead of hundreds.
    """

    mean: Tensor  # [C] float64
    std: Tensor  # [C]
    root: Tensor  # [C, C] lower triangular: root root^T = correlation of the features + ridge

    @classmethod
    def of(cls, features: Tensor, l2: float, seed: int = 0) -> "Scaling":
        """Computed from at most _SAMPLE rows, which is enough: the scaling only speeds the fit up.

        Raises ValueError for a feature that is not finite.
        """
        sample = features[_sample_rows(len(features), seed)].float()
        mean, std = sample.mean(dim=0), sample.std(dim=0, correction=0)
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise ValueError("the features are not finite: derive the dataset again with a sound parent")
        std = torch.where(std > 1e-6 * mean.abs().clamp(min=1e-6), std, 1.0)  # a constant feature is not scaled
        white = sample.sub_(mean).div_(std)  # [sample, C]; in place, because indexing has made a copy
        correlation = (white.T @ white).double() / len(white)  # [C, C]
        # The curvature of the loss is about 1/6 of the correlation. With this ridge, root is the curvature of loss and
        # penalty up to that factor. The least ridge limits the scale of directions that hardly occur in the sample.
        ridge = max(1e-2, 6 * l2)
        root = torch.linalg.cholesky(correlation + ridge * torch.eye(len(correlation), dtype=torch.float64))
        return cls(mean.double(), std.double(), root)

    def standard(self, v: Tensor) -> Tensor:
        """V [E, C] -> weights on standardised features [E, C]."""
        return torch.linalg.solve_triangular(self.root, v, upper=False, left=False)

    def fold(self, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """V [E, C] and b [E] -> weight [E, C] and bias [E] on the unscaled features."""
        weight = self.standard(v) / self.std
        return weight, bias - weight @ self.mean

    def unfold_gradient(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Gradients by the folded weight [E, C] and bias [E] -> gradient by V [E, C]."""
        standard = (weight - bias[:, None] * self.mean) / self.std
        return self.unfold_standard(standard)

    def unfold_standard(self, standard: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.root.T, standard, upper=True, left=False)


def _sample_rows(num_rows: int, seed: int) -> Tensor:
    """At most _SAMPLE rows in ascending order."""
    if num_rows <= _SAMPLE:
        return torch.arange(num_rows)
    rows = np.random.default_rng(seed).choice(num_rows, _SAMPLE, replace=False)
    return torch.from_numpy(np.sort(rows))


def _fit_lbfgs(features: Tensor, problems: Sequence[Problem], scaling: Scaling, l2: float, seed: int) -> list[Fitted]:
    """A large fit first finds the optimum of a sample, with cheap passes, and then takes a few passes over all rows."""
    shapes = [(u.shape[1], features.shape[1] + 1) for _, u in problems]
    starts = [np.zeros(shape).ravel() for shape in shapes]
    if len(features) > _SAMPLE:
        rows = _sample_rows(len(features), seed)
        sampled = [(loss, u[rows]) for loss, u in problems]
        sample = partial(_objectives, features[rows], sampled, scaling, l2)
        starts = [result.x for result in minimise_side_by_side(sample, starts, {"maxiter": 12})]
        del sample, sampled
    passes = 6 if len(features) > _SAMPLE else 200
    whole = partial(_objectives, features, problems, scaling, l2)
    fitted = []
    for result, shape in zip(minimise_side_by_side(whole, starts, {"maxiter": passes, "ftol": 1e-7}), shapes):
        v, bias = torch.from_numpy(result.x).view(shape).split([shape[1] - 1, 1], dim=1)
        fitted.append((*scaling.fold(v, bias[:, 0]), float(result.fun)))
    return fitted


def _objectives(
    features: Tensor, problems: Sequence[Problem], scaling: Scaling, l2: float, points: dict[int, np.ndarray]
) -> dict[int, tuple[float, np.ndarray]]:
    """{problem: (mean loss plus l2 / 2 |W|^2, its gradient)} at the points.

    A point is a flat [E, C + 1]: V of `Scaling`, and the bias as last column.
    """
    widths = [problems[i][1].shape[1] for i in points]
    parameters = torch.cat([torch.from_numpy(p).view(w, -1) for p, w in zip(points.values(), widths)])  # [all E, C + 1]
    v, bias = parameters[:, :-1], parameters[:, -1]
    standard = scaling.standard(v)
    weight, bias = scaling.fold(v, bias)
    values, weight_grad, bias_grad = _losses_and_gradient(features, [problems[i] for i in points], weight, bias)
    v_grad = scaling.unfold_gradient(weight_grad, bias_grad) + l2 * scaling.unfold_standard(standard)
    gradients = torch.cat([v_grad, bias_grad[:, None]], dim=1).split(widths)
    penalties = [0.5 * l2 * part.square().sum().item() for part in standard.split(widths)]
    return {
        i: (value + penalty, gradient.numpy().ravel())
        for i, value, penalty, gradient in zip(points, values, penalties, gradients)
    }


def _losses_and_gradient(
    features: Tensor, problems: Sequence[Problem], weight: Tensor, bias: Tensor
) -> tuple[list[float], Tensor, Tensor]:
    """Mean losses of the gates, and their gradients by the stacked weights [all E, C] and biases, in float64.

    The features are read block by block: no tensor of their size is made.
    """
    values, weight_grad, bias_grad = [0.0] * len(problems), torch.zeros_like(weight), torch.zeros_like(bias)
    weight, bias = weight.to(features), bias.to(features)
    widths = [utilities.shape[1] for _, utilities in problems]
    for first in range(0, len(features), _ROWS):
        block = features[first : first + _ROWS]
        gradients = []
        for g, logits in enumerate(torch.addmm(bias, block, weight.T).split(widths, dim=1)):
            loss, utilities = problems[g]
            logits = logits.requires_grad_()
            part = gate_loss(loss, logits, utilities[first : first + _ROWS]) * (len(block) / len(features))
            gradients += torch.autograd.grad(part, logits)
            values[g] += part.item()
        gradient = torch.cat(gradients, dim=1)  # [block, all E]
        weight_grad += gradient.T @ block
        bias_grad += gradient.sum(dim=0)
    return values, weight_grad, bias_grad


def _fit_all_adam(
    features: Tensor, problems: Sequence[Problem], scaling: Scaling, seed: int, options: AdamOptions
) -> list[Fitted]:
    return [_fit_adam(features, utilities, loss, scaling, seed, options) for loss, utilities in problems]


def _fit_adam(
    features: Tensor,
    utilities: Tensor,
    loss: str,
    scaling: Scaling,
    seed: int,
    options: AdamOptions,
) -> Fitted:
    """Adam on standardised features. The rate falls to 0 along a cosine."""
    generator = torch.Generator().manual_seed(seed)
    mean, std = scaling.mean.float(), scaling.std.float()
    weight = torch.zeros(utilities.shape[1], features.shape[1], requires_grad=True)  # [E, C]
    bias = torch.zeros(utilities.shape[1], requires_grad=True)
    adam = torch.optim.Adam([weight, bias], lr=options.lr)
    steps = options.steps(len(features))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    epochs = (torch.randperm(len(features), generator=generator).split(options.batch) for _ in itertools.count())
    for rows in itertools.islice(itertools.chain.from_iterable(epochs), steps):
        z = (features[rows] - mean) / std  # [batch, C]
        adam.zero_grad()
        gate_loss(loss, torch.addmm(bias, z, weight.T), utilities[rows]).backward()
        adam.step()
        schedule.step()
    weight, bias = weight.detach().double() / scaling.std, bias.detach().double()
    bias = bias - weight @ scaling.mean
    (value,), _, _ = _losses_and_gradient(features, [(loss, utilities)], weight, bias)
    return weight, bias, value
