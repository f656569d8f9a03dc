"""Random rows of a derived dataset, and their writer."""

import numpy as np
import torch

from eco_m2f.derived import ShardWriter, make_row
from eco_m2f.quality.panoptic_quality import image_pq
from eco_m2f.quality.statistics import ImageStatistics

EXITS = [2, 3, 6]
CATEGORIES = [{"id": i, "name": f"c{i}", "isthing": int(i % 2)} for i in (1, 2, 5, 6, 40)]
NUM_IMAGES, CHANNELS = 23, 4


def make_provenance(**changes):
    provenance = {
        "exits": EXITS,
        "config": "MODEL: {}",
        "checkpoint": "model_final.pth",
        "checkpoint_sha256": "0" * 64,
        "parent_sha256": "1" * 64,
        "feature_source": "res5",
        "dataset": "toy_train",
        "categories": CATEGORIES,
        "num_images": NUM_IMAGES,
        "code_version": "1.2.3",
    }
    return {**provenance, **changes}


def random_statistics(rng):
    """Statistics of one image, as from `image_statistics`: sorted, without empty categories."""
    ids = np.array(sorted(rng.choice([c["id"] for c in CATEGORIES], size=rng.integers(0, 4), replace=False)), np.int64)
    tp, fp, fn = rng.integers(0, 4, (3, len(ids)))
    fn = np.where(tp + fp + fn == 0, 1, fn)
    return ImageStatistics(ids, tp * rng.uniform(0.5, 1, len(ids)), tp, fp, fn)


def make_rows():
    rng = np.random.default_rng(0)
    rows = []
    for i in range(NUM_IMAGES):
        statistics = {k: random_statistics(rng) for k in EXITS}
        rows.append(
            make_row(
                image_id=100 + i,
                file_name=f"images/{i}.jpg",
                height=480 + i,
                width=640,
                quality=[image_pq(statistics[k]) for k in EXITS],
                feature=torch.from_numpy(rng.normal(size=CHANNELS)),
                statistics=statistics,
                total_gflops=[100.0 + 10 * k + i for k in EXITS],
                encoder_gflops=[10.0 * k + i for k in EXITS],
            )
        )
    return rows


ROWS = make_rows()


def write(directory, shards=None, shard_size=5, **changes):
    writer = ShardWriter(directory, make_provenance(**changes), NUM_IMAGES, shard_size)
    for shard in writer.missing() if shards is None else shards:
        writer.write(shard, [ROWS[i] for i in writer.indices(shard)])
    return writer
