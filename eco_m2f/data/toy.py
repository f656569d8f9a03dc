"""The toy set: generated scenes in COCO panoptic format, with images from easy to hard.

Things are shapes: disk, ring, triangle, square, star. Stuff is texture; its class is the orientation of its waves. Each
image has a difficulty in [0, 1]. A higher one means more objects, occlusion, touching twins of one class, noise,
clutter and warping. It also means smaller objects, less contrast and less information in colour. In an easy image
every class has its colour. In a hard one, colour is only a hint: a model needs the whole shape and the weave.

The things also exist as boxes in COCO's detection format: the same objects in the same images.

Every image has its own seed (seed, split, index), so image i does not depend on the number of images.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .writing import already_made, describe_segments, whole_folder, write_json, write_panoptic

VERSION = 3  # of the scenes: raise it when the same seed would give other pixels
SPLITS = ("train", "val")
THINGS = ("disk", "ring", "triangle", "square", "star")
STUFF = ("waves", "bars", "weave", "mottle")  # level crests, upright crests, both, neither
CROWD_SHAPE = "disk"
CATEGORIES = [
    {"id": 1, "name": "disk", "isthing": 1, "color": [230, 80, 60]},
    {"id": 2, "name": "ring", "isthing": 1, "color": [240, 170, 40]},
    {"id": 3, "name": "triangle", "isthing": 1, "color": [90, 190, 80]},
    {"id": 4, "name": "square", "isthing": 1, "color": [60, 140, 230]},
    {"id": 5, "name": "star", "isthing": 1, "color": [190, 90, 210]},
    {"id": 101, "name": "waves", "isthing": 0, "color": [70, 90, 120]},
    {"id": 102, "name": "bars", "isthing": 0, "color": [120, 90, 70]},
    {"id": 103, "name": "weave", "isthing": 0, "color": [80, 120, 90]},
    {"id": 104, "name": "mottle", "isthing": 0, "color": [110, 110, 110]},
]
CATEGORY_ID = {c["name"]: c["id"] for c in CATEGORIES}
MIN_PIXELS = 16  # an object with fewer visible pixels is not drawn
MIN_VISIBLE = 0.35  # an object is not drawn if it would leave a smaller share of an earlier one visible


def _unit(vector) -> np.ndarray:
    return np.asarray(vector, dtype=float) / np.linalg.norm(vector)


# Directions in RGB space, far from each other among things and among stuff.
HUES = {
    "disk": _unit([1, -0.6, -0.6]),
    "ring": _unit([-0.6, 1, -0.6]),
    "triangle": _unit([-0.6, -0.6, 1]),
    "square": _unit([1, 1, -0.3]),
    "star": _unit([-0.8, -0.8, -0.8]),
    "waves": _unit([1, 0, -1]),
    "bars": _unit([-1, 0, 1]),
    "weave": _unit([-1, 1, 0]),
    "mottle": _unit([1, -1, 0]),
}


@dataclass(frozen=True)
class ToySpec:
    """The parameters of a toy set. They are stored in the JSON files, where a second run finds them."""

    num_train: int = 800
    num_val: int = 200
    size: int = 96  # side of the square images, pixels
    seed: int = 0
    version: int = VERSION

    def __post_init__(self):
        if self.size < 32:
            raise ValueError(f"size must be at least 32 pixels, or shapes look the same; got {self.size}")
        if self.num_train < 1 or self.num_val < 1:
            raise ValueError(f"num_train and num_val must be at least 1, got {self.num_train} and {self.num_val}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")


@dataclass
class Scene:
    """One generated image: pixels uint8 [H, W, 3], segment ids int32 [H, W], its segments and its difficulty."""

    image: np.ndarray
    ids: np.ndarray
    segments: list[dict]
    difficulty: float


def make_toy_dataset(output: str | Path, spec: ToySpec | None = None, overwrite: bool = False) -> bool:
    """Writes the toy set to `output`: images in {train,val}/, PNGs in panoptic_{train,val}/, and in annotations/
    panoptic_{train,val}.json and detection_{train,val}.json.

    The folder is written whole or not at all. If it already holds a set of the same spec, this only adds missing
    detection JSONs and returns False.
    Raises FileExistsError if `output` holds something else, unless it is a toy set and overwrite is set.
    """
    spec = spec or ToySpec()
    if already_made(output, _made_from(spec), SPLITS, overwrite):
        for split in SPLITS:
            if not detection_json(output, split).exists():
                write_detection(output, split)
        return False
    with whole_folder(output) as draft:
        for split in SPLITS:
            _write_split(draft, split, spec)
    return True


def draw_scene(size: int, seed: int, split: str, index: int, difficulty: float | None = None) -> Scene:
    """Draws image `index` of a split. It is a pure function of its arguments. difficulty: in [0, 1], drawn if None."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    drawn = float(rng.random())
    canvas = _Canvas(size, drawn if difficulty is None else difficulty, rng)
    canvas.paint_background()
    canvas.paint_clutter()
    if rng.random() < 0.2 * canvas.difficulty:
        canvas.paint_crowd()
    for _ in range(canvas.num_objects):
        canvas.paint_object()
    return canvas.finish()


def _made_from(spec: ToySpec) -> dict:
    return {"toy": asdict(spec)}


def _write_split(base: Path, split: str, spec: ToySpec) -> None:
    for folder in (split, f"panoptic_{split}"):
        (base / folder).mkdir()
    count = spec.num_train if split == "train" else spec.num_val
    images, annotations = [], []
    for i in tqdm(range(count), desc=f"toy {split}", unit="image", disable=None):
        scene, name = draw_scene(spec.size, spec.seed, split, i), f"{i:06d}.png"
        Image.fromarray(scene.image).save(base / split / name, compress_level=1)
        write_panoptic(base / f"panoptic_{split}" / name, scene.ids)
        size = {"width": spec.size, "height": spec.size}
        images.append({"id": i, "file_name": name, **size, "difficulty": round(scene.difficulty, 6)})
        annotations.append({"image_id": i, "file_name": name, "segments_info": scene.segments})
    write_json(base / "annotations" / f"panoptic_{split}.json", _made_from(spec), images, annotations, CATEGORIES)
    write_detection(base, split)


def detection_json(base: str | Path, split: str) -> Path:
    return Path(base) / "annotations" / f"detection_{split}.json"


def write_detection(base: str | Path, split: str) -> None:
    """Writes the things of a split's panoptic JSON as COCO's detection JSON. Crowds stay crowds."""
    panoptic = json.loads((Path(base) / "annotations" / f"panoptic_{split}.json").read_text())
    things = [c for c in panoptic["categories"] if c["isthing"]]
    wanted = {c["id"] for c in things}
    objects = [
        {"image_id": a["image_id"], **{key: s[key] for key in ("category_id", "bbox", "area", "iscrowd")}}
        for a in panoptic["annotations"]
        for s in a["segments_info"]
        if s["category_id"] in wanted
    ]
    numbered = [{"id": i, **o} for i, o in enumerate(objects, start=1)]  # for pycocotools, id 0 means no object
    made_from = panoptic["info"]["made_from"]
    write_json(detection_json(base, split), made_from, panoptic["images"], numbered, things)


class _Canvas:
    """A scene, painted back to front. Colours are floats in [0, 1]; lengths are pixels."""

    def __init__(self, size: int, difficulty: float, rng: np.random.Generator):
        self.size, self.difficulty, self.rng = size, difficulty, rng
        self.image = np.zeros((size, size, 3))
        self.ids = np.zeros((size, size), dtype=np.int32)
        self.category: dict[int, int] = {}  # segment id -> category id
        self.crowds: set[int] = set()
        self.full_area: dict[int, int] = {}  # of objects, before others covered them
        self.base = rng.uniform(0.3, 0.7, 3)  # the background's mean colour
        self.num_objects = 1 + int(self._between(0.6, 7) * rng.uniform(0.7, 1.3))
        self.last: tuple | None = None  # class, colour, centre and radius of the last object, for twins

    def _between(self, easy: float, hard: float) -> float:
        return easy + (hard - easy) * self.difficulty

    def paint_background(self) -> None:
        """Paints the cells of a warped Voronoi diagram, each with one stuff class."""
        rng, n = self.rng, self.size
        count = 1 + int(self._between(0.5, 3.5) * rng.uniform(0.6, 1.2) + 0.5)
        sites = rng.uniform(0, n, (count, 2))
        warp = self._smooth(2, cells=4) * self._between(0.02, 0.15) * n
        y, x = np.mgrid[0:n, 0:n] + 0.5 + warp.transpose(2, 0, 1)
        cell = np.argmin((y - sites[:, 0, None, None]) ** 2 + (x - sites[:, 1, None, None]) ** 2, axis=0)
        kinds = rng.integers(len(STUFF), size=count)
        contrast = self._between(0.2, 0.12)
        for kind in np.unique(kinds):
            where = np.isin(cell, np.flatnonzero(kinds == kind))
            tint = self.base + rng.normal(0, 0.04, 3) + self._hint() * 0.2 * HUES[STUFF[kind]]
            self.image[where] = (tint + contrast * self._texture(STUFF[kind])[..., None])[where]
            self.ids[where] = self._new_segment(STUFF[kind])

    def _texture(self, kind: str) -> np.ndarray:
        """A field [H, W] of about unit amplitude. Its orientation is the stuff class; all kinds share wavelengths."""
        rng, n = self.rng, self.size
        wavelength = n * rng.uniform(1 / 20, 1 / 20 + self._between(1 / 40, 1 / 10))
        bend = self._smooth(2, cells=3).transpose(2, 0, 1) * self._between(0.1, 0.6) * wavelength
        y, x = (np.mgrid[0:n, 0:n] + bend) * (2 * np.pi / wavelength)
        tilt = rng.normal(0, self._between(0.05, 0.2))  # radians off the axis
        level = np.sin(y * np.cos(tilt) + x * np.sin(tilt) + rng.uniform(0, 7))
        upright = np.sin(x * np.cos(tilt) - y * np.sin(tilt) + rng.uniform(0, 7))
        if kind == "mottle":
            return self._smooth(1, cells=max(2, round(2 * n / wavelength)))[..., 0] * 1.4
        return {"waves": level, "bars": upright, "weave": (level + upright) * 0.7}[kind]

    def _smooth(self, channels: int, cells: int) -> np.ndarray:
        """Smooth noise [H, W, channels] of unit deviation, `cells` bumps across."""
        coarse = self.rng.standard_normal((channels, cells + 1, cells + 1)).astype(np.float32)
        side = (self.size, self.size)
        return np.stack([np.asarray(Image.fromarray(c).resize(side, Image.BICUBIC)) for c in coarse], axis=-1)

    def paint_clutter(self) -> None:
        """Paints short strokes in object colours. They belong to the stuff below them."""
        for _ in range(int(self._between(0, 16) * self.rng.random() + 0.5)):
            length = self.size * self.rng.uniform(0.03, 0.12)
            bar = np.array([[-1, -0.12], [1, -0.12], [1, 0.12], [-1, 0.12]]) * length
            self._blend(*self._place(_polygon(bar), self._anywhere(), length, self._turn()), self._color())

    def paint_object(self) -> None:
        """Tries a few places for one object and paints the first that leaves every object visible enough."""
        for _ in range(8):
            name, color, centre, radius = self._twin() if self._wants_twin() else self._draw_object()
            window, distance = self._place(_SHAPES[name](radius), centre, radius * 1.5, self._turn())
            inside = distance < 0
            if self._acceptable(window, inside):
                break
        else:
            return
        self.last = (name, color, centre, radius)
        self._blend(window, distance, self._textured(color, window))
        segment = self._new_segment(name)
        self.ids[window][inside] = segment
        self.full_area[segment] = int(inside.sum())

    def _draw_object(self) -> tuple:
        name = THINGS[self.rng.integers(len(THINGS))]
        low, high = self._between(0.16, 0.07), self._between(0.24, 0.2)
        radius = self.size * np.exp(self.rng.uniform(np.log(low), np.log(high)))
        return name, self._color(name), self._anywhere(), max(radius, 3.0)

    def _wants_twin(self) -> bool:
        return self.last is not None and self.rng.random() < 0.35 * self.difficulty

    def _twin(self) -> tuple:
        """A copy of the last object that touches it, in the same colour."""
        name, color, centre, radius = self.last
        turn = self._turn()
        return name, color, centre + 1.9 * radius * np.array([np.sin(turn), np.cos(turn)]), radius

    def _acceptable(self, window: tuple, inside: np.ndarray) -> bool:
        if inside.sum() < MIN_PIXELS:
            return False
        below = self.ids[window][inside]
        covered, pixels = np.unique(below, return_counts=True)
        overlap = sum(int(p) for s, p in zip(covered, pixels, strict=True) if s in self.full_area)
        if overlap > self._between(0.0, 0.5) * inside.sum():
            return False
        for segment, lost in zip(covered, pixels, strict=True):
            left = int((self.ids == segment).sum()) - int(lost)
            if left < max(MIN_PIXELS, MIN_VISIBLE * self.full_area.get(int(segment), 0)):
                return False
        return True

    def paint_crowd(self) -> None:
        """Paints a swarm of specks that are too small to separate, annotated as one crowd segment."""
        centre, reach = self._anywhere(), self.size * self.rng.uniform(0.08, 0.15)
        segment, color = self._new_segment(CROWD_SHAPE), self._color()
        for offset in self.rng.normal(0, 0.5, (25, 2)) * reach:
            window, distance = self._place(_disk(self.size * 0.014), centre + offset, self.size * 0.03, 0.0)
            self._blend(window, distance, color)
        window, distance = self._place(_disk(reach), centre, reach, 0.0)
        self.ids[window][distance < 0] = segment
        self.crowds.add(segment)

    def _place(self, shape: Callable, centre: np.ndarray, reach: float, turn: float) -> tuple[tuple, np.ndarray]:
        """The window of the canvas around a shape, and its signed distance to the outline (negative inside)."""
        low = np.clip(np.floor(centre - reach - 2).astype(int), 0, self.size)
        high = np.clip(np.ceil(centre + reach + 2).astype(int), 0, self.size)
        window = (slice(low[0], high[0]), slice(low[1], high[1]))
        y, x = np.mgrid[window] + 0.5 - centre[:, None, None]
        return window, shape(x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn))

    def _blend(self, window: tuple, distance: np.ndarray, color: np.ndarray) -> None:
        cover = np.clip(0.5 - distance, 0, 1)[..., None]  # anti-aliased over one pixel
        self.image[window] += cover * (color - self.image[window])

    def _textured(self, color: np.ndarray, window: tuple) -> np.ndarray:
        """The colour with waves of a random direction, so that texture does not reveal an object's class."""
        y, x = np.mgrid[window] * (2 * np.pi / (self.size * self.rng.uniform(0.05, 0.15)))
        turn = self._turn()
        waves = np.sin(x * np.cos(turn) + y * np.sin(turn))
        return color + self._between(0.0, 0.09) * waves[..., None]

    def _color(self, name: str | None = None) -> np.ndarray:
        """A colour at a distance from the background that the difficulty sets. Its direction is random; in an easy
        image it is close to the hue of the class `name`."""
        direction = _unit(self.rng.standard_normal(3))
        if name is not None:
            direction = _unit((1 - self._hint()) * direction + self._hint() * HUES[name])
        return self.base + direction * self._between(0.55, 0.3)

    def _hint(self) -> float:
        """How much of a class's hue shows."""
        return self._between(1.0, 0.4)

    def _anywhere(self) -> np.ndarray:
        return self.rng.uniform(0.06, 0.94, 2) * self.size

    def _turn(self) -> float:
        return self.rng.uniform(0, 2 * np.pi)

    def _new_segment(self, name: str) -> int:
        """A new segment id. The ids use all three bytes, as in real panoptic PNGs."""
        segment = 1 + (len(self.category) + 1) * 70001 % ((1 << 24) - 1)
        self.category[segment] = CATEGORY_ID[name]
        return segment

    def finish(self) -> Scene:
        """Adds light and noise, and lists the segments that have a pixel."""
        light = 1 + self._between(0.02, 0.12) * self._smooth(1, cells=2)
        noise = self.rng.normal(0, self._between(0.008, 0.05), self.image.shape)
        pixels = np.clip((self.image * light + noise) * 255 + 0.5, 0, 255).astype(np.uint8)
        return Scene(pixels, self.ids, describe_segments(self.ids, self.category, self.crowds), self.difficulty)


# Shapes: radius -> a function of (x, y) that gives the signed distance to the outline (pixels, negative inside).


def _disk(radius: float) -> Callable:
    return lambda x, y: np.hypot(x, y) - radius


def _ring(radius: float) -> Callable:
    # The hole has half the radius, so the outer edge alone does not distinguish a ring from a disk.
    return lambda x, y: np.abs(np.hypot(x, y) - 0.75 * radius) - 0.25 * radius


def _polygon(corners: np.ndarray) -> Callable:
    """Distance to the nearest edge, signed by the even-odd rule. corners: [N, 2] as (x, y)."""

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        nearest, inside = np.full(x.shape, np.inf), np.zeros(x.shape, dtype=bool)
        for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            ex, ey = bx - ax, by - ay
            along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
            nearest = np.minimum(nearest, np.hypot(x - ax - along * ex, y - ay - along * ey))
            if ey != 0:
                inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) / ey * ex)
        return np.where(inside, -nearest, nearest)

    return distance


def _regular(points: int, outer: float, inner: float | None = None) -> Callable:
    """A regular polygon, or with `inner` a star of that many points."""
    count = points if inner is None else 2 * points
    turn = np.arange(count) * (2 * np.pi / count)
    radius = np.full(count, outer)
    if inner is not None:
        radius[1::2] = inner
    return _polygon(np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=-1))


# The factors make the areas similar, so that size says little about the class.
_SHAPES: dict[str, Callable[[float], Callable]] = {
    "disk": _disk,
    "ring": lambda radius: _ring(1.1 * radius),
    "triangle": lambda radius: _regular(3, 1.4 * radius),
    "square": lambda radius: _regular(4, 1.2 * radius),
    "star": lambda radius: _regular(5, 1.45 * radius, 0.65 * radius),
}
