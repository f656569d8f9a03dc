"""The gate: one linear layer from pooled backbone features to exits (Eq. 6), its file, and how it is fitted (Step C).

Fitting is softmax regression, and convex for the paper's loss. Beside the paper's optimizer, Adam, stands L-BFGS, which
runs to the optimum. Neither ever holds a copy of the features.
"""

import math
import pickle
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from .exits import GATE_LOSSES, check_beta, check_exits, exits_up_to, gate_loss, utility
from .files import atomic_write

GATE_FORMAT = "eco_m2f.gate.v1"


@dataclass
class Gate:
    """A fitted gate g = W z + b, saved alone beside the parent it was fitted for.

    weight: [E', C] float32; bias: [E']; exits: the E' layer numbers it chooses from, the largest being K = max_exit.
    feature_source: the map that z is pooled from, "res5" or "projected". parent_sha256: see `derived.parent_sha256`.
    fit: how it was fitted (optimizer, seed, ...). results: what was measured with it, such as PQ and GFLOPs.
    """

    weight: Tensor
    bias: Tensor
    exits: tuple[int, ...]
    beta: float
    loss: str
    feature_source: str
    parent_sha256: str
    fit: dict = field(default_factory=dict)
    results: dict = field(default_factory=dict)

    def __post_init__(self):
        self.exits = check_exits(self.exits)
        check_beta(self.beta)
        if self.loss not in GATE_LOSSES:
            raise ValueError(f"unknown gate loss {self.loss!r}: choose one of {', '.join(GATE_LOSSES)}")
        shapes = list(self.weight.shape), list(self.bias.shape)
        if self.weight.dim() != 2 or self.weight.shape[0] != len(self.exits) or shapes[1] != [len(self.exits)]:
            raise ValueError(f"a gate over exits {self.exits} needs weight [E, C] and bias [E], not {shapes}")
        if not (self.weight.isfinite().all() and self.bias.isfinite().all()):
            raise ValueError("the gate's weights are not finite: its fit diverged; lower the learning rate or raise l2")

    @property
    def max_exit(self) -> int:
        """The paper's K."""
        return self.exits[-1]

    def logits(self, z: Tensor) -> Tensor:
        """z [B, C] -> [B, E']."""
        return torch.nn.functional.linear(z, self.weight.to(z), self.bias.to(z))

    def choose(self, z: Tensor) -> Tensor:
        """z [B, C] -> exits (layer numbers), int64 [B]; ties go to the smaller exit."""
        return torch.tensor(self.exits, device=z.device)[self.logits(z).argmax(dim=1)]

    def save(self, path: str | Path) -> None:
        """Writes the gate whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            torch.save({"format": GATE_FORMAT, **asdict(self)}, file)

    @classmethod
    def load(cls, path: str | Path) -> "Gate":
        """Raises FileNotFoundError, or ValueError for a file that is not a gate."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no gate at {str(path)!r}: fit one with tools/train_gate.py")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else "it ends early"
            raise ValueError(f"{path} is no whole gate file ({reason}): fit it with tools/train_gate.py") from error
        if not isinstance(content, Mapping) or content.get("format") != GATE_FORMAT:
            raise ValueError(f"{path} is not a gate file of format {GATE_FORMAT}: fit one with tools/train_gate.py")
        return cls(**{name: value for name, value in content.items() if name != "format"})


# --- fitting ---------------------------------------------------------------------------------------------------------

OPTIMIZERS = ("lbfgs", "adam")
_ROWS = 8192  # rows of features multiplied at a time
_SAMPLE = 16384  # rows that the scaling, and the start of a large fit, are computed from
_SIDE_BY_SIDE = 16  # gates fitted at a time; each needs some megabytes


Budget = tuple[float, int, str]  # beta, K, the loss of Table T2


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
) -> list[Gate]:
    """Fits a gate per budget: softmax regression of the utilities' loss (Table T2) on the pooled features.

    features [N, C] float32; quality [N, E] at the exits; costs: see `utility`. A gate's exits are those up to its K.
    optimizer: "lbfgs" runs to the optimum of the whole set, all gates side by side, so that a pass over the features
    serves each of them; "adam" is the paper's, in mini-batches, one gate after the other, without weight decay (l2 is
    not used). l2 weighs half the squared norm of the weights on standardised features, beside the mean loss; C / N
    unless given, so that a small dataset is not learnt by heart. scaling: of these features, if known. The same
    arguments and number of threads give the same gates. Raises ValueError for shapes, exits, or values that do not fit.
    """
    features = torch.as_tensor(features)
    if features.dim() != 2 or len(features) != len(quality) or len(features) == 0:
        raise ValueError(f"features must be [{len(quality)}, C], one row per image, not {list(features.shape)}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}: choose one of {', '.join(OPTIMIZERS)}")
    l2 = features.shape[1] / len(features) if l2 is None else l2
    if not (math.isfinite(l2) and l2 >= 0):
        raise ValueError(f"l2 must be a finite number >= 0, not {l2}")
    scaling = scaling or Scaling.of(features, l2, seed)
    fit, fitted = {"optimizer": optimizer, "seed": seed}, []
    if optimizer == "lbfgs":
        fit["l2"] = l2
    for some in batched(budgets, _SIDE_BY_SIDE):
        targets = [
            (loss, utility(quality, exits, beta, costs)[:, : len(exits_up_to(exits, max_exit))])
            for beta, max_exit, loss in some
        ]
        if optimizer == "lbfgs":
            fitted += _fit_lbfgs(features, targets, scaling, l2, seed)
        else:
            fitted += [_fit_adam(features, utilities, loss, scaling, seed) for loss, utilities in targets]
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
        starts = [result.x for result in _minimise_side_by_side(sample, starts, {"maxiter": 12})]
        del sample, some
    passes = 6 if len(features) > _SAMPLE else 200
    whole = partial(_objectives, features, targets, scaling, l2)
    fitted = []
    for result, shape in zip(_minimise_side_by_side(whole, starts, {"maxiter": passes, "ftol": 1e-7}), shapes):
        v, bias = torch.from_numpy(result.x).view(shape).split([shape[1] - 1, 1], dim=1)
        fitted.append((*scaling.fold(v, bias[:, 0]), float(result.fun)))
    return fitted


def _minimise_side_by_side(objectives: Callable, starts: Sequence[np.ndarray], options: dict) -> list:
    """scipy's result of L-BFGS-B for every start, their evaluations being made together.

    objectives({index: point}) -> {index: (value, gradient)}. Each minimisation has a thread, which hands its point in
    and waits; when all that go on have handed theirs in, they are evaluated at once. Which thread comes first does not
    matter: points are taken in the order of their indices.
    """
    handed_in: queue.Queue = queue.Queue()
    answers = [queue.SimpleQueue() for _ in starts]

    def minimise_one(index: int) -> None:
        def ask(point: np.ndarray):
            handed_in.put((index, point.copy(), None))
            answer = answers[index].get()
            if answer is None:
                raise _Abandoned
            return answer

        result = None
        try:
            result = minimize(ask, starts[index], jac=True, method="L-BFGS-B", options=options)
        except _Abandoned:
            pass
        finally:
            handed_in.put((index, None, result))

    threads = [threading.Thread(target=minimise_one, args=(i,), daemon=True) for i in range(len(starts))]
    for thread in threads:
        thread.start()
    results, going_on, points = {}, set(range(len(starts))), {}
    try:
        while going_on:
            index, point, result = handed_in.get()
            if point is None:
                going_on.remove(index)
                results[index] = result
            else:
                points[index] = point
            if going_on and len(points) == len(going_on):
                evaluated = objectives(dict(sorted(points.items())))
                points = {}
                for i, answer in evaluated.items():
                    answers[i].put(answer)
    finally:
        for i in going_on:  # an evaluation failed: nobody waits for ever
            answers[i].put(None)
    return [results[i] for i in range(len(starts))]


class _Abandoned(Exception):
    """Ends a minimisation whose evaluation failed."""


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
    lr: float = 3e-3,
    batch: int = 256,
    epochs: int = 10,
    least_steps: int = 300,
) -> tuple[Tensor, Tensor, float]:
    """Adam on standardised features; the rate falls to 0 along a cosine. Small datasets get more epochs."""
    generator = torch.Generator().manual_seed(seed)
    mean, std = scaling.mean.float(), scaling.std.float()
    weight = torch.zeros(utilities.shape[1], features.shape[1], requires_grad=True)
    bias = torch.zeros(utilities.shape[1], requires_grad=True)
    adam = torch.optim.Adam([weight, bias], lr=lr)
    epochs = max(epochs, -(-least_steps * batch // len(features)))
    steps = epochs * -(-len(features) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(features), generator=generator).split(batch):
            z = (features[rows] - mean) / std
            adam.zero_grad()
            gate_loss(loss, torch.addmm(bias, z, weight.T), utilities[rows]).backward()
            adam.step()
            schedule.step()
    weight, bias = weight.detach().double() / scaling.std, bias.detach().double()
    bias = bias - weight @ scaling.mean
    (value,), _, _ = _losses_and_gradient(features, [(loss, utilities)], weight, bias)
    return weight, bias, value
