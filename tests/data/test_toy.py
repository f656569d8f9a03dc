"""The toy set is deterministic, complete, consistent, and graded by difficulty."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from eco_m2f.data.panoptic_map import read_ids
from eco_m2f.data.toy import CATEGORIES, STUFF, THINGS, ToySpec, draw_scene, make_toy_dataset


def _digest(base: Path, pattern: str = "**/*") -> dict[str, str]:
    files = sorted(p for p in base.glob(pattern) if p.is_file())
    return {str(p.relative_to(base)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    spec = ToySpec(num_train=5, num_val=2, size=64, seed=3)
    assert make_toy_dataset(tmp_path / "a", spec) and make_toy_dataset(tmp_path / "b", spec)
    assert _digest(tmp_path / "a") == _digest(tmp_path / "b")
    assert len(_digest(tmp_path / "a")) == 2 * (5 + 2) + 2 * 2


def test_an_image_does_not_depend_on_the_count(tmp_path):
    make_toy_dataset(tmp_path / "few", ToySpec(num_train=2, num_val=1, size=64))
    make_toy_dataset(tmp_path / "many", ToySpec(num_train=4, num_val=2, size=64))
    few, many = _digest(tmp_path / "few", "**/*.png"), _digest(tmp_path / "many", "**/*.png")
    assert few.items() < many.items()


def test_seeds_splits_and_indices_all_differ():
    scenes = [draw_scene(64, *key) for key in ((0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 1))]
    assert len({s.image.tobytes() for s in scenes}) == 4
    assert len({s.difficulty for s in scenes}) == 4


def test_the_files_agree_with_each_other(tmp_path):
    make_toy_dataset(tmp_path, ToySpec(num_train=12, num_val=1, size=64))
    content = json.loads((tmp_path / "annotations" / "panoptic_train.json").read_text())
    assert len(content["images"]) == len(content["annotations"]) == 12
    assert content["categories"] == CATEGORIES
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        assert image["id"] == annotation["image_id"] and 0 <= image["difficulty"] <= 1
        ids = read_ids(tmp_path / "panoptic_train" / annotation["file_name"])
        assert ids.shape == (image["height"], image["width"]) == (64, 64)
        assert {s["id"] for s in annotation["segments_info"]} == set(np.unique(ids).tolist())
        for s in annotation["segments_info"]:
            rows, columns = np.nonzero(ids == s["id"])
            x, y, width, height = s["bbox"]
            assert s["area"] == rows.size
            assert (x, y, x + width - 1, y + height - 1) == (columns.min(), rows.min(), columns.max(), rows.max())


def test_a_stuff_class_is_one_segment():
    stuff = {c["id"] for c in CATEGORIES if not c["isthing"]}
    for i in range(20):
        kinds = [s["category_id"] for s in draw_scene(64, 0, "train", i).segments if s["category_id"] in stuff]
        assert len(kinds) == len(set(kinds)) > 0


def test_difficulty_grades_the_scenes():
    """Over 25 images, harder ones have more and smaller objects and less contrast. Crowds are rare."""
    easy, hard = ([draw_scene(96, 0, "train", i, difficulty=d) for i in range(25)] for d in (0.0, 1.0))
    things = {c["id"] for c in CATEGORIES if c["isthing"]}

    def objects(scene):
        return [s for s in scene.segments if s["category_id"] in things and not s["iscrowd"]]

    def contrast(scene):
        """Mean colour distance between the objects and their backgrounds."""
        on_stuff = np.isin(scene.ids, [s["id"] for s in scene.segments if s["category_id"] not in things])
        base = scene.image[on_stuff].mean(0)
        return np.mean([np.linalg.norm(scene.image[scene.ids == s["id"]].mean(0) - base) for s in objects(scene)])

    def mean(function, scenes):
        return np.mean([function(s) for s in scenes])

    assert mean(lambda s: len(objects(s)), hard) > 3 * mean(lambda s: len(objects(s)), easy)
    assert np.median([o["area"] for s in hard for o in objects(s)]) < 0.6 * np.median(
        [o["area"] for s in easy for o in objects(s)]
    )
    assert mean(contrast, [s for s in hard if objects(s)]) < 0.6 * mean(contrast, easy)
    assert not any(s["iscrowd"] for scene in easy for s in scene.segments)
    assert 0 < sum(any(s["iscrowd"] for s in scene.segments) for scene in hard) < 13


def test_every_class_occurs_and_color_tells_it_in_easy_scenes_only():
    """It counts how often the nearest mean colour of a class is the right one, for objects minus background."""
    names = {c["id"]: c["name"] for c in CATEGORIES}
    seen = set()

    def named_by_color(difficulty: float) -> float:
        label, offset = [], []
        for i in range(60):
            scene = draw_scene(64, 0, "train", i, difficulty)
            seen.update(names[s["category_id"]] for s in scene.segments)
            stuff = [s["id"] for s in scene.segments if names[s["category_id"]] in STUFF]
            base = scene.image[np.isin(scene.ids, stuff)].mean(0)
            for s in scene.segments:
                if names[s["category_id"]] in THINGS and not s["iscrowd"]:
                    label.append(names[s["category_id"]])
                    offset.append(scene.image[scene.ids == s["id"]].mean(0) - base)
        label, offset = np.array(label), np.array(offset)
        means = np.stack([offset[label == name].mean(0) for name in THINGS])
        nearest = np.linalg.norm(offset[:, None] - means, axis=2).argmin(1)
        return float(np.mean(np.array(THINGS)[nearest] == label))

    assert named_by_color(0.0) > 0.9
    assert named_by_color(1.0) < 0.75
    assert seen == {*THINGS, *STUFF}


def test_a_second_run_does_nothing(tmp_path):
    spec = ToySpec(num_train=2, num_val=1, size=64)
    assert make_toy_dataset(tmp_path / "toy", spec)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert not make_toy_dataset(tmp_path / "toy", spec)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == stamps


def test_other_parameters_need_overwrite(tmp_path):
    make_toy_dataset(tmp_path, ToySpec(num_train=2, num_val=1, size=64))
    other = ToySpec(num_train=2, num_val=1, size=64, seed=1)
    with pytest.raises(FileExistsError, match="--overwrite"):
        make_toy_dataset(tmp_path, other)
    assert make_toy_dataset(tmp_path, other, overwrite=True)
    assert (
        json.loads((tmp_path / "annotations" / "panoptic_val.json").read_text())["info"]["made_from"]["toy"]["seed"]
        == 1
    )


def test_foreign_files_are_never_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another folder"):
        make_toy_dataset(tmp_path, ToySpec(num_train=1, num_val=1, size=64), overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("eco_m2f.data.toy.write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        make_toy_dataset(tmp_path / "toy", ToySpec(num_train=1, num_val=1, size=64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [{"size": 16}, {"num_train": 0}, {"num_val": 0}, {"seed": -1}])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        ToySpec(**bad)
