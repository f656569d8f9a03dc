"""What of a padded map belongs to an image, and the mean over it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def covered(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """(rows, columns) of a map that an image of `size` (height, width) covers, from the top left."""
    return -(-int(size[0]) // stride), -(-int(size[1]) // stride)


def pool_valid(feature_map: Tensor, image_sizes: Sequence[tuple[int, int]], stride: int) -> Tensor:
    """The mean over the tokens that an image covers, its padding left out: [B, C, h, w] -> [B, C].

    image_sizes: B pairs (height, width) in pixels before padding; an image covers ceil(height / stride) rows and
    ceil(width / stride) columns from the top left. Computed in float32 at least. Raises ValueError for an image that
    is empty or larger than its map.
    """
    if len(image_sizes) != len(feature_map):
        raise ValueError(f"{len(image_sizes)} image sizes for a batch of {len(feature_map)}")
    dtype = torch.promote_types(feature_map.dtype, torch.float32)
    pooled = []
    for tokens, (height, width) in zip(feature_map, image_sizes):  # tokens: [C, h, w]
        rows, columns = covered((height, width), stride)
        if not (1 <= rows <= tokens.shape[1] and 1 <= columns <= tokens.shape[2]):
            raise ValueError(f"an image of {height} x {width} does not fit the map {list(tokens.shape)} at 1/{stride}")
        # flattened to one contiguous axis, so that the sum runs in the same order whatever the padding
        pooled.append(tokens[:, :rows, :columns].to(dtype).flatten(1).contiguous().mean(dim=1))
    return torch.stack(pooled) if pooled else feature_map.new_zeros((0, feature_map.shape[1]), dtype=dtype)
