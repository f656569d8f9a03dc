"""A row of the derived dataset: all that Step B says of one image."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..quality.statistics import ImageStatistics


def make_row(
    *,
    image_id: str | int,
    file_name: str,
    height: int,
    width: int,
    quality: Sequence[float],
    feature: Sequence[float] | np.ndarray,
    statistics: Mapping[int, ImageStatistics],
    total_gflops: Sequence[float],
    encoder_gflops: Sequence[float],
) -> dict:
    """One image as `ShardWriter.write` takes it. statistics: {exit: statistics}; empty where the quality is no sum."""
    entries = [(k, statistics[k]) for k in sorted(statistics)]

    def flat(name: str, dtype: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(np.asarray(getattr(s, name), dtype) for _, s in entries)])

    return {
        "image_id": str(image_id),
        "file_name": str(file_name),
        "height": int(height),
        "width": int(width),
        "quality": np.asarray(quality, np.float64),
        "feature": np.asarray(feature, np.float32),
        "total_gflops": np.asarray(total_gflops, np.float64),
        "encoder_gflops": np.asarray(encoder_gflops, np.float64),
        "stat_exit": np.repeat([k for k, _ in entries], [len(s.category_id) for _, s in entries]).astype(np.int32),
        "stat_category": flat("category_id", np.int32),
        "stat_iou": flat("iou", np.float64),
        "stat_tp": flat("tp", np.int32),
        "stat_fp": flat("fp", np.int32),
        "stat_fn": flat("fn", np.int32),
    }
