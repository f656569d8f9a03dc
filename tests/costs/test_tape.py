"""What operators cost, by hand."""

import pytest
import torch
from torch import nn

from eco_m2f.costs import OpTape
from eco_m2f.modeling.encoders.msdeform import MSDeformEncoderLayer


def flops_on_tape(module, *inputs) -> int:
    tape = OpTape()
    with torch.inference_mode(), tape:
        out = module(*inputs)
    return sum(op.flops for op in tape.ancestors([out]))


def test_an_encoder_layer_by_hand():
    dim, hidden, heads, levels, points = 8, 24, 2, 2, 4
    layer = MSDeformEncoderLayer(dim, hidden, 0.0, levels, heads, points).to("meta").eval()
    shapes = [(1, 2), (2, 4)]
    tokens = 10
    x, pos, reference = (torch.empty(1, tokens, n, device="meta") for n in (dim, dim, 2))
    linear = dim * (dim + 2 * heads * levels * points + heads * levels * points + dim + hidden) + hidden * dim
    assert flops_on_tape(layer, x, pos, reference[:, :, None], shapes) == tokens * (linear + 2 * 5 * dim)


def attention(masked: bool):
    mask = torch.ones(1, 1, 5, 7, dtype=torch.bool) if masked else None
    return lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, mask)


LAYERS = {
    "conv": (nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), [(1, 6, 5, 7)], 3 * 4 * 8 * 3 * 9),
    "transposed conv": (nn.ConvTranspose2d(6, 8, 2, stride=2), [(1, 6, 3, 5)], 15 * 6 * 8 * 4),
    "linear": (nn.Linear(5, 7), [(2, 3, 5)], 6 * 5 * 7),
    "matrix product": (torch.matmul, [(2, 3, 5), (2, 5, 7)], 2 * 3 * 5 * 7),
    "einsum": (lambda a, b: torch.einsum("bqc,bchw->bqhw", a, b), [(2, 3, 5), (2, 5, 4, 6)], 2 * 3 * 5 * 24),
    "layer norm": (nn.LayerNorm(5), [(2, 3, 5)], 5 * 30),
    "layer norm without weights": (nn.LayerNorm(5, elementwise_affine=False), [(2, 3, 5)], 4 * 30),
    "group norm": (nn.GroupNorm(2, 6), [(1, 6, 3, 5)], 5 * 90),
    "batch norm": (nn.BatchNorm2d(6).eval(), [(1, 6, 3, 5)], 2 * 90),
    "bilinear": (nn.Upsample((4, 7), mode="bilinear"), [(1, 6, 3, 5)], 4 * 6 * 28),
    "nearest": (nn.Upsample((4, 7)), [(1, 6, 3, 5)], 6 * 28),
    "attention": (attention(masked=False), [(1, 2, 5, 3), (1, 2, 7, 3), (1, 2, 7, 4)], 2 * 5 * 7 * (3 + 4)),
    "masked attention": (attention(masked=True), [(1, 2, 5, 3), (1, 2, 7, 3), (1, 2, 7, 4)], 2 * 5 * 7 * 4),
    "what does not count": (lambda x: nn.MaxPool2d(2)(x.softmax(1) + x.relu()), [(1, 6, 4, 4)], 0),
}


@pytest.mark.parametrize("module, shapes, flops", LAYERS.values(), ids=LAYERS)
def test_an_operator_by_hand(module, shapes, flops):
    assert flops_on_tape(module, *(torch.randn(shape) for shape in shapes)) == flops


def test_what_nothing_depends_on_does_not_count():
    def forward(x):
        torch.mm(x, x)
        return x @ x[:, :2]

    assert flops_on_tape(forward, torch.randn(3, 3)) == 3 * 3 * 2
