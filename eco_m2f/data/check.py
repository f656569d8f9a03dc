"""Finds faults of a registered dataset, panoptic or of boxes, before a training run meets them.

It works on any dataset whose metadata names a panoptic_json: COCO, Cityscapes, and all that this project registers. It
also works on any dataset in COCO's detection format. `check_dataset` checks everything. Every tool calls
`check_at_start`, which makes only the checks that take seconds.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog

from .annotations import (
    ADVICE,
    Finding,
    class_map_file,
    examine,
    image_file,
    kind_of,
    leaves_folder,
    read,
    read_registered,
    repeated,
)
from .categories import by_position, check_same_categories, check_same_classes, registered_categories, same_categories
from .check_files import ImageFiles, check_files, compare_class_map, compare_objects, missing_files
from .datasets.coco_panoptic_like import EVALUATOR_TYPE as OWN
from .panoptic_map import DataError, read_ids
from .parallel import each
from .registered import box_metadata, has_boxes, is_semantic, may_lie_outside, metadata_of, panoptic_metadata
from .schema import (
    INSTANCES,
    PANOPTIC,
    Content,
    DetectionContent,
    Image,
    InstanceContent,
    Kind,
    Object,
    PanopticContent,
)

BOX_SLACK = 1.0  # pixels that a box may lie outside its image
MOSTLY = 0.5  # with a larger share of void pixels PQ means little
IMAGES_AT_START = 3  # images whose files are checked when a tool starts


def check_class_count(
    dataset_name: str, num_classes: int, annotation: str = "panoptic", reference: str | None = None
) -> None:
    """Raises ValueError unless MODEL.SEM_SEG_HEAD.NUM_CLASSES is the dataset's number of categories.

    annotation: what the model needs. "panoptic": things and stuff count; "boxes": COCO's detection format.
    reference: the training set. If its categories differ from the dataset's, the message shows them instead of a
    number, because no number would help.
    """
    if annotation == "boxes":
        count = len(box_metadata(dataset_name).thing_classes)
    elif is_semantic(dataset_name):
        count = len(MetadataCatalog.get(dataset_name).stuff_classes)
    else:
        meta = panoptic_metadata(dataset_name)
        count = len(meta.thing_dataset_id_to_contiguous_id) + len(meta.stuff_dataset_id_to_contiguous_id)
    if count != num_classes:
        if reference is not None and reference != dataset_name:
            check_same_as_training(reference, dataset_name, MetadataCatalog.get(dataset_name))
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes}, but dataset {dataset_name!r} has {count} categories: "
            f"set it to {count}, or choose another dataset"
        )


def check_at_start(names: Sequence[str], reference: str | None = None, evaluated: Sequence[str] = ()) -> None:
    """The checks that every tool makes before it starts: JSON, categories, and whether some files are in place.

    Args:
        reference: the model's training set. The other datasets must have its categories.
        evaluated: the datasets whose instance JSON, if any, will be read.

    Raises ValueError, or DataError for a fault in a file, which it names.
    """
    for name in dict.fromkeys(names):
        meta = MetadataCatalog.get(name)
        if reference is not None and name != reference:
            check_same_as_training(reference, name, meta)
        if is_semantic(name):
            continue
        content, panoptic = read_registered(meta), kind_of(meta) is PANOPTIC
        registered, listed = registered_categories(meta), [c.as_dict() for c in content.categories]
        json_file = meta.panoptic_json if panoptic else meta.json_file
        check_same_categories(registered, listed, f"dataset {name!r} as it is registered", str(json_file))
        if not panoptic:
            _check_some_files(_box_files(content.images, meta, IMAGES_AT_START))
            continue
        instances = None
        if name in evaluated and getattr(meta, "json_file", None):
            instances = read(meta.json_file, INSTANCES, may_lie_outside(meta))
            for finding in _check_instances(content, instances, meta, False):
                raise DataError(f"{meta.json_file}: {finding}")
        _check_some_files(_panoptic_files(content, meta, IMAGES_AT_START, instances), getattr(meta, "json_file", None))


def check_dataset(
    name: str,
    num_classes: int | None = None,
    sample: int | None = None,
    seed: int = 0,
    workers: int = 1,
    reference: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Finding]:
    """Everything that is wrong with a dataset, sorted. [] means that nothing was found.

    Args:
        num_classes: the model's number of classes, compared if given.
        sample: check the files of so many images, drawn with `seed`; None: of all. The JSON is always checked whole.
        workers: processes that read files.
        reference: the training set. This dataset must have its categories.
        tell: called with each line of information that is no fault.

    Raises ValueError if the name is not registered, or has neither panoptic annotation nor boxes.
    """
    boxes = has_boxes(name)
    meta = box_metadata(name) if boxes else panoptic_metadata(name)
    findings = [] if num_classes is None else list(_check_classes(name, num_classes, "boxes" if boxes else "panoptic"))
    findings += _check_reference(reference, name, meta)
    content, found = examine_file(meta.json_file if boxes else meta.panoptic_json, kind_of(meta), may_lie_outside(meta))
    if content is None:
        return [*findings, *found]
    instances, more = (None, []) if boxes else _read_instances(meta)
    instances = None if more else instances  # an incomplete one would cause false findings
    findings += found + more
    if boxes:
        findings += check_box_json(content, meta, not found)
        files = list(_box_files(content.images, meta))
    else:
        findings += check_json(content, meta, not found, instances)
        files = list(_panoptic_files(content, meta, instances=instances))
    if sample is not None and sample < len(files):
        files = random.Random(seed).sample(files, sample)
    pixels = void = 0
    for checked in each(check_files, files, workers, title=name):
        findings += checked.findings
        pixels, void = pixels + checked.pixels, void + checked.void
    if pixels:
        tell(
            f"{name}: {void / pixels:.0%} of the pixels are void. A prediction there counts neither as right nor wrong"
        )
    if void > MOSTLY * pixels:
        findings.append(_mostly_void(void / pixels))
    return sorted(findings)


def examine_file(json_file: str | Path, kind: Kind, outside: bool = False) -> tuple[Any, list[Finding]]:
    """Like `examine`, but an unusable file is a finding too, and its content is None."""
    try:
        return examine(json_file, kind, outside)
    except DataError as error:
        return None, [Finding("unusable JSON", str(error), "datasets/README.md shows the format")]


def check_json(
    content: PanopticContent, meta, whole: bool = True, instances: InstanceContent | None = None
) -> Iterator[Finding]:
    """Faults of a panoptic JSON whose entries are valid: other categories, images without a usable mask.

    whole: whether no entry was left out as faulty. If not, missing entries are no findings.
    instances: the instance JSON, if there is one.
    """
    yield from _check_categories(content, meta, {s.category_id for a in content.annotations for s in a.segments_info})
    yield from _check_images(content.images)
    annotated = {a.image_id for a in content.annotations}
    missing = {image.id for image in content.images} - annotated if whole else set()
    for i in sorted(missing, key=str):
        yield Finding("image without annotation", f"image id {i}", "annotate it, or remove it from `images`")
    for a in content.annotations:
        if a.segments_info and all(s.iscrowd for s in a.segments_info):
            remedy = "a model learns nothing from it: remove it from a training set"
            yield Finding("crowd-only annotation", a.file_name, remedy)
    if instances is not None:
        yield from _check_instances(content, instances, meta, counts=True)


def _read_instances(meta) -> tuple[InstanceContent | None, list[Finding]]:
    """The instance JSON of a panoptic dataset, if it has one, and its own faults."""
    # COCO's instance JSON is a separate download. Only AP needs it, so it may be missing.
    if not getattr(meta, "json_file", None) or not (Path(meta.json_file).is_file() or meta.evaluator_type == OWN):
        return None, []
    return examine_file(meta.json_file, INSTANCES, may_lie_outside(meta))


def check_box_json(content: DetectionContent, meta, whole: bool = True) -> Iterator[Finding]:
    """Like `check_json`, for a detection JSON. Images without boxes are no finding: COCO has a thousand."""
    yield from _check_categories(content, meta, {o.category_id for o in content.annotations})
    yield from _check_images(content.images)
    if whole and content.images and not content.annotations:
        yield Finding("no object", f"{meta.json_file}: `annotations` is empty", "annotate at least one image")
    ids = [o.id for o in content.annotations if o.id is not None]
    yield from repeated(ids, "duplicate annotation id", "number the annotations again; their ids are not used here")
    by_id = {image.id: image for image in content.images}
    for i, o in enumerate(content.annotations):
        yield from _check_box(f"annotations[{i}] of image {o.image_id!r}", o, by_id.get(o.image_id))


def summary(findings: Iterable[Finding], limit: int = 10) -> str:
    """Findings as text: each kind with its number, then its first `limit` findings."""
    findings = list(findings)
    lines = []
    for kind, count in sorted(Counter(f.kind for f in findings).items()):
        of_kind = [f for f in findings if f.kind == kind]
        lines.append(f"{kind}: {count}")
        lines += [f"  {f.where}; {f.remedy}" for f in of_kind[:limit]]
        if count > limit:
            lines.append(f"  ... and {count - limit} more")
    return "\n".join(lines)


def _check_classes(name: str, num_classes: int, annotation: str) -> Iterator[Finding]:
    try:
        check_class_count(name, num_classes, annotation)
    except ValueError as error:
        yield Finding("class count", str(error), "the model and the dataset must agree")


def _check_reference(reference: str | None, name: str, meta) -> Iterator[Finding]:
    if reference is None or name == reference:
        return
    metadata_of(reference, lambda n: "panoptic" in n)
    try:
        check_same_as_training(reference, name, meta)
    except ValueError as error:
        yield Finding("categories other than the training set's", str(error), "both must list the same categories")


def check_same_as_training(reference: str, name: str, meta) -> None:
    """Raises ValueError unless a dataset has the classes of the training set `reference`, in the same order."""
    ours, theirs = registered_categories(meta), registered_categories(MetadataCatalog.get(reference))
    if is_semantic(name) or is_semantic(reference):
        ours, theirs = by_position(ours), by_position(theirs)
    of_theirs = f"the training set {reference!r} (the first of DATASETS.TRAIN)"
    check_same_classes(theirs, ours, of_theirs, f"dataset {name!r}")


def _check_categories(content: Content, meta, used: set[int]) -> Iterator[Finding]:
    """Compares categories with the registered ones, and finds unused ones that only group others."""
    listed, registered = [c.as_dict() for c in content.categories], registered_categories(meta)
    for c in listed:
        if not any(same_categories([c], [r]) for r in registered if r["id"] == c["id"]):
            where = f"category {c['id']} ({c['name']}) of the JSON"
            yield Finding("category not registered like this", where, "register the dataset from this JSON")
    for i in sorted({r["id"] for r in registered} - {c["id"] for c in listed}):
        yield Finding("category missing in JSON", f"category {i}", "add it to the JSON's categories")
    for c in content.categories:
        if c.id not in used and any(c.name == o.supercategory for o in content.categories if o is not c):
            where = f"category {c.id} ({c.name}) has no annotation and is the supercategory of others"
            remedy = "delete it from `categories` and lower MODEL.SEM_SEG_HEAD.NUM_CLASSES by one, in all splits"
            yield Finding("category that only groups others", where, remedy)


def _check_images(images: Sequence[Image]) -> Iterator[Finding]:
    names = {image.id: image.file_name for image in images}
    yield from repeated(names.values(), "image file used twice", "keep one of the `images` entries")


def _check_box(name: str, o: Object, image: Image | None) -> Iterator[Finding]:
    """Faults of one box. image: the entry of its image, if there is one."""
    x, y, width, height = o.bbox
    where = f"{name}: {[x, y, width, height]}"
    if width <= 0 or height <= 0:
        yield Finding("empty box", where, "width and height must be above 0: correct or delete it")
    right, bottom = (image and image.width) or math.inf, (image and image.height) or math.inf
    if min(x, y) < -BOX_SLACK or x + width > right + BOX_SLACK or y + height > bottom + BOX_SLACK:
        where = f"{where} in an image of {right:g}x{bottom:g} pixels"
        yield Finding("box outside its image", where, "boxes are [x, y, width, height] in pixels: correct it")
    if o.area is not None and o.area != o.as_dict()["area"]:
        where = f"{name}: {o.area:g}, in a box of {width * height:g} pixels"
        yield Finding("area off", where, "correct the area or leave it out; the box's area is used")


def _check_instances(content: PanopticContent, instances: InstanceContent, meta, counts: bool) -> Iterator[Finding]:
    """Compares an instance JSON with the panoptic one. counts: also the number of objects of each category."""
    things = [c.as_dict() for c in content.categories if c.isthing]
    try:
        listed = [c.as_dict() for c in instances.categories]
        check_same_categories(things, listed, "the things of the panoptic JSON", str(meta.json_file))
    except ValueError as error:
        yield Finding("instances of other categories", str(error), "make both files from one list of categories")
        return
    missing = sorted({a.image_id for a in content.annotations} - {i.id for i in instances.images}, key=str)
    if missing:
        where = f"{len(missing)} annotated images are not in {meta.json_file}, such as {missing[0]!r}"
        yield Finding("image missing in the instance JSON", where, "add them to its `images`, with their objects")
    if not counts:
        return
    drawn = Counter(s.category_id for a in content.annotations for s in a.segments_info)
    given = Counter(o.category_id for o in instances.annotations)
    for c in things:
        a, b = drawn[c["id"]], given[c["id"]]
        if abs(a - b) > max(a, b) / 2:
            where = (
                f"category {c['id']} ({c['name']}): {b} objects in {meta.json_file}, {a} segments in the panoptic JSON"
            )
            yield Finding("instances contradict panoptic JSON", where, "make both from the same annotation")


def _mostly_void(share: float) -> Finding:
    return Finding(
        "mostly void",
        f"{share:.0%} of the pixels belong to no segment",
        "PQ ignores predictions that lie mostly on void, so false objects there cost nothing and PQ means little. If "
        "these pixels show background, add a category with isthing 0 and its segments",
    )


def _panoptic_files(
    content: PanopticContent, meta, most: int | None = None, instances: InstanceContent | None = None
) -> Iterator[ImageFiles]:
    """The files of the annotated images with valid entries. most: take at most so many images, evenly spread."""
    things = {c.id for c in content.categories if c.isthing}
    objects: dict = {} if instances is None else {image.id: [] for image in instances.images}
    for o in () if instances is None else instances.annotations:
        objects.get(o.image_id, []).append(o)
    images = {image.id: image for image in content.images}
    classes = {**meta.stuff_dataset_id_to_contiguous_id, **meta.thing_dataset_id_to_contiguous_id}
    for a in _spread(content.annotations, most):
        image = images.get(a.image_id)
        if (
            image is None
            or not may_lie_outside(meta)
            and (leaves_folder(image.file_name) or leaves_folder(a.file_name))
        ):
            continue  # the reader reports it
        yield ImageFiles(
            image=image_file(meta, image),
            panoptic=str(Path(meta.panoptic_root) / a.file_name),
            class_map=class_map_file(meta, image, a),
            size=_size(image),
            areas={s.id: s.area for s in a.segments_info},
            classes={s.id: classes.get(s.category_id, 255) for s in a.segments_info},
            ignore=getattr(meta, "ignore_label", 255),
            num_classes=len(classes),
            things={s.id: s.category_id for s in a.segments_info if s.category_id in things and not s.iscrowd},
            objects=objects.get(a.image_id),
        )


def _box_files(images: Sequence[Image], meta, most: int | None = None) -> Iterator[ImageFiles]:
    for image in _spread(images, most):
        if may_lie_outside(meta) or not leaves_folder(image.file_name):
            yield ImageFiles(image_file(meta, image), size=_size(image))


def _spread(entries: Sequence, most: int | None) -> Sequence:
    return entries if most is None else entries[:: max(len(entries) // most, 1)][:most]


def _size(image: Image) -> tuple[int, int] | None:
    return None if image.height is None or image.width is None else (image.height, image.width)


def _check_some_files(files: Iterable[ImageFiles], instances: str | None = None) -> None:
    """Raises DataError if a file is missing, or if a class map or `instances` contradicts the panoptic PNG.

    instances: path of the instance JSON.
    """
    for one in files:
        found = list(missing_files(one))
        if not found and one.class_map is not None:
            found = list(compare_class_map(one, read_ids(one.panoptic, one.areas)))
        if not found and one.objects is not None:
            for finding in compare_objects(one, read_ids(one.panoptic, one.areas)):
                raise DataError(f"{instances}: {finding}; {ADVICE}")
        for finding in found:
            raise DataError(f"{finding}. datasets/README.md shows the layout of each dataset; {ADVICE}")
