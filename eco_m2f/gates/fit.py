"""How a gate is fitted (Step C): softmax regression, which is convex for the paper's loss.

Beside the paper's optimizer, Adam, stands L-BFGS, which runs to the optimum. Neither ever holds a copy of the features.
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
_SAMPLE = 16384  # rows that the scaling, and the start of a large fit, are computed from
_SIDE_BY_SIDE = 16  # gates fitted at a time; each needs some megabytes


Budget = tuple[float, int, str]  # beta, K, the loss of Table T2


@dataclass(frozen=True)
class AdamOptions:
    """How "adam" goes: learning rate, images a step, and either epochs or iterations.

    With neither it goes on for 10 epochs, and for 300 iterations at least. Raises ValueError for what cannot be.
    """

    lr: float = 3e-3
    batch: int = 256
    epochs: int = 0
    iterations: int = 0

    def __post_init__(self):
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"Adam's learning rate must be a finite number above 0, not {self.lr}")
        if self.batch < 1 or self.epochs < 0 or self.iterations < 0:
            raise ValueError(f"Adam's batch must be 1 or more, epochs and iterations not negative: {self}")
        if self.epochs and self.iterations:
            raise ValueError(f"Adam takes {self.epochs} epochs or {self.iterations} iterations: set one of them to 0")

    def steps(self, num_images: int) -> int:
        """The iterations that a fit of so many images takes."""
        epochs = self.epochs or max(10, -(-300 * self.batch // num_images))
        return self.iterations or epochs * -(-num_images // self.batch)


def batched(items: Sequence, size: int) -> Iterator[Sequence]:
    """Slices of `size` items; itertools has this from Python 3.12 on."""
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

    features [N, C] float32; quality [N, E] at the exits; costs: see `utility`. A gate's exits are those up to its K.
    optimizer: "lbfgs" runs to the optimum of the whole set, all gates side by side, so that a pass over the features
    serves each of them; "adam" is the paper's, in mini-batches as `adam` says, one gate after the other, without weight
    decay (l2 is not used). l2 weighs half the squared norm of the weights on standardised features, beside the mean
    loss; C / N unless given, so that a small dataset is not learnt by heart. scaling: of these features, if known. The
    same arguments and number of threads give the same gates. Raises ValueError for shapes, exits, or values that do not
    fit, for a budget whose loss has no minimum, and for a fit that ran away.
    """
    features = torch.as_tensor(features)
    if features.dim() != 2 or len(features) != len(quality) or len(features) == 0:
        raise ValueError(f"features must be [{len(quality)}, C], one row per image, not {list(features.shape)}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}: choose one of {', '.join(OPTIMIZERS)}")
    l2 = features.shape[1] / len(features) if l2 is None else l2
    if not (math.isfinite(l2) and l2 >= 0):
        raise ValueError(f"l2 must be a finite number >= 0, not {l2}")
    for beta, max_exit, loss in budgets:
        check_has_minimum(loss, quality, exits, beta, max_exit, costs)
    scaling = scaling or Scaling.of(features, l2, seed)
    fit, fitted = {"optimizer": optimizer, "seed": seed}, []
    if optimizer == "lbfgs":
        fit["l2"] = l2
    else:
        fit |= {"lr": adam.lr, "batch": adam.batch, "iterations": adam.steps(len(features))}
        l2 = 0.0
    for some in batched(budgets, _SIDE_BY_SIDE):
        targets = [
            (loss, utility(quality, exits, beta, costs)[:, : len(exits_up_to(exits, max_exit))])
            for beta, max_exit, loss in some
        ]
        if optimizer == "lbfgs":
            found = _fit_lbfgs(features, targets, scaling, l2, seed)
        else:
            found = [_fit_adam(features, utilities, loss, scaling, seed, adam) for loss, utilities in targets]
        for budget, target, result in zip(some, targets, found):
            _check_sound(budget, features, target, scaling, l2, *result)
        fitted += found
    return [
        Gate(
            weight.float(),
            bias.float(),
            exits_up_to(exits, max_exit),
            beta,
            loss,
            feature_source,
            parent_sha256,
            {**fit, "train_loss": value},
        )
        for (weight, bias, value), (beta, max_exit, loss) in zip(fitted, budgets)
    ]


def _check_sound(
    budget: Budget,
    features: Tensor,
    target: "Target",
    scaling: "Scaling",
    l2: float,
    weight: Tensor,
    bias: Tensor,
    value: float,
) -> None:
    """Raises ValueError where a fit ran away: the loss rose, or it sinks on as the weights grow.

    A loss below 0 sinks on where doubling the logits lowers the whole objective by half again and more; at a minimum
    doubling raises it. Losses that are never negative cannot do so.
    """
    (loss, utilities), (beta, max_exit, _) = target, budget
    start = gate_loss(loss, torch.zeros_like(utilities), utilities).item()
    about = f"the fit of beta {beta:g}, K {max_exit}, loss {loss} ran away"
    if not math.isfinite(start):
        raise ValueError(f"{about}: beta times an exit's cost is beyond what a number can be; take a smaller beta")
    if not math.isfinite(value) or value > start + max(0.5 * abs(start), 0.05):
        raise ValueError(f"{about}: its loss went from {start:.4g} to {value:.4g}; lower Adam's rate, or take lbfgs")
    if value < 0:
        (doubled,), _, _ = _losses_and_gradient(features, [target], 2 * weight, 2 * bias)
        doubled += 0.5 * l2 * (2 * weight * scaling.std).square().sum().item()
        if not doubled > 1.5 * value:
            raise ValueError(
                f"{about}: its loss is {value:.4g} and sinks on as the weights grow, to {doubled:.4g} where they "
                "double. Take a smaller beta or another loss; with lbfgs a larger l2 helps too"
            )


@dataclass(frozen=True)
class Scaling:
    """How features are standardised and decorrelated while a gate is fitted; folded into its weights afterwards.

    A gate over standardised features is V inverse(root) (z - mean) / std + b. In the coordinates V the features are
    about white, so that an optimizer needs some ten passes over the data instead of hundreds.
    """

    mean: Tensor  # [C] float64
    std: Tensor  # [C]
    root: Tensor  # [C, C] lower triangular: root root^T = correlation of the features + ridge

    @classmethod
    def of(cls, features: Tensor, l2: float, seed: int = 0) -> "Scaling":
        """From at most some thousand rows, which is enough: the scaling is no part of the result.

        Raises ValueError for a feature that is not finite.
        """
        sample = features[_sample_rows(len(features), seed)].float()
        mean, std = sample.mean(dim=0), sample.std(dim=0, correction=0)
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise ValueError("the features are not finite: derive the dataset again with a sound parent")
        std = torch.where(std > 1e-6 * mean.abs().clamp(min=1e-6), std, 1.0)  # a constant feature tells nothing
        white = sample.sub_(mean).div_(std)  # in place: indexing has made a copy
        correlation = (white.T @ white).double() / len(white)
        # The loss bends by about 1/6 of the correlation, so this is its curvature together with the penalty's, but for
        # that factor. The least ridge keeps directions that the sample hardly shows from being blown up.
        ridge = max(1e-2, 6 * l2)
        root = torch.linalg.cholesky(correlation + ridge * torch.eye(len(correlation), dtype=torch.float64))
        return cls(mean.double(), std.double(), root)

    def standard(self, v: Tensor) -> Tensor:
        """V [E, C] -> the weights on standardised features."""
        return torch.linalg.solve_triangular(self.root, v, upper=False, left=False)

    def fold(self, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """V [E, C] and b [E] -> weight and bias on the features as they are."""
        weight = self.standard(v) / self.std
        return weight, bias - weight @ self.mean

    def unfold_gradient(self, weight: Tensor, bias: Tensor) -> Tensor:
        """The gradient with respect to the folded weight and bias -> that with respect to V."""
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


Target = tuple[str, Tensor]  # a gate's loss, and its utilities [N, E]


def _fit_lbfgs(
    features: Tensor, targets: Sequence[Target], scaling: Scaling, l2: float, seed: int
) -> list[tuple[Tensor, Tensor, float]]:
    """Weight, bias and objective of every gate.

    A large fit starts from the optimum of a sample, whose passes are cheap, and then takes a few over everything.
    """
    shapes = [(u.shape[1], features.shape[1] + 1) for _, u in targets]
    starts = [np.zeros(shape).ravel() for shape in shapes]
    if len(features) > _SAMPLE:
        rows = _sample_rows(len(features), seed)
        some = [(loss, u[rows]) for loss, u in targets]
        sample = partial(_objectives, features[rows], some, scaling, l2)
        starts = [result.x for result in minimise_side_by_side(sample, starts, {"maxiter": 12})]
        del sample, some
    passes = 6 if len(features) > _SAMPLE else 200
    whole = partial(_objectives, features, targets, scaling, l2)
    fitted = []
    for result, shape in zip(minimise_side_by_side(whole, starts, {"maxiter": passes, "ftol": 1e-7}), shapes):
        v, bias = torch.from_numpy(result.x).view(shape).split([shape[1] - 1, 1], dim=1)
        fitted.append((*scaling.fold(v, bias[:, 0]), float(result.fun)))
    return fitted


def _objectives(
    features: Tensor, targets: Sequence[Target], scaling: Scaling, l2: float, points: dict[int, np.ndarray]
) -> dict[int, tuple[float, np.ndarray]]:
    """The mean loss plus l2 / 2 |W|^2 of some gates, and its gradient; a point holds V and the bias as last column."""
    widths = [targets[i][1].shape[1] for i in points]
    parameters = torch.cat([torch.from_numpy(p).view(w, -1) for p, w in zip(points.values(), widths)])  # [all E, C + 1]
    v, bias = parameters[:, :-1], parameters[:, -1]
    standard = scaling.standard(v)
    weight, bias = scaling.fold(v, bias)
    values, weight_grad, bias_grad = _losses_and_gradient(features, [targets[i] for i in points], weight, bias)
    v_grad = scaling.unfold_gradient(weight_grad, bias_grad) + l2 * scaling.unfold_standard(standard)
    gradients = torch.cat([v_grad, bias_grad[:, None]], dim=1).split(widths)
    penalties = [0.5 * l2 * part.square().sum().item() for part in standard.split(widths)]
    return {
        i: (value + penalty, gradient.numpy().ravel())
        for i, value, penalty, gradient in zip(points, values, penalties, gradients)
    }


def _losses_and_gradient(
    features: Tensor, targets: Sequence[Target], weight: Tensor, bias: Tensor
) -> tuple[list[float], Tensor, Tensor]:
    """Mean losses of the gates, and their gradients by the stacked weights [all E, C] and biases, in float64.

    Block by block, so that nothing as large as the features is ever made.
    """
    values, weight_grad, bias_grad = [0.0] * len(targets), torch.zeros_like(weight), torch.zeros_like(bias)
    weight, bias = weight.to(features), bias.to(features)
    widths = [utilities.shape[1] for _, utilities in targets]
    for first in range(0, len(features), _ROWS):
        block = features[first : first + _ROWS]
        gradients = []
        for g, logits in enumerate(torch.addmm(bias, block, weight.T).split(widths, dim=1)):
            loss, utilities = targets[g]
            logits = logits.requires_grad_()
            part = gate_loss(loss, logits, utilities[first : first + _ROWS]) * (len(block) / len(features))
            gradients += torch.autograd.grad(part, logits)
            values[g] += part.item()
        gradient = torch.cat(gradients, dim=1)
        weight_grad += gradient.T @ block
        bias_grad += gradient.sum(dim=0)
    return values, weight_grad, bias_grad


def _fit_adam(
    features: Tensor,
    utilities: Tensor,
    loss: str,
    scaling: Scaling,
    seed: int,
    options: AdamOptions,
) -> tuple[Tensor, Tensor, float]:
    """Adam on standardised features; the rate falls to 0 along a cosine."""
    generator = torch.Generator().manual_seed(seed)
    mean, std = scaling.mean.float(), scaling.std.float()
    weight = torch.zeros(utilities.shape[1], features.shape[1], requires_grad=True)
    bias = torch.zeros(utilities.shape[1], requires_grad=True)
    adam = torch.optim.Adam([weight, bias], lr=options.lr)
    steps = options.steps(len(features))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    epochs = (torch.randperm(len(features), generator=generator).split(options.batch) for _ in itertools.count())
    for rows in itertools.islice(itertools.chain.from_iterable(epochs), steps):
        z = (features[rows] - mean) / std
        adam.zero_grad()
        gate_loss(loss, torch.addmm(bias, z, weight.T), utilities[rows]).backward()
        adam.step()
        schedule.step()
    weight, bias = weight.detach().double() / scaling.std, bias.detach().double()
    bias = bias - weight @ scaling.mean
    (value,), _, _ = _losses_and_gradient(features, [(loss, utilities)], weight, bias)
    return weight, bias, value
