"""A small derived dataset in which depth helps a part of the images."""

import math

import numpy as np

from eco_m2f.derived import ShardWriter, make_row
from eco_m2f.derived.dataset import DerivedDataset
from eco_m2f.quality.statistics import ImageStatistics

EXITS = (2, 4, 6)
CATEGORIES = [{"id": 1, "name": "thing", "isthing": 1}, {"id": 7, "name": "stuff", "isthing": 0}]
GFLOPS = {2: 100.0, 4: 120.0, 6: 140.0}


def _segments(q: float) -> ImageStatistics:
    """One of each category is found, with an IoU of q."""
    return ImageStatistics(*np.array([[1, 7], [q, q], [1, 1], [0, 0], [0, 0]]))


def _pixels(q: float, count: int) -> ImageStatistics:
    """A part q of each category is found."""
    found, none = round(q * count), [0, 0]
    return ImageStatistics(*np.array([[1, 7], none, [found] * 2, none, [count - found] * 2]))


def make_derived(directory, n, seed, with_statistics=True, pixels=0, **changes):
    """The first feature is how deep an image should go. pixels: number counted by the statistics, of two categories."""
    provenance = {
        "exits": EXITS,
        "config": "",
        "checkpoint": "model.pth",
        "checkpoint_sha256": "0" * 64,
        "parent_sha256": "a" * 64,
        "feature_source": "res5",
        "dataset": f"toy_{seed}",
        "categories": CATEGORIES,
        "num_images": n,
        "code_version": "0",
        **changes,
    }
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        depth = rng.normal()
        need = min(math.exp(depth), 5.0)
        quality = [0.7 - 0.05 * need, 0.7 - 0.02 * need, 0.7]
        statistics = {k: _pixels(q, pixels) if pixels else _segments(q) for k, q in zip(EXITS, quality)}
        row = make_row(
            image_id=i,
            file_name=f"{i}.png",
            height=96,
            width=96,
            quality=quality,
            feature=[depth, *rng.normal(size=3)],
            statistics=statistics if with_statistics else {},
            total_gflops=[GFLOPS[k] for k in EXITS],
            encoder_gflops=[10.0 * k for k in EXITS],
        )
        rows.append(row)
    ShardWriter(directory, provenance, n, shard_size=n).write(0, rows)
    return DerivedDataset.load(directory)
