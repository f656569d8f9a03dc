"""Where paths of DATASETS.CUSTOM lie, and file names that leave their folder."""

import json
import os
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from eco_m2f.config import add_eco_config
from eco_m2f.data.datasets import parse_custom, register_from_config
from eco_m2f.data.datasets.paths import resolve
from eco_m2f.data.images import DataError


@pytest.fixture
def root(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("CELLS", "/disk/cells")
    monkeypatch.delenv("NOWHERE", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "written, found",
    [
        ("cells/val", "{root}/cells/val"),
        ("/cells/val", "/cells/val"),
        ("~/cells", "/home/me/cells"),
        ("$CELLS/val", "/disk/cells/val"),
        ("${CELLS}_2/val", "/disk/cells_2/val"),
        ("$DETECTRON2_DATASETS/cells", "{root}/cells"),
        ("a b,c/d", "{root}/a b,c/d"),
    ],
)
def test_where_a_path_lies(root, written, found):
    assert resolve(written) == found.format(root=root)


def test_a_variable_that_is_not_set_is_named(root):
    with pytest.raises(ValueError, match="NOWHERE is not set"):
        resolve("$NOWHERE/cells")


def test_without_the_variable_the_root_is_datasets(root, monkeypatch, tmp_path):
    monkeypatch.delenv("DETECTRON2_DATASETS")
    monkeypatch.chdir(tmp_path)
    assert (
        os.path.abspath(resolve("cells")) == resolve("$DETECTRON2_DATASETS/cells") == str(tmp_path / "datasets/cells")
    )


def test_a_relative_entry_is_found_below_the_root(root, tree, forget):
    (root / "own").rename(root / "my, own")
    entry = {"name": "own", "images": "my, own/images", "panoptic": "my, own/panoptic", "json": "my, own/pan.json"}
    text = 'name=own,"images=my, own/images","panoptic=my, own/panoptic","json=my, own/pan.json"'
    assert parse_custom(text) == entry
    assert register_from_config([entry]) == register_from_config([text]) == ["own"]
    assert [Path(r["file_name"]) for r in DatasetCatalog.get("own")] == [
        root / "my, own/images" / f"{i}.png" for i in (1, 2)
    ]


def test_an_entry_may_be_a_mapping_in_yaml(root, tmp_path):
    cfg = get_cfg()
    add_eco_config(cfg)
    (tmp_path / "a.yaml").write_text("DATASETS: {CUSTOM: [{name: own, images: 'a, b', panoptic: c, json: d}]}")
    cfg.merge_from_file(str(tmp_path / "a.yaml"))
    assert parse_custom(cfg.DATASETS.CUSTOM[0])["images"] == "a, b"
    (tmp_path / "b.yaml").write_text(cfg.dump())
    cfg.merge_from_file(str(tmp_path / "b.yaml"))
    assert parse_custom(cfg.DATASETS.CUSTOM[0])["images"] == "a, b"


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"name": "a", "images": "b", "panoptic": "c", "json": 5}, "'json' must be a non-empty text"),
        ({"name": "a", "images": "b", "panoptic": "c", "json": "d", "outside": "yes"}, "outside must be .allowed"),
        ('name=a,"images=b', "cannot be split"),
        (5, "a text or a mapping, got int"),
    ],
)
def test_bad_entries_are_explained(entry, message):
    with pytest.raises(ValueError, match=message):
        parse_custom(entry)


def test_a_json_in_the_working_directory_is_pointed_at(root, tree, monkeypatch):
    (root / "below").mkdir()
    (root / "below" / "pan.json").write_text("{}")
    monkeypatch.chdir(root / "below")
    with pytest.raises(
        DataError, match=rf"{root}/pan.json: panoptic JSON.*DETECTRON2_DATASETS.*write {root}/below/pan.json"
    ):
        register_from_config(["name=own,images=a,panoptic=b,json=pan.json"])


def test_absent_datasets_may_be_left_out(root, tree, forget):
    entries = [f"name=own,{tree.spec}", "name=gone,images=a,panoptic=b,json=gone.json"]
    assert register_from_config(entries, absent_ok=True) == ["own"]


def test_a_json_that_leads_out_is_refused_and_may_be_allowed(root, tree, forget):
    tree.content["images"][0]["file_name"] = str(tree.base.parent / "elsewhere.png")
    tree.save()
    register_from_config([f"name=own,{tree.spec}"])
    with pytest.raises(DataError, match="outside"):
        DatasetCatalog.get("own")
    register_from_config([f"name=free,{tree.spec},outside=allowed"])
    assert DatasetCatalog.get("free")[0]["file_name"] == str(tree.base.parent / "elsewhere.png")


def test_boxes_too(root, own):
    path, content = own
    register_from_config([f"name=own_boxes,images={path.parent / 'images'},boxes={path}"])
    content["images"][0]["file_name"] = "../1.png"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="outside"):
        DatasetCatalog.get("own_boxes")
    assert MetadataCatalog.get("own_boxes").outside is False
