"""Mappers: a dataset dict with file names -> the tensors that a model reads.

INPUT.DATASET_MAPPER_NAME chooses the training mapper, with the names of public Mask2Former YAMLs:
`coco_panoptic_lsj` (large-scale jittering), `mask_former_panoptic` (resize, crop, colour, flip) and
`mask_former_semantic` (the same for class maps). `detr` maps boxes.
"""

import copy

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode, Instances

from .images import ADVICE, DataError, read_rgb
from .panoptic_map import decode, index_map, masks_of, read_classes, read_ids
from .transforms import ColorAugSSD, JitterScale, ShortestEdge

IMAGE_PAD = 128  # grey
SEG_PAD = 255  # void


class PanopticTrainMapper:
    """Reads image and panoptic PNG, augments both, and makes one mask per segment that is still visible.

    The `from_config` of a subclass chooses the augmentations.
    Input: a dict with file_name, pan_seg_file_name and segments_info (contiguous category ids).
    Output: a dict with image (uint8 [3, H, W]), height and width (of the original, pixels), image_id, file_name and
    instances. These have gt_classes (int64 [N]) and gt_masks (bool [N, H, W]). Crowd segments, and segments that the
    crop removed, are left out.
    Raises DataError naming the offending file.
    """

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        augmentations: list,
        image_format: str,
        size_divisibility: int = -1,
        needs_sem_seg: bool = False,
        ignore_label: int = 255,
    ):
        """size_divisibility: pad right and bottom to the next multiple (pixels; < 1: no padding).
        needs_sem_seg: whether an augmentation reads the class map. ignore_label: the void value of that map."""
        if not is_train:
            raise ValueError(f"{type(self).__name__} is for training only; use PanopticTestMapper to evaluate")
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.size_divisibility = size_divisibility
        self.needs_sem_seg = needs_sem_seg
        self.ignore_label = ignore_label

    def __call__(self, dataset_dict: dict) -> dict:
        record = dict(dataset_dict)
        image = read_image(record, self.image_format)
        segments, planes = _read_segments(record, image)
        sem_seg = _class_map(planes, segments, self.ignore_label, crowds=False) if self.needs_sem_seg else None
        aug_input = T.AugInput(image, sem_seg=sem_seg)
        transforms = self.augmentations(aug_input)
        image, planes = self._pad(aug_input.image, transforms.apply_segmentation(planes))
        wanted = np.flatnonzero([not s.get("iscrowd", 0) for s in segments])
        left, instances = _instances(planes, wanted)
        instances.gt_classes = torch.tensor([segments[i]["category_id"] for i in left], dtype=torch.int64)
        return {**_identity(record), "image": _to_tensor(image), "instances": instances}

    def _pad(self, image: np.ndarray, planes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.size_divisibility < 1:
            return image, planes
        bottom, right = (-side % self.size_divisibility for side in image.shape[:2])
        pad = T.PadTransform(0, 0, right, bottom, pad_value=IMAGE_PAD, seg_pad_value=SEG_PAD)
        return pad.apply_image(image), pad.apply_segmentation(planes)


class COCOPanopticLSJMapper(PanopticTrainMapper):
    """Large-scale jittering: flip, scale by INPUT.MIN_SCALE..MAX_SCALE, crop or pad to an INPUT.IMAGE_SIZE square."""

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        side = cfg.INPUT.IMAGE_SIZE
        augmentations = _flip(cfg) + [
            JitterScale(cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE, target_height=side, target_width=side),
            T.FixedSizeCrop((side, side), pad_value=IMAGE_PAD, seg_pad_value=SEG_PAD),
        ]
        return {**_common(cfg, is_train), "augmentations": augmentations}


class MaskFormerPanopticMapper(PanopticTrainMapper):
    """Cityscapes' augmentations: resize the shortest edge, crop, distort colours, flip; as set in INPUT."""

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        augmentations = [
            ShortestEdge(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING)
        ]
        constrained = cfg.INPUT.CROP.ENABLED and cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA < 1.0
        if cfg.INPUT.CROP.ENABLED:
            augmentations.append(_crop(cfg, constrained))
        if cfg.INPUT.COLOR_AUG_SSD:
            augmentations.append(ColorAugSSD(cfg.INPUT.FORMAT))
        return {
            **_common(cfg, is_train),
            "augmentations": augmentations + _flip(cfg),
            "needs_sem_seg": constrained,
            "ignore_label": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        }


class MaskFormerSemanticMapper(MaskFormerPanopticMapper):
    """The same augmentations for class maps: semantic PNGs, or else the classes of panoptic PNGs.

    Output: like `PanopticTrainMapper`, plus sem_seg (int64 [H, W], void is SEM_SEG_HEAD.IGNORE_VALUE). There is one
    instance per visible class. Crowds keep their class, as in the semantic annotation of COCO and Cityscapes.
    """

    @configurable
    def __init__(self, is_train: bool = True, *, num_classes: int, **panoptic):
        super().__init__(is_train, **panoptic)
        self.num_classes = num_classes

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        return {**super().from_config(cfg, is_train), "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES}

    def __call__(self, dataset_dict: dict) -> dict:
        record = dict(dataset_dict)
        image = read_image(record, self.image_format)
        aug_input = T.AugInput(image, sem_seg=self._read_classes(record, image))
        self.augmentations(aug_input)
        image, classes = self._pad(aug_input.image, aug_input.sem_seg)
        left, instances = _instances(classes, np.arange(self.num_classes))
        instances.gt_classes = torch.from_numpy(left)
        sem_seg = torch.from_numpy(np.where(classes < self.num_classes, classes, self.ignore_label).astype(np.int64))
        return {**_identity(record), "image": _to_tensor(image), "sem_seg": sem_seg, "instances": instances}

    def _read_classes(self, record: dict, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W]. Raises DataError if map and image differ in size, or a class is none of the model's."""
        if "sem_seg_file_name" not in record:
            segments, planes = _read_segments(record, image)
            return _class_map(planes, segments, self.ignore_label, crowds=True)
        source = record["sem_seg_file_name"]
        classes = read_classes(source)
        _check_size(f"{source}: the semantic PNG", classes, record, image)
        unknown = np.setdiff1d(classes, [*range(self.num_classes), self.ignore_label])
        if unknown.size:
            raise DataError(
                f"{source}: class {unknown[0]} is neither below MODEL.SEM_SEG_HEAD.NUM_CLASSES {self.num_classes} nor "
                f"the void value {self.ignore_label}; datasets/README.md shows how to make the PNG"
            )
        return classes


class DetrMapper:
    """DETR's augmentations of an image and its boxes: flip; perhaps resize and crop; resize the shortest edge.

    With INPUT.CROP.ENABLED half of the images are first resized to a shortest edge of 400, 500 or 600 pixels and
    cropped (DETR, section A.4).
    Input: a dict with file_name and annotations, as detectron2 loads them from COCO's detection format.
    Output: image (uint8 [3, H, W]), height and width (of the original, pixels), image_id, file_name and instances.
    These have gt_classes (int64 [N]) and gt_boxes (corners, pixels). Crowds, and objects that the crop removed, are
    left out.
    Raises DataError naming the offending file.
    """

    BEFORE_CROP = (400, 500, 600)  # shortest edges, pixels

    @configurable
    def __init__(self, is_train: bool = True, *, augmentations: list, image_format: str):
        if not is_train:
            raise ValueError("DetrMapper is for training only; use PanopticTestMapper to evaluate")
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        crop = cfg.INPUT.CROP
        augmentations = _flip(cfg)
        if crop.ENABLED:
            zoom = [ShortestEdge(cls.BEFORE_CROP, sample_style="choice"), T.RandomCrop(crop.TYPE, crop.SIZE)]
            augmentations.append(T.RandomApply(T.AugmentationList(zoom), prob=0.5))
        augmentations.append(
            ShortestEdge(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING)
        )
        return {"is_train": is_train, "augmentations": augmentations, "image_format": cfg.INPUT.FORMAT}

    def __call__(self, dataset_dict: dict) -> dict:
        record = dict(dataset_dict)
        if "annotations" not in record:
            raise DataError(
                f"{record['file_name']}: the dataset has no boxes; train on a detection dataset, e.g. an entry of "
                "DATASETS.CUSTOM with boxes=<json>"
            )
        aug_input = T.AugInput(read_image(record, self.image_format))
        transforms = self.augmentations(aug_input)
        instances = _boxes(record["annotations"], transforms, aug_input.image.shape[:2])
        return {**_identity(record), "image": _to_tensor(aug_input.image), "instances": instances}


def _boxes(annotations: list[dict], transforms: T.Transform, size: tuple[int, int]) -> Instances:
    kept = [a for a in annotations if not a.get("iscrowd", 0)]
    corners = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in kept]
    corners = transforms.apply_box(np.array(corners, dtype=np.float64).reshape(-1, 4))
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.from_numpy(corners).float())
    instances.gt_boxes.clip(size)
    instances.gt_classes = torch.tensor([a["category_id"] for a in kept], dtype=torch.int64)
    return instances[instances.gt_boxes.nonempty()]


MAPPERS = {
    "coco_panoptic_lsj": COCOPanopticLSJMapper,
    "mask_former_panoptic": MaskFormerPanopticMapper,
    "mask_former_semantic": MaskFormerSemanticMapper,
    "detr": DetrMapper,
}


def build_train_mapper(cfg: CfgNode) -> PanopticTrainMapper | DetrMapper:
    """The training mapper named by INPUT.DATASET_MAPPER_NAME. Raises ValueError for an unknown name."""
    name = cfg.INPUT.DATASET_MAPPER_NAME
    if name not in MAPPERS:
        raise ValueError(
            f"INPUT.DATASET_MAPPER_NAME is {name!r}, but there is no such mapper: set it to one of {sorted(MAPPERS)}"
        )
    return MAPPERS[name](cfg, True)


class PanopticTestMapper:
    """Test-time mapper: resizes the image as set in INPUT, and passes on where the ground truth lies.

    Output: image (uint8 [3, H, W]), height and width (of the original), image_id and file_name. It also has
    pan_seg_file_name, segments_info and sem_seg_file_name if the dataset has them.
    """

    KEPT = ("file_name", "image_id", "height", "width", "pan_seg_file_name", "segments_info", "sem_seg_file_name")

    @configurable
    def __init__(self, is_train: bool = False, *, augmentations: list, image_format: str):
        if is_train:
            raise ValueError("PanopticTestMapper is for evaluation only; use build_train_mapper(cfg) to train")
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = False) -> dict:
        return {
            "is_train": is_train,
            "augmentations": [ShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice")],
            "image_format": cfg.INPUT.FORMAT,
        }

    def __call__(self, dataset_dict: dict) -> dict:
        record = dict(dataset_dict)
        image = read_image(record, self.image_format)
        output = copy.deepcopy({key: record[key] for key in self.KEPT if key in record})
        return {**output, "image": self._resized(image)}

    def to_tensor(self, image: np.ndarray) -> torch.Tensor:
        """An image from memory (uint8 RGB [H, W, 3]) as the model's input, uint8 [3, h, w] in INPUT.FORMAT."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected a uint8 RGB image [H, W, 3], got {image.dtype} {list(image.shape)}")
        return self._resized(in_order(image, self.image_format))

    def _resized(self, image: np.ndarray) -> torch.Tensor:
        aug_input = T.AugInput(image)
        self.augmentations(aug_input)
        return _to_tensor(aug_input.image)


def read_image(record: dict, image_format: str) -> np.ndarray:
    """Reads record["file_name"] as uint8 [H, W, 3] and fills in height and width (and image_id) where absent.

    image_format: "RGB" or "BGR". Raises DataError if the file is missing or unreadable, or if its size differs from
    the record's.
    """
    image = read_rgb(record["file_name"])
    height, width = image.shape[:2]
    if (record.get("height", height), record.get("width", width)) != (height, width):
        raise DataError(_other_size(record, height, width))
    record.update(height=height, width=width)
    record.setdefault("image_id", record["file_name"])
    return in_order(image, image_format)


def in_order(rgb: np.ndarray, image_format: str) -> np.ndarray:
    """RGB [H, W, 3] in the order of INPUT.FORMAT. Raises ValueError unless that is RGB or BGR."""
    if image_format not in ("RGB", "BGR"):
        raise ValueError(f"INPUT.FORMAT must be RGB or BGR, got {image_format}")
    return rgb if image_format == "RGB" else rgb[:, :, ::-1]


def _other_size(record: dict, height: int, width: int) -> str:
    listed = (record.get("width"), record.get("height"))
    hint = "correct width and height, or restore the file"
    if listed == (height, width):
        hint = (
            "if its EXIF orientation turns it, draw the annotation on the image as viewers show it, or save the image "
            "without the tag"
        )
    return (
        f"{record['file_name']}: the image has {width}x{height} pixels, but its annotation says width {listed[0]!r} "
        f"and height {listed[1]!r}; {hint}; {ADVICE}"
    )


def _check_size(what: str, labels: np.ndarray, record: dict, image: np.ndarray, advice: str = "") -> None:
    """Raises DataError if a map of labels [H, W] and its image [H, W, 3] differ in size."""
    if labels.shape != image.shape[:2]:
        raise DataError(
            f"{what} is {labels.shape[1]}x{labels.shape[0]} pixels but its image {record['file_name']} is "
            f"{image.shape[1]}x{image.shape[0]}; one of them is wrong{advice}"
        )


def _read_segments(record: dict, image: np.ndarray) -> tuple[list[dict], np.ndarray]:
    """All segments, including crowds, and the index planes of the panoptic PNG."""
    if "pan_seg_file_name" not in record:
        raise DataError(
            f"{record['file_name']}: the dataset has no panoptic annotation; train on a panoptic dataset, "
            "e.g. one registered with register_coco_panoptic_like"
        )
    source = record["pan_seg_file_name"]
    segments = record["segments_info"]
    ids = read_ids(source, [s["id"] for s in segments])
    _check_size(f"{source}: the panoptic PNG", ids, record, image, f"; {ADVICE}")
    return segments, index_map(ids, [s["id"] for s in segments], source)


def _class_map(planes: np.ndarray, segments: list[dict], ignore_label: int, crowds: bool) -> np.ndarray:
    """Contiguous class of each pixel, uint8 [H, W]. Void, and crowds unless `crowds` is set, become ignore_label."""
    classes = [ignore_label if s.get("iscrowd", 0) and not crowds else s["category_id"] for s in segments]
    if max(classes, default=0) > 255:
        raise ValueError(f"a map of classes needs class ids below 256, got {max(classes)}")
    table = np.asarray([*classes, ignore_label], dtype=np.uint8)
    return table[np.minimum(decode(planes), len(segments))]


def _instances(planes: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, Instances]:
    """The wanted positions that are still visible, and instances with their masks, without classes."""
    left, masks = masks_of(planes, wanted)
    instances = Instances(planes.shape[:2])
    instances.gt_masks = torch.from_numpy(masks)
    return left, instances


def _identity(record: dict) -> dict:
    """The file, id and original size of an image."""
    return {key: record[key] for key in ("file_name", "image_id", "height", "width")}


def _common(cfg: CfgNode, is_train: bool) -> dict:
    return {
        "is_train": is_train,
        "image_format": cfg.INPUT.FORMAT,
        "size_divisibility": cfg.INPUT.SIZE_DIVISIBILITY,
    }


def _flip(cfg: CfgNode) -> list:
    choice = cfg.INPUT.RANDOM_FLIP
    if choice == "none":
        return []
    return [T.RandomFlip(horizontal=choice == "horizontal", vertical=choice == "vertical")]


def _crop(cfg: CfgNode, constrained: bool) -> T.Augmentation:
    crop = cfg.INPUT.CROP
    if not constrained:
        return T.RandomCrop(crop.TYPE, crop.SIZE)
    return T.RandomCrop_CategoryAreaConstraint(
        crop.TYPE, crop.SIZE, crop.SINGLE_CATEGORY_MAX_AREA, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    )


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
