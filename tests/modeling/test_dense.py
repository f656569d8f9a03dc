"""DETR's encoder with padding, and with several maps. The contract of encoders is in test_encoders.py."""

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


@torch.no_grad()
def test_a_run_is_resumed_with_the_padding_of_the_images_that_stay(encoder):
    torch.manual_seed(2)
    x, pos = torch.randn(3, 32, 4, 6), torch.randn(3, 32, 4, 6)
    padding = torch.zeros(3, 4, 6, dtype=torch.bool)
    padding[1, 2:], padding[2, :, 3:] = True, True
    wanted = encoder([x], [pos], encoder.exits, [padding])
    state = encoder.start([x], [pos], [padding])
    for k in encoder.exits:
        state, maps = encoder.advance(state, k)
        assert torch.equal(maps[0], wanted[k][0])
    state, _ = encoder.advance(encoder.start([x], [pos], [padding]), 2)
    _, maps = encoder.advance(state.take(torch.tensor([0, 2])), 4)
    torch.testing.assert_close(maps[0], wanted[4][0][[0, 2]], atol=1e-5, rtol=1e-5)
    _, wrong = encoder.advance(state.take(torch.tensor([0, 1])), 4)
    assert not torch.allclose(wrong[0][1], maps[0][1], atol=1e-3)
