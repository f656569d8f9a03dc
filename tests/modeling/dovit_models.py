"""Small models and images for the tests of DoViT."""

import math

import torch
import torch.nn.functional as F
from minis import build, fill

from eco_m2f.modeling.dovit.vit import Block, TokenPassViT

CONFIG = "toy/dovit_toy.yaml"


MINI = [
    *("MODEL.DEVICE", "cpu", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5, "MODEL.DOVIT.HEAD_DIM", 12),
    *("MODEL.DOVIT.EMBED_DIM", 24, "MODEL.DOVIT.DEPTH", 4, "MODEL.DOVIT.PRETRAIN_IMG_SIZE", 32),
    *("MODEL.DOVIT.DECISION_LAYERS", [1, 3], "SOLVER.MAX_ITER", 11),
]


STOP = 0.6  # a threshold at which tokens of the mini model stop at both points, in numbers that differ by image


def mini_model(*opts):
    return fill(build(CONFIG, *MINI, *opts, mini=False))


def mini_vit(depth=4, decisions=(1, 3), side=32) -> TokenPassViT:
    vit = TokenPassViT(patch_size=8, dim=24, depth=depth, num_heads=3, image_size=side, decision_layers=decisions)
    return fill(vit).eval()


def photos(*sizes) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    return [
        {"image": torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8), "height": 40, "width": 50}
        for size in sizes
    ]


def drawn_rule(seed=0, share=0.4):
    """Stops random tokens, and records its inputs and its decisions."""
    generator, seen, said = torch.Generator().manual_seed(seed), [], []

    def stop(point, features):
        seen.append(features)
        said.append(torch.rand(features[:, 0].shape, generator=generator) < share)
        return said[-1]

    stop.seen, stop.said = seen, said
    return stop


def masked_layer(block: Block, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """A layer over all tokens [n, C] of one image. Tokens that are not kept are masked as keys, and not updated."""
    q, k, v = block.attn.qkv(block.norm1(x)).view(len(x), 3, block.attn.num_heads, -1).permute(1, 2, 0, 3)
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~kept, -math.inf).softmax(-1)
    y = x + block.attn.proj((weights @ v).transpose(0, 1).flatten(1))
    y = y + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(y))))
    return torch.where(kept[:, None], y, x)


def stopping_model(*opts):
    return mini_model("MODEL.DOVIT.THRESHOLD", STOP, *opts)
