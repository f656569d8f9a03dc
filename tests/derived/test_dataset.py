"""The derived dataset reads the same however it was written, and its sums are exact."""

import json
import math

import numpy as np
import pytest
import torch
from derived_at_random import (
    CATEGORIES,
    EXITS,
    NUM_IMAGES,
    ROWS,
    make_provenance,
    write,
)

from eco_m2f.checkpoint.parent_hash import parent_sha256
from eco_m2f.derived import MANIFEST, PROVENANCE_KEYS, DerivedDatasetError
from eco_m2f.derived.dataset import DerivedDataset
from eco_m2f.derived.writer import ShardWriter
from eco_m2f.exits import exit_targets


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = tmp_path_factory.mktemp("derived")
    write(directory)
    return DerivedDataset.load(directory)


def test_what_is_written_is_read(dataset):
    assert len(dataset) == NUM_IMAGES and dataset.exits == tuple(EXITS)
    assert dataset.image_ids == [str(100 + i) for i in range(NUM_IMAGES)]
    assert dataset.file_names[3] == "images/3.jpg" and dataset.sizes[3].tolist() == [483, 640]
    for name, column in [("quality", "quality"), ("features", "feature"), ("total_gflops", "total_gflops")]:
        assert np.array_equal(getattr(dataset, name), np.stack([row[column] for row in ROWS]))
    assert np.array_equal(dataset.encoder_gflops, np.stack([row["encoder_gflops"] for row in ROWS]))
    assert dataset.features.dtype == np.float32 and dataset.quality.dtype == np.float64
    assert dataset.provenance == make_provenance() and set(dataset.provenance) == set(PROVENANCE_KEYS)


def test_another_quality_than_pq_is_named_and_pq_leaves_no_trace(dataset, tmp_path):
    """So derived datasets of PQ are byte for byte the same as before other qualities existed."""
    assert dataset.quality_name == "PQ"
    write(tmp_path / "ap", measure="AP")
    assert DerivedDataset.load(tmp_path / "ap").quality_name == "AP"
    assert DerivedDataset.load(tmp_path / "ap").subset([1, 2]).quality_name == "AP"
    assert "measure" not in json.loads((write(tmp_path / "pq").directory / MANIFEST).read_text())
    with pytest.raises(DerivedDatasetError, match="measure: 'AP' there, None now"):
        write(tmp_path / "ap")


def pq_from_dense_sums(choice):
    """PQ by definition, from dense per-category sums in plain Python."""
    sums = {c["id"]: [0.0, 0, 0, 0] for c in CATEGORIES}
    for row, k in zip(ROWS, choice):
        for j in np.flatnonzero(row["stat_exit"] == k):
            for n, key in enumerate(("stat_iou", "stat_tp", "stat_fp", "stat_fn")):
                sums[row["stat_category"][j]][n] += row[key][j]

    def mean(categories):
        values = [sums[i][0] / (sums[i][1] + sums[i][2] / 2 + sums[i][3] / 2) for i in categories if any(sums[i][1:])]
        return sum(values) / len(values) if values else math.nan

    return {
        "pq": mean(sums),
        "pq_things": mean([c["id"] for c in CATEGORIES if c["isthing"]]),
        "pq_stuff": mean([c["id"] for c in CATEGORIES if not c["isthing"]]),
    }


@pytest.mark.parametrize("seed", range(8))
def test_pq_of_any_assignment_is_exact(dataset, seed):
    choice = np.random.default_rng(seed).choice(EXITS, NUM_IMAGES)
    assert dataset.exact_quality(choice) == pytest.approx(pq_from_dense_sums(choice), rel=1e-12)


def test_pq_equals_panopticapis(dataset):
    from panopticapi.evaluation import PQStat

    choice = np.random.default_rng(9).choice(EXITS, NUM_IMAGES)
    stat = PQStat()
    for row, k in zip(ROWS, choice):
        for j in np.flatnonzero(row["stat_exit"] == k):
            category = stat[int(row["stat_category"][j])]
            category.iou += row["stat_iou"][j]
            category.tp += row["stat_tp"][j]
            category.fp += row["stat_fp"][j]
            category.fn += row["stat_fn"][j]
    categories = {c["id"]: c for c in CATEGORIES}
    for name, isthing in [("pq", None), ("pq_things", True), ("pq_stuff", False)]:
        expected, _ = stat.pq_average(categories, isthing=isthing)
        assert dataset.exact_quality(choice)[name] == pytest.approx(expected["pq"], rel=1e-12)


def test_pq_of_one_image_is_its_quality(dataset):
    counted = 0
    for i, row in enumerate(ROWS):
        for column, k in enumerate(EXITS):
            if k in row["stat_exit"]:
                assert dataset.subset([i]).exact_quality([k])["pq"] == pytest.approx(dataset.quality[i, column])
                counted += 1
            else:
                assert dataset.quality[i, column] == 0.0
    assert counted > 30


def test_means_are_over_the_chosen_exits(dataset):
    choice = np.random.default_rng(1).choice(EXITS, NUM_IMAGES)
    column = [EXITS.index(k) for k in choice]
    assert dataset.mean_exit(choice) == pytest.approx(np.mean(choice))
    assert dataset.mean_quality(choice) == pytest.approx(np.mean([r["quality"][c] for r, c in zip(ROWS, column)]))
    expected = {
        "total": np.mean([r["total_gflops"][c] for r, c in zip(ROWS, column)]),
        "encoder": np.mean([r["encoder_gflops"][c] for r, c in zip(ROWS, column)]),
    }
    assert dataset.mean_gflops(choice) == pytest.approx(expected)


def test_choices_that_do_not_fit_are_refused(dataset):
    with pytest.raises(ValueError, match=r"exits \[4\] are chosen, .* has \[2, 3, 6\]"):
        dataset.exact_quality([4] * NUM_IMAGES)
    with pytest.raises(ValueError, match="each of 23 images"):
        dataset.mean_gflops([2, 3])


def test_targets_come_from_the_stored_quality(dataset):
    targets = exit_targets(dataset.quality, dataset.exits, beta=0.0, max_exit=6)
    assert targets.tolist() == [EXITS[int(np.argmax(row["quality"]))] for row in ROWS]


def test_subset_keeps_everything_together(dataset):
    rows = [7, 2, 19]
    part = dataset.subset(rows)
    assert part.image_ids == ["107", "102", "119"] and part.provenance["num_images"] == 3
    assert np.array_equal(part.features, dataset.features[rows]) and np.array_equal(part.sizes, dataset.sizes[rows])
    mask = np.isin(np.arange(NUM_IMAGES), rows)
    for k in EXITS:
        whole = dataset.statistics.total(np.where(mask, EXITS.index(k), 0))
        others = dataset.subset(~mask).statistics.total(np.zeros(NUM_IMAGES - 3, int))
        total = part.statistics.total(np.full(3, EXITS.index(k)))
        sums = dict(zip(whole.category_id.tolist(), whole.tp - 0))
        for sign, statistics in ((-1, others), (-1, total)):
            for category, tp in zip(statistics.category_id.tolist(), statistics.tp):
                sums[category] += sign * tp
        assert not any(sums.values())


def test_without_features(tmp_path):
    write(tmp_path)
    assert DerivedDataset.load(tmp_path, with_features=False).features is None


def test_without_statistics_there_is_no_pq(tmp_path):
    writer = ShardWriter(tmp_path, make_provenance(num_images=1), num_images=1)
    writer.write(0, [{**ROWS[0], **{key: ROWS[0][key][:0] for key in ROWS[0] if key.startswith("stat_")}}])
    dataset = DerivedDataset.load(tmp_path)
    assert not dataset.has_statistics and dataset.mean_quality([2]) == ROWS[0]["quality"][0]
    with pytest.raises(DerivedDatasetError, match="no statistics of PQ"):
        dataset.exact_quality([2])


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_bytes_do_not_depend_on_the_number_of_ranks(tmp_path, world_size):
    write(tmp_path / "one")
    taken = []
    for rank in reversed(range(world_size)):
        writer = ShardWriter(tmp_path / "many", make_provenance(), NUM_IMAGES, 5)
        for shard in writer.missing(rank, world_size):
            writer.write(shard, [ROWS[i] for i in writer.indices(shard)])
            taken.append(shard)
    assert sorted(taken) == list(range(5))
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "many").iterdir()) and len(names) == 6
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


def test_rows_do_not_depend_on_the_shard_size(tmp_path, dataset):
    write(tmp_path, shard_size=9)
    other = DerivedDataset.load(tmp_path)
    assert other.image_ids == dataset.image_ids and np.array_equal(other.features, dataset.features)
    assert other.exact_quality([3] * NUM_IMAGES) == dataset.exact_quality([3] * NUM_IMAGES)


def test_resuming_writes_what_is_missing(tmp_path, dataset):
    write(tmp_path, shards=[0, 3])
    with pytest.raises(DerivedDatasetError, match=r"lacks 3 of 5 shards \(1, 2, 4\)"):
        DerivedDataset.load(tmp_path)
    before = (tmp_path / "shard-00003.parquet").stat().st_mtime_ns
    writer = write(tmp_path)
    assert writer.missing() == [] and (tmp_path / "shard-00003.parquet").stat().st_mtime_ns == before
    assert np.array_equal(DerivedDataset.load(tmp_path).quality, dataset.quality)


def test_another_provenance_is_refused_by_name(tmp_path):
    write(tmp_path, shards=[0])
    with pytest.raises(DerivedDatasetError, match="checkpoint: 'model_final.pth' there, 'b.pth' now; dataset: "):
        write(tmp_path, checkpoint="b.pth", dataset="toy_val")
    with pytest.raises(DerivedDatasetError, match="These keys differ: shard_size: 5 there, 6 now"):
        write(tmp_path, shard_size=6)
    assert json.loads((tmp_path / MANIFEST).read_text())["checkpoint"] == "model_final.pth"


def test_incomplete_provenance_is_refused(tmp_path):
    provenance = make_provenance(extra=1)
    del provenance["categories"]
    with pytest.raises(ValueError, match=r"lacks \['categories'\] and has unknown keys \['extra'\]"):
        ShardWriter(tmp_path, provenance, NUM_IMAGES)
    with pytest.raises(ValueError, match="says 23 images, but num_images is 24"):
        ShardWriter(tmp_path, make_provenance(), 24)
    with pytest.raises(ValueError, match="increasing order"):
        ShardWriter(tmp_path, make_provenance(exits=[6, 2]), NUM_IMAGES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "foreign", "empty"])
def test_a_damaged_shard_is_noticed_and_written_again(tmp_path, caplog, damage):
    write(tmp_path)
    path = tmp_path / "shard-00002.parquet"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[200] ^= 0xFF  # in a data page: only its checksum shows it
    write(tmp_path / "other", checkpoint="other.pth")
    foreign = (tmp_path / "other" / path.name).read_bytes()
    bad = {"truncated": good[:-100], "overwritten": bytes(flipped), "foreign": foreign, "empty": b""}
    path.write_bytes(bad[damage])
    with pytest.raises(DerivedDatasetError, match="shard-00002.parquet cannot be used"):
        DerivedDataset.load(tmp_path)
    writer = ShardWriter(tmp_path, make_provenance(), NUM_IMAGES, 5)
    assert writer.missing() == [2] and "shard-00002.parquet is written again" in caplog.text
    writer.write(2, [ROWS[i] for i in writer.indices(2)])
    assert path.read_bytes() == good and writer.missing() == []


def test_a_shard_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    writer = write(tmp_path, shards=[])

    def full_disk(table, file, **options):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("eco_m2f.derived.writer.pq.write_table", full_disk)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path, shards=[1])
    assert [p.name for p in tmp_path.iterdir()] == [MANIFEST] and writer.missing() == [0, 1, 2, 3, 4]


def test_leftovers_of_a_killed_process_are_removed_from_own_shards_alone(tmp_path):
    write(tmp_path, shards=[])
    leftovers = [tmp_path / f".shard-{s:05d}.parquet.4711.tmp" for s in (0, 1)]
    for path in leftovers:
        path.write_bytes(b"half")
    ShardWriter(tmp_path, make_provenance(), NUM_IMAGES, 5).missing(rank=0, world_size=2)
    assert not leftovers[0].exists() and leftovers[1].exists()


def test_rows_that_do_not_fit_are_refused(tmp_path):
    writer = write(tmp_path, shards=[])
    with pytest.raises(ValueError, match="shard 4 has 3 images, but 5 rows"):
        writer.write(4, ROWS[:5])
    with pytest.raises(ValueError, match="no shard 5"):
        writer.indices(5)

    def broken(**changes):
        writer.write(4, [ROWS[20], ROWS[21], {**ROWS[22], **changes}])

    with pytest.raises(ValueError, match=r"row 2 \(image '122'\): quality is nan, but must be a number from 0 to 1"):
        broken(quality=[0.5, math.nan, 0.5])
    with pytest.raises(ValueError, match=r"\(image '122'\): quality has 2 values, but must be 3"):
        broken(quality=[0.5, 0.5])
    with pytest.raises(ValueError, match="build it with make_row"):
        broken(beta=0.1)
    with pytest.raises(ValueError, match=r"\(image '122'\): stat_tp has 50 values"):
        broken(stat_tp=[1] * 50)
    assert writer.missing() == [0, 1, 2, 3, 4]


def test_an_image_twice_is_refused(tmp_path):
    writer = ShardWriter(tmp_path, make_provenance(num_images=2), num_images=2)
    writer.write(0, [ROWS[0], ROWS[0]])
    with pytest.raises(DerivedDatasetError, match="images twice: 100"):
        DerivedDataset.load(tmp_path)


def test_no_dataset_and_another_format_are_distinguished(tmp_path):
    with pytest.raises(FileNotFoundError, match="no manifest.json in"):
        DerivedDataset.load(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format": "other.v9"}')
    with pytest.raises(DerivedDatasetError, match="other.v9"):
        DerivedDataset.load(tmp_path)


def test_parent_sha256_depends_on_content_alone():
    weights = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(3), "c": torch.tensor([True, False])}
    digest = parent_sha256(weights)
    reordered = dict(reversed(weights.items()))
    assert parent_sha256(reordered) == digest
    transposed = {**weights, "a.weight": weights["a.weight"].t().contiguous().t()}
    assert parent_sha256(transposed) == digest
    assert parent_sha256({**weights, "exit_policy.weight": torch.zeros(3)}) == digest
    changes = [
        {"a.weight": torch.arange(6.0).view(3, 2)},
        {"a.weight": torch.arange(6.0).view(2, 3) + 1e-6},
        {"a.weight": torch.arange(6.0, dtype=torch.float64).view(2, 3)},
        {"d": torch.zeros(0)},
    ]
    digests = {parent_sha256({**weights, **change}) for change in changes} | {digest}
    assert len(digests) == 5 and all(len(d) == 64 for d in digests)
    assert parent_sha256({"a": torch.ones(2, dtype=torch.bfloat16)}) != parent_sha256({"a": torch.ones(2)})
