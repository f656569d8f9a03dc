"""The reader of annotation JSON: what it reads, what it computes, and its messages about file, entry and field."""

import copy
import json
import os

import pytest

from eco_m2f.data.annotations import examine, leaves_folder, read, read_categories
from eco_m2f.data.panoptic_map import DataError
from eco_m2f.data.schema import DETECTION, INSTANCES, PANOPTIC

CATEGORIES = [{"id": 1, "name": "disc", "isthing": 1}, {"id": 2, "name": "ground", "isthing": 0}]
SEGMENTS = [{"id": 7, "category_id": 1, "iscrowd": 0, "area": 9}, {"id": 8, "category_id": 2}]
GOOD = {
    PANOPTIC: {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 4, "width": 6} for i in (3, 5)],
        "annotations": [
            {"image_id": i, "file_name": f"{i}.png", "segments_info": copy.deepcopy(SEGMENTS)} for i in (3, 5)
        ],
        "categories": CATEGORIES,
    },
    DETECTION: {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 4, "width": 6} for i in (3, 5)],
        "annotations": [{"id": i, "image_id": 3, "category_id": 1, "bbox": [1, 1, 2, 2.5], "area": 3} for i in (0, 1)],
        "categories": CATEGORIES[:1],
    },
}
GOOD[INSTANCES] = copy.deepcopy(GOOD[DETECTION])
for o in GOOD[INSTANCES]["annotations"]:
    o["segmentation"] = [[1, 1, 3, 1, 3, 3]]


@pytest.fixture
def written(tmp_path):
    """Writes a file after a change and returns its path. raw: bytes to write instead."""

    def write(kind, change=lambda c: None, raw=None):
        content = copy.deepcopy(GOOD[kind])
        change(content)
        path = tmp_path / f"{kind.name}.json"
        path.write_bytes(json.dumps(content).encode() if raw is None else raw)
        return path

    return write


def first(section, **values):
    """A change of a list's first entry; for "segments", of the first segment."""

    def change(content):
        entry = content["annotations"][0]["segments_info"][0] if section == "segments" else content[section][0]
        for key, value in values.items():
            entry.pop(key) if value is KeyError else entry.update({key: value})

    return change


TAKEN = [  # what other exporters write, and how it is read
    (PANOPTIC, first("images", height=4.0, width=6.0), lambda c: (c.images[0].height, c.images[0].width), (4, 6)),
    (PANOPTIC, first("images", height=KeyError), lambda c: (c.images[0].height, c.images[0].width), (None, 6)),
    (PANOPTIC, first("segments", iscrowd=True), lambda c: _segment(c)["iscrowd"], 1),
    (PANOPTIC, first("segments", iscrowd=None), lambda c: _segment(c)["iscrowd"], 0),
    (PANOPTIC, first("segments", iscrowd=KeyError), lambda c: _segment(c)["iscrowd"], 0),
    (PANOPTIC, first("segments", id=7.0), lambda c: _segment(c), {"id": 7, "category_id": 1, "iscrowd": 0}),
    (PANOPTIC, first("segments", area=None), lambda c: _segment(c)["id"], 7),
    (PANOPTIC, first("categories", isthing=True), lambda c: c.categories[0].as_dict()["isthing"], 1),
    (PANOPTIC, lambda c: [a.update(segments_info=[]) for a in c["annotations"]], lambda c: len(c.annotations), 2),
    (DETECTION, first("annotations", area=KeyError), lambda c: c.annotations[0].as_dict()["area"], 5.0),
    (DETECTION, first("annotations", area=0), lambda c: c.annotations[0].as_dict()["area"], 5.0),
    (DETECTION, first("annotations", area=99), lambda c: c.annotations[0].as_dict()["area"], 5.0),
    (DETECTION, first("annotations", area=None), lambda c: c.annotations[0].as_dict()["area"], 5.0),
    (DETECTION, first("annotations"), lambda c: c.annotations[0].as_dict()["area"], 3.0),
    (DETECTION, first("annotations", ignore=0, iscrowd=True), lambda c: c.annotations[0].as_dict()["iscrowd"], 1),
    (DETECTION, first("annotations", id=KeyError), lambda c: c.annotations[0].as_dict()["iscrowd"], 0),
    (DETECTION, first("annotations", segmentation=[[1, 1, 3, 3]]), lambda c: len(c.annotations), 2),
    (DETECTION, first("annotations", segmentation="none"), lambda c: len(c.annotations), 2),
    (DETECTION, lambda c: c["annotations"].clear(), lambda c: len(c.annotations), 0),
    (DETECTION, first("images", id=-3, license=[1]), None, None),
]


def _segment(content):
    return content.annotations[0].segments_info[0].as_dict()


@pytest.mark.parametrize("kind, change, value, expected", TAKEN)
def test_what_is_taken(written, kind, change, value, expected):
    content, findings = examine(written(kind, change), kind)
    if value is not None:
        assert findings == [] and value(content) == expected
    else:  # now the annotations' image has another id
        assert {f.kind for f in findings} == {"annotation without image"}


def test_image_ids_may_all_be_texts(written):
    def rename(content):
        for entry, key in [(e, "id") for e in content["images"]] + [(e, "image_id") for e in content["annotations"]]:
            entry[key] = f"img{entry[key]}"

    assert [i.id for i in read(written(PANOPTIC, rename), PANOPTIC).images] == ["img3", "img5"]


REFUSED = [  # the field, the value in the message, and part of the remedy
    (PANOPTIC, first("segments", id="7"), ("segments_info[0].id is '7'", "not in quotes")),
    (PANOPTIC, first("segments", id=0), ("segments_info[0].id is 0", "renumber it in the JSON and in the pixels")),
    (PANOPTIC, first("segments", id=1 << 24), ("is 16777216", "1 to 16777215")),
    (PANOPTIC, first("segments", id=2**70), ("segments_info[0].id is 11805916207", "1 to 16777215")),
    (PANOPTIC, first("segments", id=7.5), ("segments_info[0].id is 7.5",)),
    (PANOPTIC, first("segments", id=None), ("segments_info[0].id is None",)),
    (PANOPTIC, first("segments", id=KeyError), ("lacks id of a segment", "renumber")),
    (PANOPTIC, first("segments", category_id="1"), ("segments_info[0].category_id is '1'", "`categories`")),
    (PANOPTIC, first("segments", category_id=True), ("segments_info[0].category_id is True",)),
    (PANOPTIC, first("segments", category_id=5), ("segment 7 has category_id 5", "add it to `categories`")),
    (PANOPTIC, first("segments", iscrowd="0"), ("segments_info[0].iscrowd is '0'", "write 0 or 1")),
    (PANOPTIC, first("segments", iscrowd=2), ("segments_info[0].iscrowd is 2", "write 0 or 1")),
    (PANOPTIC, first("segments", area="9"), ("segments_info[0].area is '9'", "or leave it out")),
    (PANOPTIC, first("annotations", segments_info=KeyError), ("lacks segments_info", "the list of the PNG's segments")),
    (PANOPTIC, first("annotations", segments_info={}), ("segments_info is {}",)),
    (PANOPTIC, first("annotations", segments_info=[[7, 1]]), ("segments_info[0] is [7, 1]",)),
    (PANOPTIC, first("annotations", segments_info=SEGMENTS * 2), ("duplicate segment id: 3.png: 7 (2 times)",)),
    (PANOPTIC, first("annotations", image_id=9), ("annotation without image: image id 9",)),
    (PANOPTIC, first("annotations", image_id="3"), ("annotation without image: image id '3'",)),
    (PANOPTIC, first("annotations", image_id=5), ("image annotated twice: 5",)),
    (PANOPTIC, first("annotations", file_name="5.png"), ("panoptic PNG used twice: 5.png",)),
    (PANOPTIC, first("annotations", file_name=7), ("file_name is 7", "write a text")),
    (PANOPTIC, first("images", id=5), ("duplicate image id: 5 (2 times)", "give each image its own id")),
    (PANOPTIC, first("images", id="a1"), ("image ids of two types", "'a1'")),
    (PANOPTIC, first("images", id=[3]), ("images[0] (id [3]", "id is [3]")),
    (PANOPTIC, first("images", height="4"), ("height is '4'", "leave height and width out")),
    (PANOPTIC, first("images", width=0), ("width is 0",)),
    (PANOPTIC, first("images", width=-6), ("width is -6",)),
    (PANOPTIC, first("images", file_name=KeyError), ("lacks file_name", "below the folder of the images")),
    (PANOPTIC, first("images", file_name=""), ("file_name is ''",)),
    (PANOPTIC, first("images", file_name="../../etc/passwd"), ("file outside its folder", "'../../etc/passwd'")),
    (PANOPTIC, first("annotations", file_name="/etc/passwd"), ("file outside its folder", "'/etc/passwd'")),
    (PANOPTIC, first("images", file_name="a\0b"), ("file outside its folder", "a\\x00b")),
    (PANOPTIC, first("categories", isthing="0"), ("isthing is '0'", "write 1 for things and 0 for stuff")),
    (PANOPTIC, first("categories", isthing=KeyError), ("lacks isthing",)),
    (PANOPTIC, first("categories", isthing=None), ("isthing is None",)),
    (PANOPTIC, first("categories", id="1"), ("id is '1'", "not in quotes")),
    (PANOPTIC, first("categories", id=2), ("duplicate category id: 2",)),
    (PANOPTIC, first("categories", id=-1), ("id is -1",)),
    (PANOPTIC, first("categories", name=None), ("name is None", "the name of the category")),
    (PANOPTIC, first("categories", name="ground"), ("duplicate category name: ground",)),
    (PANOPTIC, first("categories", color="#ff0000"), ("color is '#ff0000'", "[R, G, B]")),
    (PANOPTIC, first("categories", color=[1, 2, 300]), ("color[2] is 300",)),
    (PANOPTIC, lambda c: c.update(categories=[]), ("no category",)),
    (PANOPTIC, lambda c: c.update(images=[7]), ("images[0]: it is 7",)),
    (PANOPTIC, lambda c: c.update(annotations={}), ("its 'annotations' must be a list, not object",)),
    (PANOPTIC, lambda c: c.update(images=None), ("its 'images' must be a list, not null",)),
    (PANOPTIC, lambda c: c.pop("categories"), ("lacks ['categories']",)),
    (PANOPTIC, lambda c: c.update(copy.deepcopy(GOOD[DETECTION])), ("detection or instance JSON", "boxes=")),
    (DETECTION, lambda c: c.update(copy.deepcopy(GOOD[PANOPTIC])), ("a panoptic JSON", "json=")),
    (DETECTION, first("annotations", bbox=KeyError), ("annotations[0] (id 0, image_id 3) lacks bbox", "four numbers")),
    (DETECTION, first("annotations", bbox=None), ("bbox is None",)),
    (DETECTION, first("annotations", bbox=[1, 2, 3]), ("bbox is [1, 2, 3]",)),
    (DETECTION, first("annotations", bbox=[1, 2, "3", 4]), ("bbox[2] is '3'",)),
    (DETECTION, first("annotations", bbox=[1, 2, -3, 4]), ("bbox[2] is -3", "not negative")),
    (DETECTION, first("annotations", bbox={"x": 1}), ("bbox is {'x': 1}",)),
    (DETECTION, first("annotations", area="3"), ("area is '3'",)),
    (DETECTION, first("annotations", ignore=1), ("has ignore 1", "write iscrowd 1")),
    (DETECTION, first("annotations", category_id=4), ("unknown category: annotations[0] (id 0) of image 3: 4",)),
    (DETECTION, first("annotations", category_id=1e300), ("category_id is 1e+300",)),
    (INSTANCES, first("annotations", segmentation=[[1, 1, 3, 3]]), ("no polygon of three points", "[[1.0, 1.0")),
    (INSTANCES, first("annotations", segmentation=[]), ("no polygon of three points",)),
    (INSTANCES, first("annotations", segmentation=KeyError), ("lacks segmentation", "write polygons")),
    (INSTANCES, first("annotations", segmentation={"counts": [1, -1], "size": [4, 6]}), ("counts[1] is -1",)),
    (INSTANCES, first("annotations", segmentation={"counts": "a", "size": [4]}), ("segmentation.size is [4]",)),
]  # fmt: skip


@pytest.mark.parametrize("kind, change, parts", REFUSED)
def test_what_is_refused(written, kind, change, parts):
    path = written(kind, change)
    with pytest.raises(DataError) as caught:
        read(path, kind)
    for part in (str(path), *parts):
        assert part in str(caught.value), str(caught.value)


def test_all_that_is_wrong_is_listed_and_what_is_right_is_kept(written):
    def spoil(content):
        content["images"][0]["width"] = "6"
        content["annotations"][1]["segments_info"][0]["iscrowd"] = "0"

    path = written(PANOPTIC, spoil)
    content, findings = examine(path, PANOPTIC)
    assert [f.kind for f in findings] == ["malformed image entry", "malformed annotation entry"]
    assert [i.id for i in content.images] == [5] and [a.image_id for a in content.annotations] == [3]
    with pytest.raises(DataError, match=r"2 findings in all; tools/check_dataset.py"):
        read(path, PANOPTIC)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b'"images"', b"\xff\xfe{", b'{"images": NaN}', b'{"images": [1e400]}', b"[" * 100_000],
    ids=["empty", "cut", "list", "null", "text", "utf16", "nan", "1e400", "deep"],
)
def test_what_is_no_annotation_at_all(written, raw):
    path = written(PANOPTIC, raw=raw)
    for reader in (read, read_categories):
        with pytest.raises(DataError, match="panoptic.json: "):
            reader(path, PANOPTIC)


def test_a_file_in_other_encodings(written):
    content = json.dumps(GOOD[PANOPTIC])
    assert len(read(written(PANOPTIC, raw=b"\xef\xbb\xbf" + content.encode()), PANOPTIC).images) == 2
    with pytest.raises(DataError, match="must be UTF-8"):
        read(written(PANOPTIC, raw=content.encode("utf-16")), PANOPTIC)
    with pytest.raises(DataError, match="must be UTF-8"):
        read(written(PANOPTIC, raw=content.replace("disc", "d\xefsc").encode("latin-1")), PANOPTIC)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(DataError, match="none.json: panoptic JSON not found.*DETECTRON2_DATASETS"):
        read(tmp_path / "none.json", PANOPTIC)
    with pytest.raises(DataError, match="not a readable JSON file"):
        read(tmp_path, PANOPTIC)


def test_a_pipe_or_a_device_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pan.json")
    for path in (tmp_path / "pan.json", "/dev/zero"):
        with pytest.raises(DataError, match=f"{path}: not a readable JSON file .it is not a regular file"):
            read(path, PANOPTIC)


def test_categories_alone_do_not_mind_the_rest(written):
    path = written(PANOPTIC, first("segments", id="7"))
    assert [c.as_dict() for c in read_categories(path, PANOPTIC)] == CATEGORIES
    with pytest.raises(DataError, match="panoptic.json: .*isthing is '0'"):
        read_categories(written(PANOPTIC, first("categories", isthing="0")), PANOPTIC)
    with pytest.raises(DataError, match="duplicate category id"):
        read_categories(written(PANOPTIC, first("categories", id=2)), PANOPTIC)


def test_files_outside_their_folder_if_asked_for(written):
    path = written(PANOPTIC, first("images", file_name="../else/3.png"))
    assert read(path, PANOPTIC, outside=True).images[0].file_name == "../else/3.png"


@pytest.mark.parametrize("name", ["/a.png", "../a.png", "b/../../a.png", r"..\a.png", r"C:\a.png", "C:/a.png", "~/a"])
def test_names_that_leave_the_folder(name):
    assert leaves_folder(name)


@pytest.mark.parametrize("name", ["a.png", "b/a.png", "a..b.png", ".hidden/a", "b/c:d.png", "~a.png"])
def test_names_that_stay(name):
    assert not leaves_folder(name)
