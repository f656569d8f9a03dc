"""DETR's encoder with padding, and with several maps; the contract of the other encoders is in test_encoders.py."""

import pytest
import torch

from eco_m2f.modeling.encoders.dense import DetrEncoder
from eco_m2f.modeling.layers import xavier_matrices_


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    encoder = DetrEncoder(dim=32, num_layers=4, num_heads=8, dim_feedforward=64, dropout=0.0)
    xavier_matrices_(encoder)
    return encoder.eval()


@torch.no_grad()
def test_padding_is_not_looked_at(encoder):
    torch.manual_seed(1)
    x, pos = torch.randn(1, 32, 4, 6), torch.randn(1, 32, 4, 6)
    padding = torch.ones(1, 4, 6, dtype=torch.bool)
    padding[:, :3, :4] = False
    padded = encoder([x], [pos], [4], [padding])[4][0][..., :3, :4]
    alone = encoder([x[..., :3, :4]], [pos[..., :3, :4]], [4])[4][0]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(padded, encoder([x], [pos], [4])[4][0][..., :3, :4], atol=1e-3)
    nothing = torch.zeros_like(padding)
    torch.testing.assert_close(encoder([x], [pos], [4], [nothing])[4][0], encoder([x], [pos], [4])[4][0])
