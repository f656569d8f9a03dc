"""A tiny model with official names, and weights for it."""

import pytest
import torch
from checkpoint_files import SHAPES, Tree


@pytest.fixture
def model() -> Tree:
    return Tree(SHAPES)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}
