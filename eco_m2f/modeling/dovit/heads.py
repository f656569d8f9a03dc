"""DoViT's heads, from a map of tokens to class logits, in detectron2's SEM_SEG_HEADS_REGISTRY.

A head is built with (cfg, {"tokens": ShapeSpec}), and called as `head(map [B, C, h, w]) -> logits
[B, num_classes, h, w]`. The model resizes the logits to the image.
"""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from .vit import Block, init_linear_layers, repeated


@SEM_SEG_HEADS_REGISTRY.register()
class NaiveHead(nn.Module):
    """A 1x1 convolution, a norm, ReLU and a classifier, for each token by itself.

    It is also the auxiliary head of each decision point.
    """

    @configurable
    def __init__(self, input_shape: dict[str, ShapeSpec], *, num_classes: int, hidden: int, norm: str):
        super().__init__()
        self.conv = nn.Conv2d(input_shape["tokens"].channels, hidden, 1, bias=False)
        self.norm = get_norm(norm, hidden)
        self.classifier = nn.Conv2d(hidden, num_classes, 1)

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        return {
            "input_shape": input_shape,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "hidden": cfg.MODEL.DOVIT.HEAD_DIM,
            "norm": cfg.MODEL.DOVIT.NORM,
        }

    def forward(self, features: Tensor) -> Tensor:
        # A map of tokens looks like channels last, and the weights' gradients would too: see `repeated`.
        return self.classifier(F.relu(self.norm(self.conv(features.contiguous()))))


@SEM_SEG_HEADS_REGISTRY.register()
class MaskTransformerHead(nn.Module):
    """Segmenter's head: class embeddings pass some layers together with the tokens (arXiv 2105.05633, section 3.2).

    The logit of a token and a class is the cosine of their projections. Each token's logits are then normalised.
    """

    @configurable
    def __init__(self, input_shape: dict[str, ShapeSpec], *, num_classes: int, num_heads: int, num_layers: int):
        super().__init__()
        dim = input_shape["tokens"].channels
        self.project = nn.Linear(dim, dim)
        self.class_embed = nn.Parameter(torch.empty(1, num_classes, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.project_tokens = nn.Linear(dim, dim, bias=False)
        self.project_classes = nn.Linear(dim, dim, bias=False)
        self.mask_norm = nn.LayerNorm(num_classes)
        nn.init.trunc_normal_(self.class_embed, std=0.02)
        init_linear_layers(self)
        for layer in (self.project_tokens, self.project_classes):
            nn.init.normal_(layer.weight, std=dim**-0.5)

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        return {
            "input_shape": input_shape,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "num_heads": cfg.MODEL.DOVIT.NUM_HEADS,
            "num_layers": cfg.MODEL.DOVIT.MASK_LAYERS,
        }

    def forward(self, features: Tensor) -> Tensor:
        batch, _, height, width = features.shape
        tokens = self.project(features.flatten(2).transpose(1, 2))  # [B, h * w, C]
        x = torch.cat((tokens, repeated(self.class_embed, batch)), dim=1)  # [B, h * w + K, C]
        lengths = [x.shape[1]] * batch
        flat = x.flatten(0, 1)  # [B * (h * w + K), C]
        for block in self.blocks:
            flat = block(flat, lengths)
        tokens, classes = self.norm(flat).view(x.shape).split([height * width, self.class_embed.shape[1]], dim=1)
        tokens = F.normalize(self.project_tokens(tokens), dim=-1)
        classes = F.normalize(self.project_classes(classes), dim=-1)
        logits = self.mask_norm(tokens @ classes.transpose(1, 2))  # [B, h * w, K]
        return logits.transpose(1, 2).unflatten(2, (height, width))
