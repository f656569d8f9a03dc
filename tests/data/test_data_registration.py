"""Registering COCO-panoptic-like folders, from Python and from DATASETS.CUSTOM."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from eco_m2f.data.datasets import parse_custom, register_coco_panoptic_like, register_from_config
from eco_m2f.data.datasets.coco_panoptic_like import category_metadata
from eco_m2f.data.panoptic_map import DataError


def test_metadata_follows_the_order_of_the_json(tree, forget):
    assert register_from_config([f"name=own,{tree.spec}"]) == ["own"]
    meta = MetadataCatalog.get("own")
    assert meta.thing_classes == meta.stuff_classes == ["car", "sky", "dog"]
    assert meta.thing_dataset_id_to_contiguous_id == {7: 0, 90: 2}
    assert meta.stuff_dataset_id_to_contiguous_id == {3: 1}
    assert meta.thing_colors[:2] == [(255, 0, 0), (0, 0, 255)] and len(meta.thing_colors[2]) == 3
    assert (meta.evaluator_type, meta.ignore_label, meta.label_divisor) == ("panoptic_like", 255, 1000)
    assert meta.panoptic_json == str(tree.json) and meta.panoptic_root == str(tree.base / "panoptic")


def test_records(tree, forget):
    register_from_config([f"name=own,{tree.spec}"])
    first, second = DatasetCatalog.get("own")
    assert first["file_name"] == str(tree.image(1)) and first["pan_seg_file_name"] == str(tree.panoptic(1))
    assert (first["image_id"], first["height"], first["width"]) == (1, 40, 60)
    segments = [(s["id"], s["category_id"], s["isthing"], s["iscrowd"]) for s in second["segments_info"]]
    assert segments == [(300, 0, True, 0), (70000, 0, True, 1), (9, 1, False, 0)]


def test_optional_paths(tree, forget):
    register_from_config([f"name=own,{tree.spec},sem_seg=/classes,instances=/inst.json"])
    assert MetadataCatalog.get("own").json_file == "/inst.json"
    assert DatasetCatalog.get("own")[0]["sem_seg_file_name"] == "/classes/1.png"


def test_registering_twice_is_harmless_unless_it_differs(tree, forget):
    register_from_config([f"name=own,{tree.spec}"] * 2)
    with pytest.raises(ValueError, match=r"'own' is already registered with other \['image_root'\].*/elsewhere"):
        register_coco_panoptic_like("own", "/elsewhere", tree.base / "panoptic", tree.json)


def test_categories_given_need_no_json(forget, tmp_path):
    register_coco_panoptic_like(
        "later", "a", "b", tmp_path / "none.json", categories=[{"id": 1, "name": "x", "isthing": 1}]
    )
    with pytest.raises(DataError, match="none.json: panoptic JSON not found"):
        DatasetCatalog.get("later")


def test_coco_categories_match_the_official_table(shared):
    """Contiguous ids from the official JSON equal detectron2's own for COCO."""
    path = shared / "data" / "coco_panoptic_sample" / "panoptic_coco_categories.json"
    meta, official = category_metadata(json.loads(path.read_text())), MetadataCatalog.get("coco_2017_val_panoptic")
    for key in ("thing_dataset_id_to_contiguous_id", "stuff_dataset_id_to_contiguous_id", "thing_classes"):
        assert meta[key] == official.get(key)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("name=a,images=b,panoptic=c", "lacks json"),
        ("images=b", "lacks name, panoptic, json"),
        ("name=a,images=b,panoptic=c,json=d,masks=e", "unknown key 'masks'"),
        ("name=a,images=b,panoptic=c,json", "'json' is not of the form key=value"),
        ("name=a,images=,panoptic=c,json=d", "'images=' is not of the form"),
        ("name=a,name=b,images=b,panoptic=c,json=d", "'name' is given twice"),
        ("", "lacks name, images"),
    ],
)
def test_bad_descriptions_are_explained(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_custom(spec)


def test_values_may_hold_an_equals_sign_and_spaces_around_are_dropped():
    assert parse_custom("name=a, images=x=1/i ,panoptic=p,json=j")["images"] == "x=1/i"


def test_a_lone_string_is_refused(tree):
    with pytest.raises(ValueError, match="must be a list"):
        register_from_config(f"name=own,{tree.spec}")


SPOILED = {
    "no images": (lambda c: c.pop("images"), r"lacks \['images'\]"),
    "no category name": (lambda c: c.update(categories=[{"id": 1, "isthing": 1}]), "category entry: .* lacks name"),
    "doubled category": (lambda c: c.update(categories=c["categories"] * 2), "duplicate category id"),
    "no category at all": (lambda c: c.update(categories=[]), "no category"),
}


@pytest.mark.parametrize("case", sorted(SPOILED))
def test_a_spoiled_json_is_refused_at_once(tree, forget, case):
    spoil, message = SPOILED[case]
    spoil(tree.content)
    tree.save()
    with pytest.raises(DataError, match=message):
        register_from_config([f"name=own,{tree.spec}"])
    assert "own" not in DatasetCatalog.list()


def test_not_json_at_all(tree, forget):
    tree.json.write_text("{")
    with pytest.raises(DataError, match="pan.json: not a readable JSON"):
        register_from_config([f"name=own,{tree.spec}"])


LOADING = {
    "image undeclared": (lambda c: c["images"].pop(0), "annotation without image: image id 1"),
    "category undeclared": (
        lambda c: c["annotations"][0]["segments_info"][0].update(category_id=5),
        "segment 300 has category_id 5",
    ),
    "empty": (lambda c: c.update(annotations=[]), "annotates no image"),
}


@pytest.mark.parametrize("case", sorted(LOADING))
def test_a_contradictory_json_is_refused_on_loading(tree, forget, case):
    spoil, message = LOADING[case]
    spoil(tree.content)
    tree.save()
    register_from_config([f"name=own,{tree.spec}"])
    with pytest.raises(DataError, match=message):
        DatasetCatalog.get("own")
