"""Chooses the costs of a model by its parts: `auxiliary_heads` stop tokens, `exits` are early exits."""

from collections.abc import Mapping, Sequence

from torch import nn

from .exits import ExitCosts
from .table import CostTable
from .tokens import TokenCosts, TokenTable


def cost_table(model: nn.Module, shares: Mapping[str, Sequence[float]] | None = None) -> CostTable:
    """The costs of a model by its exits. For a `DoViT`: static, and with these shares of tokens that go on.

    Raises:
        ValueError: the model has no exits, or a share is not valid.
    """
    model = getattr(model, "module", model)
    return TokenTable(model, shares or {}) if hasattr(model, "auxiliary_heads") else ExitCosts(model)


def costs_of_results(model: nn.Module) -> ExitCosts | TokenCosts | None:
    """The costs of an image by its result's exit or tokens. None if results of this model have neither."""
    model = getattr(model, "module", model)
    if hasattr(model, "exits"):
        return ExitCosts(model)
    return TokenCosts.of(model) if hasattr(model, "auxiliary_heads") else None
