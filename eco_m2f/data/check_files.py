"""Checks the files of one image against the JSON: the image, its panoptic PNG and its class map."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from pycocotools import mask as rle

from .annotations import Finding
from .images import open_image, remarks, to_rgb
from .masks import run_lengths
from .panoptic_map import NOT_ITS_IDS, RENUMBER, VOID, DataError, read_classes, read_ids
from .schema import MaskedObject

STRAY = 0.01  # a class map contradicts its panoptic PNG in more than this share of the labelled pixels
UNCOVERED = 0.5  # an instance JSON contradicts it if its objects leave out more than this share of the things' pixels


@dataclass(frozen=True)
class ImageFiles:
    """One image's files and what the JSON says about them. It can be pickled."""

    image: str
    panoptic: str | None = None
    class_map: str | None = None
    size: tuple[int, int] | None = None  # (height, width) in the JSON
    areas: dict[int, float | None] = field(default_factory=dict)  # segment id -> area in the JSON
    classes: dict[int, int] = field(default_factory=dict)  # segment id -> contiguous class
    ignore: int = 255  # void in the class map
    num_classes: int = 0
    things: dict[int, int] = field(default_factory=dict)  # segment id of a thing -> category id
    objects: list[MaskedObject] | None = None  # of the instance JSON, if there is one


@dataclass(frozen=True)
class Checked:
    """The findings on one image, and the number of pixels of its panoptic PNG: all, and void."""

    findings: list[Finding]
    pixels: int = 0
    void: int = 0


def check_files(files: ImageFiles) -> Checked:
    """Checks the files of one image. Any error becomes a finding, so the check of other images continues."""
    try:
        return _check_files(files)
    except Exception as error:
        where = f"{files.image} ({type(error).__name__}: {error})"
        return Checked([Finding("image that cannot be checked", where, "restore its files, or make them again")])


def missing_files(files: ImageFiles) -> Iterator[Finding]:
    """A finding for each file that does not exist."""
    remedies = {
        "image": "restore it, or remove it from the JSON",
        "panoptic PNG": "restore it; datasets/README.md shows how to make it",
        "semantic PNG": "restore it; datasets/README.md shows how to make it",
    }
    for kind, path in zip(remedies, (files.image, files.panoptic, files.class_map)):
        if path is not None and not os.path.isfile(path):  # also for a name too long for the file system
            yield Finding(f"missing {kind}", path, remedies[kind])


def compare_class_map(files: ImageFiles, ids: np.ndarray) -> Iterator[Finding]:
    """Compares the class map with the classes of the panoptic PNG. ids: segment ids, [H, W]."""
    try:
        classes = read_classes(files.class_map)
    except DataError as error:
        yield Finding("unreadable semantic PNG", str(error), "restore it, or make it again")
        return
    if classes.shape != ids.shape:
        where = f"{files.class_map} is {by(classes.shape)} pixels, the panoptic PNG {by(ids.shape)}"
        yield Finding("class map of another size", where, "make it again from the panoptic PNG")
        return
    used = np.unique(classes)
    if unknown := [int(c) for c in used if c >= files.num_classes and c != files.ignore]:
        where = f"{files.class_map}: class {unknown[0]}, but there are {files.num_classes}, and {files.ignore} for void"
        yield Finding("unknown class in a class map", where, "classes are contiguous, in the order of the categories")
    expected = _classes_of(ids, files)
    labelled = (classes != files.ignore) & (expected != files.ignore)
    if not labelled.any() and (expected != files.ignore).any():
        where = f"{files.class_map}: it labels no pixel that {files.panoptic} labels"
        yield Finding("class map contradicts panoptic PNG", where, "make it again from the panoptic PNG")
    share = float((classes != expected)[labelled].mean()) if labelled.any() else 0.0
    if share > STRAY:
        where = f"{files.class_map}: {share:.0%} of the labelled pixels have another class than in {files.panoptic}"
        yield Finding("class map contradicts panoptic PNG", where, "make it again from the panoptic PNG")


def compare_objects(files: ImageFiles, ids: np.ndarray) -> Iterator[Finding]:
    """Compares the masks of the instance JSON with the things of the panoptic PNG. ids: segment ids, [H, W].

    Objects may overlap, so they may be larger than their segments. But a category's segments must lie in its objects.
    """
    covered: dict[int, np.ndarray] = {}
    for o in files.objects or ():
        try:
            mask = rle.decode(run_lengths(o.segmentation, ids.shape)).astype(bool)
        except ValueError as error:
            where = f"{files.image}: an object of category {o.category_id} in the instance JSON has {error}"
            yield Finding("unusable mask in the instance JSON", where, "correct it there")
            return
        covered[o.category_id] = covered.get(o.category_id, False) | mask
    segments_of: dict[int, list[int]] = {}
    for segment, category in files.things.items():
        segments_of.setdefault(category, []).append(segment)
    drawn = {category: np.isin(ids, segments) for category, segments in segments_of.items()}
    pixels = sum(int(mask.sum()) for mask in drawn.values())
    outside = sum(int((mask & ~covered[c]).sum() if c in covered else mask.sum()) for c, mask in drawn.items())
    if outside > UNCOVERED * pixels:
        where = f"{files.image}: {outside / pixels:.0%} of the pixels of its things lie in no object of their category"
        yield Finding("instances contradict panoptic PNG", where, "make both from the same annotation")


def by(size: tuple[int, ...]) -> str:
    """(height, width) as "WIDTHxHEIGHT"."""
    return f"{size[1]}x{size[0]}"


def _check_files(files: ImageFiles) -> Checked:
    found = list(missing_files(files))
    image = _image_size(files.image, found) if os.path.isfile(files.image) else None
    if image is not None and files.size is not None and image != files.size:
        where = f"{files.image} is {by(image)} pixels, the JSON says {by(files.size)}"
        found.append(Finding("image size differs from JSON", where, "correct width and height in the JSON"))
    if image is not None and min(image) < 2:
        found.append(Finding("image one pixel thin", f"{files.image} ({by(image)})", "remove it from the dataset"))
    if files.panoptic is None or not os.path.isfile(files.panoptic):
        return Checked(found)
    try:
        ids = read_ids(files.panoptic, files.areas)
    except DataError as error:
        return Checked([*found, Finding("unreadable panoptic PNG", str(error), "make it again")])
    if image is not None and ids.shape != image:
        where = f"{files.panoptic} is {by(ids.shape)} pixels, its image {by(image)}"
        found.append(Finding("PNG size differs from image", where, "make the PNG again at the image's size"))
    found += _compare(files, ids)
    if files.class_map is not None and os.path.isfile(files.class_map):
        found += compare_class_map(files, ids)
    if files.objects is not None:
        found += compare_objects(files, ids)
    return Checked(found, ids.size, int((ids == VOID).sum()))


def _image_size(path: str, found: list[Finding]) -> tuple[int, int] | None:
    """(height, width) of an image, or None and a finding in `found` if it cannot be decoded."""
    try:
        opened = open_image(path)
        rgb = to_rgb(opened, path)
    except DataError as error:
        found.append(Finding("unreadable image", str(error), "restore it, or remove it from the JSON"))
        return None
    found += [Finding(about, path, remedy) for about, remedy in remarks(opened, rgb)]
    return rgb.shape[:2]


def _compare(files: ImageFiles, ids: np.ndarray) -> Iterator[Finding]:
    """Compares the PNG's segments with the JSON's."""
    drawn = {int(i): int(n) for i, n in zip(*np.unique(ids, return_counts=True), strict=True) if i != VOID}
    stray, absent = sorted(drawn.keys() - files.areas.keys()), sorted(files.areas.keys() - drawn.keys())
    if stray and absent and len(absent) == len(files.areas):
        where = f"{files.panoptic}: ids {stray[:5]} in the PNG, {absent[:5]} in the JSON, none in both"
        yield Finding("PNG with other ids than the JSON", where, NOT_ITS_IDS)
        return
    for i in stray:
        yield Finding("segment in PNG, not in JSON", f"{files.panoptic}: id {i}", "list it in segments_info")
    for i in absent:
        remedy = (
            RENUMBER if i == VOID else "compare the PNG with its source; delete it from the JSON if nothing is lost"
        )
        yield Finding("segment in JSON, not in PNG", f"{files.panoptic}: id {i}", remedy)
    for i, area in files.areas.items():
        if i in drawn and area is not None and area != drawn[i]:
            where = f"{files.panoptic}: id {i} has {drawn[i]} pixels, the JSON says {area:g}"
            yield Finding("area off", where, "correct the area in the JSON; the mask's area is used")


def _classes_of(ids: np.ndarray, files: ImageFiles) -> np.ndarray:
    """Contiguous classes [H, W]; `ignore` where there is no segment. Crowds keep their class."""
    values, inverse = np.unique(ids, return_inverse=True)
    classes = np.array([files.classes.get(int(i), files.ignore) for i in values], dtype=np.int64)
    return classes[inverse].reshape(ids.shape)
