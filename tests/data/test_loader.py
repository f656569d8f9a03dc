"""Training batches are endless, shared by the processes, grouped, and the same after a resume."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from eco_m2f.data.datasets import register_from_config
from eco_m2f.data.loader import SeededDataset, TrainBatches, build_train_loader


def take(batches: TrainBatches, count: int) -> list:
    return list(itertools.islice(iter(batches), count))


def indices(batches: list) -> list[int]:
    return [index for batch in batches for index, _ in batch]


def test_every_image_comes_once_in_each_round_in_another_order():
    drawn = indices(take(TrainBatches([False] * 10, 2, seed=3), 15))
    rounds = [drawn[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(r) == list(range(10)) for r in rounds) and rounds[0] != rounds[1] != rounds[2]
    assert drawn != indices(take(TrainBatches([False] * 10, 2, seed=4), 15))


@pytest.mark.parametrize("start", [1, 7, 23])
def test_a_later_start_goes_on_where_the_run_was(start):
    groups = [i % 3 == 0 for i in range(11)]
    batches = TrainBatches(groups, 2, seed=5)
    whole = take(batches, 30)
    batches.start = start
    assert take(batches, 30 - start) == whole[start:]


def test_processes_share_the_images_of_a_round():
    parts = [take(TrainBatches([False] * 12, 2, 0, rank, 3), 2) for rank in range(3)]
    assert sorted(i for part in parts for i in indices(part)) == list(range(12))
    alone = take(TrainBatches([False] * 12, 2, 0), 6)
    assert parts == [alone[rank::3] for rank in range(3)]


STEPS, SIZE = 30, 8  # of 4 batches of two


def steps_of(processes: int, groups: list[bool], first: int = 0) -> list[list]:
    """The batches of each step from `first` on, by pass and process."""
    count, parts = SIZE // 2 // processes, []
    for rank in range(processes):
        batches = TrainBatches(groups, 2, 7, rank, processes)
        batches.start = first * count
        parts.append(take(batches, (STEPS - first) * count))
    return [[part[s * count + i] for i in range(count) for part in parts] for s in range(STEPS - first)]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("groups", [[False] * 11, [i % 3 == 0 for i in range(11)]])
def test_a_step_has_the_same_batches_with_any_number_of_processes(processes, groups):
    """This also holds after a resume with another number."""
    alone = steps_of(1, groups)
    assert steps_of(processes, groups) == alone
    assert steps_of(processes, groups, first=13) == alone[13:]


def test_a_step_has_the_same_images_whatever_a_pass_takes():
    pairs, whole = steps_of(1, [False] * 11), take(TrainBatches([False] * 11, SIZE, 7), STEPS)
    assert [sum(step, []) for step in pairs] == whole


def test_a_batch_holds_wide_images_or_high_ones():
    groups = [i % 4 == 0 for i in range(16)]
    batches = take(TrainBatches(groups, 4, seed=1), 40)
    assert all(len({groups[i] for i, _ in batch}) == 1 for batch in batches)
    assert {len(batch) for batch in batches} == {4}
    assert max(Counter(indices(batches)).values()) - min(Counter(indices(batches)).values()) <= 2


def test_every_image_has_random_numbers_of_its_own():
    keys = [key for batch in take(TrainBatches([False] * 3, 2, seed=9), 50) for _, key in batch]
    assert len(set(keys)) == 100
    shared = [key for r in range(2) for batch in take(TrainBatches([False] * 3, 2, 9, r, 2), 25) for _, key in batch]
    assert set(shared) == set(keys)


def test_the_random_numbers_follow_the_key_and_leave_others_alone():
    dataset = SeededDataset(["a", "b"], lambda record: (record, np.random.rand(), np.random.randint(1 << 30)))
    np.random.seed(0)
    expected = np.random.rand(2).tolist()
    np.random.seed(0)
    first = np.random.rand()
    assert dataset[0, (1, 2)] == dataset[0, (1, 2)] != dataset[0, (1, 3)]
    assert dataset[0, (1, 2)][1:] == dataset[1, (1, 2)][1:]
    assert [first, np.random.rand()] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_maps_whole_batches(tree, forget, cfg, workers):
    register_from_config([f"name=own,{tree.spec}"])
    cfg.DATASETS.TRAIN = ("own",)
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 2, workers
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    cfg.INPUT.MIN_SCALE, cfg.INPUT.IMAGE_SIZE, cfg.INPUT.RANDOM_FLIP = 0.5, 64, "horizontal"
    first = list(itertools.islice(build_train_loader(cfg, seed=2), 3))
    again = list(itertools.islice(build_train_loader(cfg, seed=2), 3))
    other = list(itertools.islice(build_train_loader(cfg, seed=3), 3))
    assert all(sorted(x["image_id"] for x in batch) == [1, 2] for batch in first)

    def pixels(batches):
        return torch.stack([x["image"] for batch in batches for x in batch])

    assert torch.equal(pixels(first), pixels(again)) and not torch.equal(pixels(first), pixels(other))


def test_other_samplers_are_refused(cfg):
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    with pytest.raises(ValueError, match="SAMPLER_TRAIN.*RepeatFactorTrainingSampler"):
        build_train_loader(cfg, 0)
