"""The gate: one linear layer from pooled backbone features to exits (Eq. 6), its file, and how it is fitted (Step C).

Fitting is softmax regression, and convex for the paper's loss. Beside the paper's optimizer, Adam, stands L-BFGS, which
runs to the optimum. Neither ever holds a copy of the features.
"""

import math
import pickle
from collections.abc import Mapping, Sequence
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


def fit_gate(
    features,
    quality,
    exits: Sequence[int],
    beta: float,
    max_exit: int,
    loss: str = "hard_ce",
    *,
    feature_source: str,
    parent_sha256: str,
    optimizer: str = "lbfgs",
    l2: float | None = None,
    seed: int = 0,
    costs=None,
    scaling: "Scaling | None" = None,
) -> Gate:
    """Fits the gate of one budget: softmax regression of the utilities' loss (Table T2) on the pooled features.

    features [N, C] float32; quality [N, E] at the exits; costs: see `utility`. The gate's exits are those <= max_exit.
    optimizer: "lbfgs" runs to the optimum of the whole set; "adam" is the paper's, in mini-batches, without weight
    decay (l2 is not used). l2 weighs half the squared norm of the weights on standardised features, beside the mean
    loss; C / N unless given, so that a small dataset is not learnt by heart. scaling: of these features, if known.
    The same arguments and number of threads give the same gate. Raises ValueError for shapes, exits, or values that
    do not fit.
    """
    features = torch.as_tensor(features)
    utilities = utility(quality, exits, beta, costs)[:, : len(exits_up_to(exits, max_exit))]  # [N, E']
    if features.dim() != 2 or len(features) != len(utilities) or len(features) == 0:
        raise ValueError(f"features must be [{len(utilities)}, C], one row per image, not {list(features.shape)}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}: choose one of {', '.join(OPTIMIZERS)}")
    l2 = features.shape[1] / len(features) if l2 is None else l2
    if not (math.isfinite(l2) and l2 >= 0):
        raise ValueError(f"l2 must be a finite number >= 0, not {l2}")
    scaling = scaling or Scaling.of(features, l2, seed)
    if optimizer == "lbfgs":
        weight, bias, loss_value = _fit_lbfgs(features, utilities, loss, scaling, l2, seed)
        fit = {"optimizer": "lbfgs", "l2": l2, "seed": seed, "train_loss": loss_value}
    else:
        weight, bias, loss_value = _fit_adam(features, utilities, loss, scaling, seed)
        fit = {"optimizer": "adam", "seed": seed, "train_loss": loss_value}
    gate_exits = exits_up_to(exits, max_exit)
    return Gate(weight.float(), bias.float(), gate_exits, beta, loss, feature_source, parent_sha256, fit)


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
        white = (sample - mean) / std
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


def _fit_lbfgs(
    features: Tensor, utilities: Tensor, loss: str, scaling: Scaling, l2: float, seed: int
) -> tuple[Tensor, Tensor, float]:
    """A large fit starts from the optimum of a sample, whose passes are cheap, and then takes a few over everything."""
    shape = utilities.shape[1], features.shape[1] + 1
    start = np.zeros(shape).ravel()
    minimise = partial(minimize, jac=True, method="L-BFGS-B")
    if len(features) > _SAMPLE:
        rows = _sample_rows(len(features), seed)
        sample = partial(_objective, features[rows], utilities[rows], loss, scaling, l2)
        start = minimise(sample, start, options={"maxiter": 12}).x
        del sample
    whole = partial(_objective, features, utilities, loss, scaling, l2)
    passes = 6 if len(features) > _SAMPLE else 200
    result = minimise(whole, start, options={"maxiter": passes, "ftol": 1e-7})
    v, bias = torch.from_numpy(result.x).view(shape).split([shape[1] - 1, 1], dim=1)
    return *scaling.fold(v, bias[:, 0]), float(result.fun)


def _objective(
    features: Tensor, utilities: Tensor, loss: str, scaling: Scaling, l2: float, flat: np.ndarray
) -> tuple[float, np.ndarray]:
    """The mean loss plus l2 / 2 |W|^2, and its gradient; flat holds V and the bias as its last column."""
    parameters = torch.from_numpy(flat).view(utilities.shape[1], -1)  # [E, C + 1]
    v, bias = parameters[:, :-1], parameters[:, -1]
    standard = scaling.standard(v)
    weight, bias = scaling.fold(v, bias)
    value, weight_grad, bias_grad = _loss_and_gradient(features, utilities, loss, weight, bias)
    v_grad = scaling.unfold_gradient(weight_grad, bias_grad) + l2 * scaling.unfold_standard(standard)
    gradient = torch.cat([v_grad, bias_grad[:, None]], dim=1)
    return value + 0.5 * l2 * standard.square().sum().item(), gradient.numpy().ravel()


def _loss_and_gradient(
    features: Tensor, utilities: Tensor, loss: str, weight: Tensor, bias: Tensor
) -> tuple[float, Tensor, Tensor]:
    """Block by block, so that nothing as large as the features is ever made. Returns float64 sums."""
    value, weight_grad, bias_grad = 0.0, torch.zeros_like(weight), torch.zeros_like(bias)
    weight, bias = weight.to(features), bias.to(features)
    for block, target in zip(features.split(_ROWS), utilities.split(_ROWS)):
        logits = torch.addmm(bias, block, weight.T).requires_grad_()  # [rows, E]
        part = gate_loss(loss, logits, target) * (len(block) / len(features))
        (gradient,) = torch.autograd.grad(part, logits)
        value += part.item()
        weight_grad += gradient.T @ block
        bias_grad += gradient.sum(dim=0)
    return value, weight_grad, bias_grad


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
    return weight, bias, _loss_and_gradient(features, utilities, loss, weight, bias)[0]
