"""A small model with official names, and checkpoints of it in every published format."""

import pickle
from pathlib import Path

import torch
from torch import nn

C, CLASSES, QUERIES = 4, 3, 5
# Official names with tiny shapes.
SHAPES = {
    "backbone.stem.conv1.weight": (2, 3, 7, 7),
    "backbone.stem.conv1.norm.weight": (2,),
    "backbone.res2.0.conv1.weight": (2, 2, 1, 1),
    "sem_seg_head.pixel_decoder.input_proj.0.0.weight": (C, 2, 1, 1),
    "sem_seg_head.pixel_decoder.transformer.level_embed": (3, C),
    "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.linear1.weight": (C, C),
    "sem_seg_head.pixel_decoder.transformer.encoder.layers.1.linear1.weight": (C, C),
    "sem_seg_head.pixel_decoder.adapter_1.norm.weight": (C,),
    "sem_seg_head.predictor.query_feat.weight": (QUERIES, C),
    "sem_seg_head.predictor.class_embed.weight": (CLASSES + 1, C),
    "sem_seg_head.predictor.class_embed.bias": (CLASSES + 1,),
    "criterion.empty_weight": (CLASSES + 1,),
}


class Tree(nn.Module):
    """Modules nested by the dots in the names, with parameters of the given shapes."""

    def __init__(self, shapes: dict[str, tuple]):
        super().__init__()
        for name, shape in shapes.items():
            *path, leaf = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(leaf, nn.Parameter(torch.randn(shape)))


def legacy(weights: dict) -> dict:
    """The names of the oldest published files."""
    new = {k.replace("sem_seg_head.pixel_decoder.", "sem_seg_head."): v for k, v in weights.items()}
    return {k.replace("query_feat", "static_query"): v for k, v in new.items()}


def distributed(weights: dict) -> dict:
    return {"module." + k: v for k, v in weights.items()}


STYLES = {"current": dict, "legacy": legacy, "distributed": distributed, "both": lambda w: distributed(legacy(w))}


def write_pkl(path: Path, data, protocol: int = 2) -> str:
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    return str(path)


def write_pth(path: Path, data) -> str:
    torch.save(data, path)
    return str(path)


def assert_loaded(model: nn.Module, weights: dict) -> None:
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(state[name], value), name
