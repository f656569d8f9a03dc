"""The part of a padded map that an image covers, and the mean over it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def covered(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """(rows, columns) that an image of `size` (height, width) covers on a map, from the top left."""
    return -(-int(size[0]) // stride), -(-int(size[1]) // stride)


def pool_valid(feature_map: Tensor, image_sizes: Sequence[tuple[int, int]], stride: int) -> Tensor:
    """The mean over the tokens of each image, without padding: [B, C, h, w] -> [B, C], at least float32.

    image_sizes: B pairs (height, width) in pixels before padding. An image covers ceil(height / stride) rows and
    ceil(width / stride) columns from the top left. Raises ValueError for an image that is empty or larger than its map.
    """
    if len(image_sizes) != len(feature_map):
        raise ValueError(f"{len(image_sizes)} image sizes for a batch of {len(feature_map)}")
    dtype = torch.promote_types(feature_map.dtype, torch.float32)
    pooled = []
    for tokens, (height, width) in zip(feature_map, image_sizes):  # tokens: [C, h, w]
        rows, columns = covered((height, width), stride)
        if not (1 <= rows <= tokens.shape[1] and 1 <= columns <= tokens.shape[2]):
            raise ValueError(f"an image of {height} x {width} does not fit the map {list(tokens.shape)} at 1/{stride}")
        # One contiguous axis: the order of summation must not depend on the padding.
        pooled.append(tokens[:, :rows, :columns].to(dtype).flatten(1).contiguous().mean(dim=1))
    return torch.stack(pooled) if pooled else feature_map.new_zeros((0, feature_map.shape[1]), dtype=dtype)
