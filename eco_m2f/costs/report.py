"""A report on a model: its parameters, its costs for one image, and the mean costs of many images."""

from collections.abc import Iterable, Mapping, Sequence
from math import prod

from torch import nn

from .exits import ExitCosts
from .sizes import padded_size
from .table import CostTable


def analyze(
    model: nn.Module,
    size: Sequence[int] | None = None,
    images: Iterable[tuple[Sequence[int], Sequence[int]]] = (),
    costs: CostTable | None = None,
) -> dict:
    """Parameters and costs of a model, for JSON.

    Args:
        model: a `Parent`, with or without early exits. With `costs`, any model with `size_divisibility` and
            `cost_parts`.
        size: (height, width) of an image that is resized neither before nor after the model.
        images: (size of the model's input, size of the result) of each image of the mean.
        costs: the cost table; default: the costs of the model's exits.

    Returns:
        "model", "params" (without a gate's), "params_by_part", "convention", and
        - for `size`: "size", "padded_size", "exits" {exit: `ExitCosts.details`};
        - for `images`: "mean" {"num_images", "padded_area" (pixels), "exits"}; without `size` also "exits".
        With `costs`, their `key` replaces "exits".

    Raises:
        ValueError: there is neither size nor image, a size is not valid, or the model is of another kind.
    """
    costs = ExitCosts(model) if costs is None else costs
    params = parameter_counts(model)
    report = {
        "model": type(model).__name__,
        "params": params.pop("total"),
        "params_by_part": params,
        "convention": dict(costs.convention),
    }
    if size is not None:
        padded = padded_size(size, model.size_divisibility)
        report |= {"size": list(size), "padded_size": list(padded), costs.key: costs.details(padded, size)}
    images = [(padded_size(given, model.size_divisibility), wanted) for given, wanted in images]
    if images or size is None:
        area = sum(prod(padded) for padded, _ in images) / max(1, len(images))
        report["mean"] = {"num_images": len(images), "padded_area": area, costs.key: costs.mean(images)}
        report.setdefault(costs.key, report["mean"][costs.key])
    return report


def format_report(report: dict, costs: CostTable | type[CostTable] = ExitCosts) -> str:
    """The report of `analyze` for such costs, as text for a terminal."""
    parts = ", ".join(f"{name.replace('_', ' ')} {n / 1e6:.3f}" for name, n in report["params_by_part"].items() if n)
    lines = [f"{report['model']}: {report['params'] / 1e6:.3f} M parameters ({parts})"]
    if "size" in report:
        size, padded = ("x".join(map(str, report[name])) for name in ("size", "padded_size"))
        lines += ["", f"GFLOPs of an image of {size}, padded to {padded}", *_table(report[costs.key], costs.column)]
    if "mean" in report:
        mean = report["mean"]
        lines += ["", f"Mean GFLOPs of {mean['num_images']} images, {mean['padded_area']:.0f} pixels with padding"]
        lines += _table(mean[costs.key], costs.column)
    return "\n".join([*lines, "", *(f"{name}: {text}" for name, text in report["convention"].items())])


def _table(settings: Mapping[object, Mapping[str, float]], heading: str) -> list[str]:
    columns = list(next(iter(settings.values())))
    first = max(len(heading), *(len(str(k)) for k in settings))
    rows = [
        "  ".join([f"{k:>{first}}", *(f"{gflops[c]:>{len(c)}.3f}" for c in columns)]) for k, gflops in settings.items()
    ]
    return ["  ".join([f"{heading:>{first}}", *columns]), *rows]


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """The number of parameters of each part, and their sum "total". "other" is in no part. Buffers do not count.

    A model with early exits also has "exit_policy", the number of the policy's weights, which is not in the total.
    """
    model = getattr(model, "module", model)
    prefixes = {"backbone": "backbone.", **model.cost_parts}
    count = dict.fromkeys(prefixes, 0)
    for name, p in model.named_parameters():
        if not name.startswith("exit_policy."):
            part = next((part for part, prefix in prefixes.items() if name.startswith(prefix)), "other")
            count[part] = count.get(part, 0) + p.numel()
    count = {"total": sum(count.values()), **count}
    if hasattr(model, "exit_policy"):
        count["exit_policy"] = getattr(model.exit_policy, "num_weights", 0)
    return count
