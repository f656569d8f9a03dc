"""Finds what is wrong with a registered panoptic dataset, or one of boxes, before a training run does.

Works on any dataset whose metadata names a panoptic_json (COCO, Cityscapes, and all that this project registers), and
on any in COCO's detection format.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from .datasets.coco_boxes import EVALUATOR_TYPE, read_box_json
from .datasets.coco_panoptic_like import read_coco_json
from .images import DataError, open_image, remarks, to_rgb
from .panoptic_map import VOID, read_ids
from .parallel import each

CITYSCAPES = "cityscapes_panoptic_seg"  # detectron2's evaluator_type
BOX_SLACK = 1.0  # pixels that a box may lie outside its image
SEMANTIC_TYPES = ("sem_seg", "cityscapes_sem_seg")  # those of datasets that have class maps alone


@dataclass(frozen=True, order=True)
class Finding:
    """One thing wrong: its kind (a short constant phrase), the file or id it concerns, and what to do."""

    kind: str
    where: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}; {self.remedy}"


def check_class_count(dataset_name: str, num_classes: int, annotation: str = "panoptic") -> None:
    """Raises ValueError unless MODEL.SEM_SEG_HEAD.NUM_CLASSES is the dataset's number of categories.

    annotation: what the model needs. "panoptic": things and stuff count; "boxes": COCO's detection format.
    """
    if annotation == "boxes":
        count = len(_box_metadata(dataset_name).thing_classes)
    elif _is_semantic(dataset_name):
        count = len(MetadataCatalog.get(dataset_name).stuff_classes)
    else:
        meta = _metadata(dataset_name)
        count = len(meta.thing_dataset_id_to_contiguous_id) + len(meta.stuff_dataset_id_to_contiguous_id)
    if count != num_classes:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes}, but dataset {dataset_name!r} has {count} categories: "
            f"set it to {count}, or choose another dataset"
        )


def check_dataset(
    name: str, num_classes: int | None = None, sample: int | None = None, seed: int = 0, workers: int = 1
) -> list[Finding]:
    """Lists what is wrong with a dataset, sorted; an empty list means nothing was found.

    Args: num_classes: the model's, compared if given; sample: look into the files of that many images drawn with
    `seed` (None: all; the JSON is always checked whole); workers: processes that read files.
    Raises ValueError if the name is not registered, or has neither panoptic annotation nor boxes.
    """
    boxes = _has_boxes(name)
    meta = _box_metadata(name) if boxes else _metadata(name)
    findings = [] if num_classes is None else list(_check_classes(name, num_classes, "boxes" if boxes else "panoptic"))
    try:
        content = read_box_json(meta.json_file) if boxes else read_coco_json(meta.panoptic_json)
    except DataError as error:
        return [*findings, Finding("unusable JSON", str(error), "restore it")]
    findings += check_box_json(content, meta) if boxes else check_json(content, meta)
    jobs = list(_box_jobs(content, meta) if boxes else _jobs(content, meta))
    if sample is not None and sample < len(jobs):
        jobs = random.Random(seed).sample(jobs, sample)
    for found in each(check_files, jobs, workers, title=name):
        findings += found
    return sorted(findings)


def check_json(content: dict, meta) -> list[Finding]:
    """What a panoptic JSON alone reveals: ids declared twice or never, categories, and images without a usable mask."""
    findings = list(_check_categories(content["categories"], meta))
    content = {**content, **_complete(content, findings)}
    images = [image["id"] for image in content["images"]]
    annotated = [annotation["image_id"] for annotation in content["annotations"]]
    findings += _repeated(images, "duplicate image id", "keep one of the `images` entries")
    findings += _repeated(annotated, "image annotated twice", "merge or delete one annotation")
    findings += _repeated(
        [a["file_name"] for a in content["annotations"]], "panoptic PNG used twice", "give each image its own PNG"
    )
    for i in sorted(set(images) - set(annotated), key=str):
        findings.append(Finding("image without annotation", f"image id {i}", "annotate it, or remove it from `images`"))
    findings += _without_image(annotated, images)
    known = {category["id"] for category in content["categories"]}
    for annotation in content["annotations"]:
        findings += _check_segments(annotation, known)
    return findings


def _complete(content: dict, findings: list[Finding] | None = None) -> dict[str, list[dict]]:
    """The images and annotations of a panoptic JSON that have what the reader needs; findings on the others."""
    needed = {
        "images": {"id", "file_name"},
        "annotations": {"image_id", "file_name", "segments_info"},
    }
    kept: dict[str, list[dict]] = {}
    for kind, keys in needed.items():
        kept[kind] = []
        for entry in content[kind]:
            missing = keys - entry.keys()
            parts = entry.get("segments_info") or ()
            missing |= {f"{key} of a segment" for s in parts for key in {"id", "category_id"} - s.keys()}
            if not missing:
                kept[kind].append(entry)
            elif findings is not None:
                told = f"{_brief(entry)} lacks {', '.join(sorted(missing))}"
                findings.append(Finding(f"incomplete {kind[:-1]} entry", told, "complete it, or delete it"))
    return kept


def _brief(entry: dict) -> str:
    return str({k: v for k, v in entry.items() if not isinstance(v, list)})


def check_box_json(content: dict, meta) -> list[Finding]:
    """What a detection JSON alone reveals. Images without boxes are no finding: COCO has a thousand."""
    registered = set(meta.thing_dataset_id_to_contiguous_id)
    findings = list(_check_registered(content["categories"], lambda category: registered, registered))
    images, annotations = content["images"], content["annotations"]
    needed = {"image": ("id", "file_name", "height", "width"), "annotation": ("id", "image_id", "category_id")}
    for kind, entries in (("image", images), ("annotation", annotations)):
        for entry in entries:
            if missing := [key for key in needed[kind] if key not in entry]:
                told = f"{entry} lacks {', '.join(missing)}"
                findings.append(Finding(f"incomplete {kind} entry", told, "complete it, or delete it"))
        ids = [entry["id"] for entry in entries if "id" in entry]
        findings += _repeated(ids, f"duplicate {kind} id", f"keep one of the `{kind}s` entries, or number them anew")
    by_id = {image.get("id"): image for image in images}
    annotations = [a for a in annotations if all(key in a for key in needed["annotation"])]
    findings += _without_image([a["image_id"] for a in annotations], by_id)
    known = {category["id"] for category in content["categories"]}
    for annotation in annotations:
        findings += _check_box(annotation, by_id.get(annotation["image_id"], {}), known)
    return findings


@dataclass(frozen=True)
class _Job:
    """One image's files and what the JSON says of them."""

    image: str
    panoptic: str | None
    sem_seg: str | None
    size: tuple[int, int] | None  # (height, width) in the JSON
    areas: dict[int, int | None]  # segment id -> area in the JSON


def check_files(job: _Job) -> list[Finding]:
    """What one image's files reveal: missing, unreadable, thin, of unequal sizes, or drawn otherwise than listed."""
    found: list[Finding] = []
    image = _image_size(job.image, found)
    if image is not None and job.size is not None and image != job.size:
        told = f"{job.image} is {_by(image)} pixels, the JSON says {_by(job.size)}"
        found.append(Finding("image size differs from JSON", told, "correct width and height in the JSON"))
    if image is not None and min(image) < 2:
        found.append(Finding("image one pixel thin", f"{job.image} ({_by(image)})", "remove it from the dataset"))
    for path, kind in ((job.panoptic, "panoptic PNG"), (job.sem_seg, "semantic PNG")):
        if path is not None and not Path(path).is_file():
            found.append(Finding(f"missing {kind}", path, "restore it; datasets/README.md tells how it is made"))
    if job.panoptic is None or not Path(job.panoptic).is_file():
        return found
    try:
        ids = read_ids(job.panoptic, job.areas)
    except DataError as error:
        return [*found, Finding("unreadable panoptic PNG", str(error), "make it again")]
    if image is not None and ids.shape != image:
        told = f"{job.panoptic} is {_by(ids.shape)} pixels, its image {_by(image)}"
        found.append(Finding("PNG size differs from image", told, "make the PNG again at the image's size"))
    return found + list(_compare(job, ids))


def summary(findings: Iterable[Finding], limit: int = 10) -> str:
    """Findings as text: per kind how many, then the first `limit` of it."""
    findings = list(findings)
    lines = []
    for kind, count in sorted(Counter(f.kind for f in findings).items()):
        of_kind = [f for f in findings if f.kind == kind]
        lines.append(f"{kind}: {count}")
        lines += [f"  {f.where}; {f.remedy}" for f in of_kind[:limit]]
        if count > limit:
            lines.append(f"  ... and {count - limit} more")
    return "\n".join(lines)


def _is_semantic(name: str) -> bool:
    return name in DatasetCatalog.list() and MetadataCatalog.get(name).get("evaluator_type") in SEMANTIC_TYPES


def _has_boxes(name: str) -> bool:
    """Whether a dataset is in COCO's detection format, and has no panoptic annotation."""
    meta = MetadataCatalog.get(name) if name in DatasetCatalog.list() else None
    return getattr(meta, "evaluator_type", None) == EVALUATOR_TYPE and not getattr(meta, "panoptic_json", None)


def _registered(name: str, alike: Callable[[str], bool]):
    """The metadata of a dataset; an unknown name is answered with those that are alike."""
    if name not in DatasetCatalog.list():
        others = sorted(n for n in DatasetCatalog.list() if alike(n))
        raise ValueError(
            f"dataset {name!r} is not registered; choose one of {others}, or register your own by DATASETS.CUSTOM"
        )
    return MetadataCatalog.get(name)


def _box_metadata(name: str):
    meta = _registered(name, lambda n: n.endswith(("_detection_train", "_detection_val")) or n.startswith("coco_2017"))
    if getattr(meta, "evaluator_type", None) != EVALUATOR_TYPE:
        raise ValueError(
            f"dataset {name!r} has no boxes in COCO's detection format: take a detection dataset, such as "
            "coco_2017_train or toy_detection_train, or an entry boxes=<json> of DATASETS.CUSTOM"
        )
    return meta


def _metadata(name: str):
    meta = _registered(name, lambda n: "panoptic" in n and not n.endswith(("_separated", "_stuffonly")))
    if not getattr(meta, "panoptic_json", None):
        raise ValueError(f"dataset {name!r} has no panoptic annotation (its metadata lacks panoptic_json)")
    return meta


def _check_classes(name: str, num_classes: int, annotation: str) -> Iterator[Finding]:
    try:
        check_class_count(name, num_classes, annotation)
    except ValueError as error:
        yield Finding("class count", str(error), "the model and the dataset must agree")


def _check_categories(categories: list[dict], meta) -> Iterator[Finding]:
    things, stuff = set(meta.thing_dataset_id_to_contiguous_id), set(meta.stuff_dataset_id_to_contiguous_id)
    yield from _check_registered(categories, lambda c: things if c["isthing"] else stuff, things | stuff)


def _check_registered(
    categories: list[dict], expected: Callable[[dict], set[int]], all_ids: set[int]
) -> Iterator[Finding]:
    """Findings on the JSON's categories, each of which must be registered among the `expected` ids of its kind."""
    yield from _repeated([c["id"] for c in categories], "duplicate category id", "ids must be unique")
    yield from _repeated([c["name"] for c in categories], "duplicate category name", "names must be unique")
    for category in categories:
        if category["id"] not in expected(category):
            told = f"category {category['id']} ({category['name']}) of the JSON"
            yield Finding("category not registered as such", told, "register the dataset from this JSON")
    for i in sorted(all_ids - {c["id"] for c in categories}):
        yield Finding("category missing in JSON", f"category {i}", "add it to the JSON's categories")


def _without_image(annotated: Iterable, images: Iterable) -> Iterator[Finding]:
    for i in sorted(set(annotated) - set(images), key=str):
        yield Finding("annotation without image", f"image id {i}", "add it to `images`, or delete it")


def _check_box(annotation: dict, image: dict, known: set[int]) -> Iterator[Finding]:
    """image: the entry of its image, as far as it is known."""
    name = f"annotation {annotation['id']} of image {annotation['image_id']}"
    if annotation["category_id"] not in known:
        yield Finding("unknown category", f"{name}: {annotation['category_id']}", "declare it in `categories`")
    box = annotation["bbox"]
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in box):
        yield Finding("box that is not four numbers", f"{name}: {box}", "correct or delete it")
        return
    x, y, width, height = box
    if width <= 0 or height <= 0:
        yield Finding("empty box", f"{name}: {box}", "width and height must be above 0: correct or delete it")
    right, bottom = image.get("width", math.inf), image.get("height", math.inf)
    if min(x, y) < -BOX_SLACK or x + width > right + BOX_SLACK or y + height > bottom + BOX_SLACK:
        told = f"{name}: {box} in an image of {right}x{bottom} pixels"
        yield Finding("box outside its image", told, "boxes are [x, y, width, height] in pixels: correct it")


def _check_segments(annotation: dict, known: set[int]) -> Iterator[Finding]:
    name, segments = annotation["file_name"], annotation["segments_info"]
    yield from _repeated([s["id"] for s in segments], "duplicate segment id", "give each its own id", f"{name}: ")
    for segment in segments:
        if segment["category_id"] not in known:
            told = f"{name}: segment {segment['id']} has category {segment['category_id']}"
            yield Finding("unknown category", told, "declare it in `categories`")
        if not 0 < segment["id"] < 1 << 24:
            yield Finding("segment id out of range", f"{name}: {segment['id']}", "ids are 1..16777215; 0 is void")
    if not segments:
        yield Finding("empty annotation", name, "annotate the image, or remove it")
    elif all(s.get("iscrowd", 0) for s in segments):
        yield Finding("crowd-only annotation", name, "nothing can be learned from it: remove it from a training set")


def _repeated(values: list, kind: str, remedy: str, prefix: str = "") -> list[Finding]:
    return [Finding(kind, f"{prefix}{v} ({n} times)", remedy) for v, n in Counter(values).items() if n > 1]


def _jobs(content: dict, meta) -> Iterator[_Job]:
    content = _complete(content)
    images = {image["id"]: image for image in content["images"]}
    for annotation in content["annotations"]:
        image = images.get(annotation["image_id"])
        if image is None:
            continue  # check_json reports it
        path, sem_seg = _image_paths(image, annotation, meta)
        size = (image["height"], image["width"]) if {"height", "width"} <= image.keys() else None
        areas = {s["id"]: s.get("area") for s in annotation["segments_info"]}
        yield _Job(path, str(Path(meta.panoptic_root) / annotation["file_name"]), sem_seg, size, areas)


def _box_jobs(content: dict, meta) -> Iterator[_Job]:
    for image in content["images"]:
        if {"file_name", "height", "width"} <= image.keys():  # check_box_json reports the others
            yield _Job(
                str(Path(meta.image_root) / image["file_name"]), None, None, (image["height"], image["width"]), {}
            )


def _image_paths(image: dict, annotation: dict, meta) -> tuple[str, str | None]:
    """The image's file and its class-map PNG, if the dataset has one. Cityscapes keeps both in a folder per city."""
    if meta.evaluator_type == CITYSCAPES:
        city = image["id"].split("_")[0]
        labels = Path(meta.gt_dir) / city / f"{image['id']}_gtFine_labelTrainIds.png"
        return str(Path(meta.image_root) / city / f"{image['id']}_leftImg8bit.png"), str(labels)
    sem_seg_root = getattr(meta, "sem_seg_root", None)
    sem_seg = str(Path(sem_seg_root) / annotation["file_name"]) if sem_seg_root else None
    return str(Path(meta.image_root) / image["file_name"]), sem_seg


def _image_size(path: str, found: list[Finding]) -> tuple[int, int] | None:
    """(height, width) of an image that can be decoded whole; else None, and a finding."""
    if not Path(path).is_file():
        found.append(Finding("missing image", path, "restore it, or remove it from the JSON"))
        return None
    try:
        opened = open_image(path)
        rgb = to_rgb(opened, path)
    except DataError as error:
        found.append(Finding("unreadable image", str(error), "restore it, or remove it from the JSON"))
        return None
    found += [Finding(about, path, remedy) for about, remedy in remarks(opened, rgb)]
    return rgb.shape[:2]


def _compare(job: _Job, ids: np.ndarray) -> Iterator[Finding]:
    """The PNG's segments against the JSON's."""
    drawn = {int(i): int(n) for i, n in zip(*np.unique(ids, return_counts=True), strict=True) if i != VOID}
    for i in sorted(drawn.keys() - job.areas.keys()):
        yield Finding("segment in PNG, not in JSON", f"{job.panoptic}: id {i}", "list it, or set its pixels to 0")
    for i in sorted(job.areas.keys() - drawn.keys()):
        yield Finding("segment in JSON, not in PNG", f"{job.panoptic}: id {i}", "delete it from the JSON")
    for i, area in job.areas.items():
        if i in drawn and area is not None and area != drawn[i]:
            told = f"{job.panoptic}: id {i} owns {drawn[i]} pixels, the JSON says {area}"
            yield Finding("area off", told, "correct the area in the JSON")


def _by(size: tuple[int, ...]) -> str:
    return f"{size[1]}x{size[0]}"
