"""DETR's encoder under the contract of the other encoders, with one map and with padding."""

import pytest
import torch

from eco_m2f.modeling.detr.transformer import DetrEncoder
from eco_m2f.modeling.layers import xavier_matrices_


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    encoder = DetrEncoder(dim=32, num_layers=4, num_heads=8, dim_feedforward=64, dropout=0.0)
    xavier_matrices_(encoder)
    return encoder.eval()


def inputs(batch=2, shapes=((4, 6),)):
    torch.manual_seed(1)
    return [torch.randn(batch, 32, *s) for s in shapes], [torch.randn(1, 32, *s) for s in shapes]


@pytest.mark.parametrize("shapes", [((4, 6),), ((2, 3), (4, 6))])
@torch.no_grad()
def test_returns_every_exit_with_the_shapes_of_its_input(encoder, shapes):
    maps, pos = inputs(shapes=shapes)
    out = encoder(maps, pos, encoder.exits)
    assert tuple(sorted(out)) == encoder.exits == (1, 2, 3, 4)
    for k in encoder.exits:
        assert [m.shape for m in out[k]] == [m.shape for m in maps]
        assert all(m.isfinite().all() for m in out[k])


@torch.no_grad()
def test_an_exit_does_not_depend_on_which_others_are_asked_for(encoder):
    maps, pos = inputs()
    together = encoder(maps, pos, encoder.exits)
    for k in encoder.exits:
        alone = encoder(maps, pos, [k])
        assert list(alone) == [k] and torch.equal(alone[k][0], together[k][0])


@torch.no_grad()
def test_images_of_a_batch_do_not_meet(encoder):
    (x,), pos = inputs()
    torch.testing.assert_close(encoder([x], pos, [4])[4][0][1:], encoder([x[1:]], pos, [4])[4][0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_is_not_looked_at(encoder):
    (x,), (pos,) = inputs(batch=1)
    padding = torch.ones(1, 4, 6, dtype=torch.bool)
    padding[:, :3, :4] = False
    padded = encoder([x], [pos], [4], [padding])[4][0][..., :3, :4]
    alone = encoder([x[..., :3, :4]], [pos[..., :3, :4]], [4])[4][0]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(padded, encoder([x], [pos], [4])[4][0][..., :3, :4], atol=1e-3)


def test_unknown_exits_are_refused(encoder):
    for wrong in ([], [0], [5]):
        with pytest.raises(ValueError, match="exits"):
            encoder(*inputs(), wrong)


def test_every_parameter_up_to_an_exit_learns_from_it(encoder):
    encoder(*inputs(), [4])[4][0].square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    encoder.zero_grad(set_to_none=True)


def test_an_encoder_without_layers_is_refused():
    with pytest.raises(ValueError, match="ENC_LAYERS"):
        DetrEncoder(32, 0, 8, 64, 0.0)
