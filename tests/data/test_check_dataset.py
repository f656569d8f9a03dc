"""The checker finds nothing in good data; it finds, names and counts each kind of fault."""

import json

import numpy as np
import pytest
from PIL import Image

from eco_m2f.data.check import check_class_count, check_dataset, summary
from eco_m2f.data.datasets import register_from_config


@pytest.fixture
def found(tree, forget):
    """Saves the tree, registers it and returns {kind: [where]}."""

    def check(**options) -> dict[str, list[str]]:
        register_from_config([f"name=own,{tree.save().spec}"])
        kinds: dict[str, list[str]] = {}
        for finding in check_dataset("own", **options):
            kinds.setdefault(finding.kind, []).append(finding.where)
        return kinds

    return check


def test_good_data_has_no_findings(found):
    assert found(num_classes=3) == {}


def test_the_real_sample_has_no_findings(shared, forget):
    base = shared / "data" / "coco_panoptic_sample" / "sample_data"
    spec = (
        f"images={base / 'input_images'},panoptic={base / 'panoptic_examples'},json={base / 'panoptic_examples.json'}"
    )
    register_from_config([f"name=sample,{spec}"])
    assert check_dataset("sample", num_classes=133) == []


def _segments(tree, i=0):
    return tree.content["annotations"][i]["segments_info"]


def _paint(path, value, where):
    pixels = np.array(Image.open(path))
    pixels[where] = value
    Image.fromarray(pixels).save(path)


FAULTS = {
    "missing image": lambda t: t.image(1).unlink(),
    "unreadable image": lambda t: t.image(1).write_bytes(t.image(1).read_bytes()[:70]),
    "image size differs from JSON": lambda t: t.content["images"][0].update(width=61),
    "missing panoptic PNG": lambda t: t.panoptic(1).unlink(),
    "unreadable panoptic PNG": lambda t: t.panoptic(1).write_text("no image"),
    "PNG size differs from image": lambda t: Image.open(t.panoptic(1)).crop((0, 0, 59, 40)).save(t.panoptic(1)),
    "segment in PNG, not in JSON": lambda t: _segments(t).pop(0),
    "segment in JSON, not in PNG": lambda t: _segments(t).append({"id": 4, "category_id": 3, "iscrowd": 0}),
    "area off": lambda t: _paint(t.panoptic(1), 0, (0, 0)),
    "unknown category": lambda t: _segments(t)[0].update(category_id=5),
    "duplicate segment id": lambda t: _segments(t).append(dict(_segments(t)[0])),
    "malformed annotation entry": lambda t: _segments(t).append({"id": 0, "category_id": 3}),
    "malformed image entry": lambda t: t.content["images"][0].update(width="60"),
    "file outside its folder": lambda t: t.content["images"][0].update(file_name="../images/1.png"),
    "duplicate image id": lambda t: t.content["images"].append(t.content["images"][0]),
    "image annotated twice": lambda t: t.content["annotations"].append(
        {**t.content["annotations"][0], "file_name": "2.png"}
    ),
    "panoptic PNG used twice": lambda t: t.content["annotations"][1].update(file_name="1.png"),
    "image without annotation": lambda t: t.content["annotations"].pop(0),
    "annotation without image": lambda t: t.content["images"].pop(0),
    "incomplete image entry": lambda t: t.content["images"][0].pop("file_name"),
    "incomplete annotation entry": lambda t: t.content["annotations"][0].pop("segments_info"),
    "crowd-only annotation": lambda t: [s.update(iscrowd=1) for s in _segments(t)],
    "duplicate category name": lambda t: t.content.update(
        categories=[t.content["categories"][0], *({**c, "name": "x"} for c in t.content["categories"][1:])]
    ),
}


@pytest.mark.parametrize("kind", sorted(FAULTS))
def test_each_fault_is_found(tree, found, kind):
    FAULTS[kind](tree)
    assert len(found()[kind]) == 1


def test_a_segment_that_lacks_something_is_named_with_its_annotation(tree, found):
    _segments(tree)[0].pop("category_id")
    (printed,) = found()["incomplete annotation entry"]
    assert "1.png" in printed and "lacks category_id of a segment" in printed


def test_the_file_is_named(tree, found):
    tree.image(2).unlink()
    assert found() == {"missing image": [str(tree.image(2))]}


def test_one_pixel_thin_image(tree, found):
    tree.add(3, np.full((1, 30), 5, dtype=np.int32), {5: 7})
    assert list(found()) == ["image one pixel thin"]


BOX_FAULTS = {  # what the JSON says; the fixture's images and boxes are good
    "missing image": lambda c: c["images"].append({"id": 2, "file_name": "2.png", "height": 40, "width": 60}),
    "image size differs from JSON": lambda c: c["images"][0].update(width=61),
    "incomplete image entry": lambda c: c["images"][0].pop("file_name"),
    "malformed image entry": lambda c: c["images"][0].update(height="40"),
    "duplicate image id": lambda c: c["images"].append(c["images"][0]),
    "incomplete annotation entry": lambda c: c["annotations"][0].pop("category_id"),
    "duplicate annotation id": lambda c: c["annotations"][0].update(id=2),
    "annotation without image": lambda c: c["annotations"][0].update(image_id=5),
    "unknown category": lambda c: c["annotations"][0].update(category_id=5),
    "malformed annotation entry": lambda c: c["annotations"][0].update(bbox=[1, 2, None, 4]),
    "empty box": lambda c: (c["annotations"][0]["bbox"].__setitem__(3, 0), c["annotations"][0].pop("area")),
    "area off": lambda c: c["annotations"][0].update(area=1000),
    "boxes in shares of the image": lambda c: [
        o.update(bbox=[0.1, 0.2, 0.5, 0.3], area=None) for o in c["annotations"]
    ],
    "no object": lambda c: c["annotations"].clear(),
    "no image": lambda c: (c["images"].clear(), c["annotations"].clear()),
    "image file used twice": lambda c: c["images"].append({"id": 2, "file_name": "1.png"}),
    "box outside its image": lambda c: c["annotations"][0]["bbox"].__setitem__(2, 51.5),
    "duplicate category name": lambda c: c["categories"].append({"id": 5, "name": "four"}),
}


@pytest.mark.parametrize("kind", [None, *sorted(BOX_FAULTS)])
def test_each_fault_of_a_set_of_boxes_is_found(own, kind):
    path, content = own
    if kind:
        BOX_FAULTS[kind](content)
        path.write_text(json.dumps(content))
    register_from_config([f"name=own_boxes,images={path.parent},boxes={path}"])
    assert [f.kind for f in check_dataset("own_boxes", num_classes=len(content["categories"]))] == (
        [kind] if kind else []
    )


def test_boxes_registered_otherwise_and_vanished(own):
    path, content = own
    register_from_config([f"name=own_boxes,images={path.parent},boxes={path}"])
    assert [f.kind for f in check_dataset("own_boxes", num_classes=3)] == ["class count"]
    content["categories"][0]["id"] = 8
    path.write_text(json.dumps(content))
    kinds = [f.kind for f in check_dataset("own_boxes")]
    assert kinds == ["category missing in JSON", "category not registered like this", "unknown category"]
    path.unlink()
    assert [f.kind for f in check_dataset("own_boxes")] == ["unusable JSON"]


def test_boxes_from_the_command_line(own, run):
    path, _ = own
    custom = f"name=own_boxes,images={path.parent},boxes={path}"
    code, printed = run("--custom", custom, "--num-classes", "2")
    assert code == 0 and "own_boxes: 0 finding(s)" in printed
    (path.parent / "1.png").write_bytes(b"no image")
    code, printed = run("own_boxes", "--custom", custom)
    assert code == 1 and "unreadable image: 1" in printed
    code, printed = run("--custom", custom.replace("boxes.json", "none.json").replace("own_boxes", "other"))
    assert code == 2 and "none.json: detection JSON not found" in printed


def test_categories_registered_otherwise(tree, found):
    found()
    content = json.loads(tree.json.read_text())
    content["categories"][0]["isthing"] = 0
    del content["categories"][2]
    tree.json.write_text(json.dumps(content))
    kinds = {f.kind for f in check_dataset("own")}
    assert {"category not registered like this", "category missing in JSON"} <= kinds


def test_class_count(found, forget):
    assert len(found(num_classes=4)["class count"]) == 1
    check_class_count("own", 3)
    with pytest.raises(ValueError, match="NUM_CLASSES is 4, but dataset 'own' has 3 categories: set it to 3"):
        check_class_count("own", 4)


def test_vanished_json_is_one_finding(tree, found):
    found()
    tree.json.unlink()
    assert [f.kind for f in check_dataset("own")] == ["unusable JSON"]


def test_names_that_cannot_be_checked():
    with pytest.raises(ValueError, match="'nope' is not registered; choose one of .*toy_panoptic_train"):
        check_dataset("nope")
    with pytest.raises(ValueError, match="has no panoptic annotation"):
        check_dataset("voc_2007_train")


def test_sample_looks_at_some_files_but_at_the_whole_json(tree, found):
    for i in range(3, 13):
        tree.add(i, tree.blocks(), {300: 7, 70000: 90, 9: 3})
        tree.image(i).unlink()
    _segments(tree, 1)[0]["category_id"] = 5
    kinds = found(sample=4)
    assert 1 <= len(kinds["missing image"]) <= 4 and len(kinds["unknown category"]) == 1
    assert [str(f) for f in check_dataset("own", sample=4)] == [str(f) for f in check_dataset("own", sample=4)]
    assert len([f for f in check_dataset("own") if f.kind == "missing image"]) == 10


def test_workers_find_the_same(tree, found):
    tree.image(2).unlink()
    assert found(workers=2) == {"missing image": [str(tree.image(2))]}


def test_summary_counts_and_limits(tree, found, forget):
    for i in range(3, 8):
        tree.add(i, tree.blocks(), {300: 7, 70000: 90, 9: 3})
        tree.image(i).unlink()
    found()
    lines = summary(check_dataset("own"), limit=2).splitlines()
    assert lines[0] == "missing image: 5" and lines[-1].strip() == "... and 3 more" and len(lines) == 4


def test_an_image_without_objects_is_a_normal_negative(tree, found):
    tree.add(3, np.zeros((20, 20), np.int32), {})
    assert found() == {}


def test_a_set_without_images_is_a_finding(tree, found):
    tree.content.update(images=[], annotations=[])
    assert list(found()) == ["no image"]


def test_data_mostly_void_is_reported_with_what_that_means(tree, found):
    ids = np.zeros((40, 100), np.int32)
    ids[:5, :8] = 300
    tree.add(3, ids, {300: 7})
    (share,) = found()["mostly void"]
    void = 4 * 60 + 4 * 30 + 40 * 100 - 40  # of 40 x 60, 50 x 30 and 40 x 100 pixels
    assert share.startswith(f"{void / 7900:.0%} of the pixels")
    lines = []
    (finding,) = check_dataset("own", tell=lines.append)
    assert "PQ ignores predictions that lie mostly on void" in finding.remedy and "isthing 0" in finding.remedy
    assert lines == [
        f"own: {void / 7900:.0%} of the pixels are void. A prediction there counts neither as right nor wrong"
    ]


@pytest.mark.parametrize("name", ["animals", "car"])
def test_a_category_that_only_groups_others_gets_a_remedy(tree, found, name):
    """Roboflow writes such a category: 0 is the supercategory of the others."""
    others = [{**c, "supercategory": name} for c in tree.content["categories"]]
    tree.content["categories"] = [{"id": 0, "name": name, "isthing": 1, "supercategory": "none"}, *others]
    kinds = found()
    assert kinds.pop("category that only groups others") == [
        f"category 0 ({name}) has no annotation and is the supercategory of others"
    ]
    assert list(kinds) == (["duplicate category name"] if name == "car" else [])


def test_a_png_with_other_ids_is_not_to_be_emptied(tree, found):
    pixels = np.array(Image.open(tree.panoptic(1)))
    Image.fromarray(pixels[..., ::-1]).save(tree.panoptic(1))  # BGR
    assert list(found()) == ["PNG with other ids than the JSON"]
    (finding,) = check_dataset("own")
    assert "Do not delete anything" in finding.remedy


def test_the_check_goes_on_after_whatever_an_image_does(tree, found, monkeypatch):
    tree.image(2).unlink()
    monkeypatch.setattr("eco_m2f.data.check_files.read_ids", lambda path: 1 / 0)
    assert sorted(found()) == ["image that cannot be checked"]


@pytest.fixture
def run(script, capsys):
    """Runs tools/check_dataset.py: (exit code, output)."""
    tool = script("tools/check_dataset")

    def run(*arguments) -> tuple[int, str]:
        try:
            code = tool.main(tool.build_parser().parse_args([*arguments, "--workers", "1"]))
        except SystemExit as error:
            code = error.code
        out, err = capsys.readouterr()
        return code, out + err

    return run


def test_command_line(tree, forget, run):
    custom = f"name=own,{tree.spec}"
    code, printed = run("--custom", custom, "--num-classes", "3")
    assert code == 0 and "own: 0 finding(s)" in printed
    tree.image(1).unlink()
    code, printed = run("own", "--custom", custom)
    assert code == 1 and printed.count(str(tree.image(1))) == 1


def test_command_line_lists_all_that_is_wrong_with_a_json_that_cannot_be_registered(tree, forget, run):
    tree.content["categories"] = [{**c, "isthing": str(c["isthing"])} for c in tree.content["categories"]]
    tree.content["images"][0]["width"] = "60"
    code, printed = run("--custom", f"name=own,{tree.save().spec}")
    assert code == 1 and "own: 4 finding(s)" in printed
    assert "malformed category entry: 3" in printed and "malformed image entry: 1" in printed


def test_command_line_names_the_key_that_was_meant(own, tree, forget, run):
    """An instance JSON as json=, and a panoptic one as boxes=."""
    path, _ = own
    code, printed = run("--custom", f"name=x,images=a,panoptic=b,json={path}", "--lines", "3")
    assert code == 1 and "give it as boxes=" in printed and "x: 1 finding(s)" in printed
    code, printed = run("--custom", f"name=x,images=a,boxes={tree.json}")
    assert code == 1 and "Give it as json=" in printed and "x: 1 finding(s)" in printed


def test_command_line_compares_with_the_training_set(tree, forget, run):
    content = json.loads(tree.json.read_text())
    content["categories"][0]["name"] = "lorry"
    (tree.base / "val.json").write_text(json.dumps(content))
    customs = ["--custom", f"name=a,{tree.spec}", "--custom", f"name=b,{tree.spec.replace('pan.json', 'val.json')}"]
    assert run(*customs)[0] == 0
    code, printed = run(*customs, "--train", "a")
    assert code == 1 and "a: 0 finding(s)" in printed and "categories other than the training set's: 1" in printed
    code, printed = run(*customs, "--train", "c")
    assert code == 2 and "'c' is not registered" in printed


def test_command_line_errors_are_one_message(tree, forget, run):
    for arguments, message in (
        (["nope"], "'nope' is not registered"),
        ([], "no dataset"),
        (["--custom", "name=x"], "lacks images, panoptic, json"),
        (["--config-file", "none.yaml"], "none.yaml"),
    ):
        code, printed = run(*arguments)
        assert code == 2 and message in printed


def test_command_line_takes_everything_from_a_config(tree, forget, run):
    config = tree.base / "own.yaml"
    config.write_text(
        f'MODEL: {{SEM_SEG_HEAD: {{NUM_CLASSES: 4}}}}\nDATASETS: {{CUSTOM: ["name=own,{tree.spec}"], '
        'TRAIN: ["own"], TEST: ["own"]}\n'
    )
    code, printed = run("--config-file", str(config))
    assert code == 1 and printed.count("own: 1 finding(s)") == 1 and "NUM_CLASSES is 4" in printed
