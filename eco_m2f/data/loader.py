"""Training batches that depend only on the seed and the iteration. A resumed run therefore sees the same batches.

detectron2's loader starts from the beginning after a resume, and its augmentations depend on the worker process.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MetadataCatalog, get_detection_dataset_dicts
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from .batch_size import split_batch
from .images import DataError
from .mappers import build_train_mapper
from .sizes import are_wide


def build_train_loader(cfg: CfgNode, seed: int) -> DataLoader:
    """Endless batches of mapped images of DATASETS.TRAIN, one for each pass, see `split_batch`.

    Its `batch_sampler` is a `TrainBatches`, whose `start` can be set. Raises ValueError for another SAMPLER_TRAIN.
    """
    loader = cfg.DATALOADER
    if loader.SAMPLER_TRAIN != "TrainingSampler":
        raise ValueError(f"DATALOADER.SAMPLER_TRAIN must be TrainingSampler, not {loader.SAMPLER_TRAIN!r}")
    records = _records(cfg.DATASETS.TRAIN, loader.FILTER_EMPTY_ANNOTATIONS)
    groups = are_wide(records) if loader.ASPECT_RATIO_GROUPING else [False] * len(records)
    processes = comm.get_world_size()
    images = split_batch(cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.IMS_PER_GPU, processes).images
    batches = TrainBatches(groups, images, seed, comm.get_rank(), processes)
    dataset = SeededDataset(DatasetFromList(records, copy=False), build_train_mapper(cfg))
    return DataLoader(dataset, batch_sampler=batches, num_workers=loader.NUM_WORKERS, collate_fn=list)


def _records(names: Sequence[str], filter_empty: bool) -> list[dict]:
    """detectron2's dataset dicts. filter_empty: leave out images without boxes, or with only crowds."""
    try:
        return get_detection_dataset_dicts(names, filter_empty=filter_empty)
    except AssertionError as error:
        if not str(error).startswith("No valid data found"):
            raise
        files = [getattr(MetadataCatalog.get(name), "json_file", None) or name for name in names]
        raise DataError(
            f"{', '.join(map(str, files))}: no image has an object that is not a crowd, so there is nothing to learn: "
            "add objects to `annotations`"
        ) from error


class TrainBatches(Sampler):
    """Endless batches [(index, key of the image's random numbers), ...] of one process.

    The dataset is shuffled again and again and cut into batches. The processes take them in turn, so a step has the
    same batches with any number of processes. A batch holds images of one group, so that wide images are not padded to
    the height of high ones.
    """

    def __init__(self, groups: Sequence[bool], batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        """groups: whether each image is wide. `start` and `seed` may be set until the iteration begins."""
        self.groups = np.asarray(groups, dtype=np.int8)
        self.batch_size = batch_size
        self.rank, self.world_size = rank, world_size
        self.seed = seed
        self.start = 0  # number of batches to skip: those before the resume

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
        return itertools.islice(self._batches(), self.rank + self.start * self.world_size, None, self.world_size)

    def _batches(self) -> Iterator[list]:
        """The batches of all processes."""
        waiting = ([], [])
        for position, index in enumerate(self._indices()):
            batch = waiting[self.groups[index]]
            batch.append((index, (self.seed, position)))
            if len(batch) == self.batch_size:
                yield batch.copy()
                batch.clear()

    def _indices(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(len(self.groups), generator=generator).tolist()


class SeededDataset(Dataset):
    """Maps (index, key) to the mapped record. The key seeds the random numbers of the augmentations."""

    def __init__(self, records: Sequence[dict], mapper: Callable[[dict], dict]):
        self.records = records
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: tuple[int, tuple[int, ...]]) -> dict:
        index, key = item
        before = random.getstate(), np.random.get_state()
        words = np.random.SeedSequence(key).generate_state(4)
        np.random.seed(words)
        random.seed(int(words[0]))
        try:
            return self.mapper(self.records[index])
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
