"""mIoU of an image against a loop over classes, and on a dataset with only class maps."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from qualities import Case

from eco_m2f.derived.dataset import DerivedDataset
from eco_m2f.engine.derive import derive
from eco_m2f.engine.setup import load_cfg
from eco_m2f.quality import MeanIoU
from eco_m2f.quality.semantic import mean_iou, pixel_statistics
from eco_m2f.quality.statistics import total_statistics

IDS = np.array([40, 3, 7, 90, 12])  # categories of classes 0 to 4, not in order


def maps(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Class 4 does not occur, 255 is ignored."""
    rng = np.random.default_rng(seed)
    truth = rng.choice([0, 1, 2, 3, 255], size=(9, 14))
    return truth, np.where(rng.random(truth.shape) < 0.6, truth % 5, rng.integers(0, 5, truth.shape))


def by_loop(pairs) -> float:
    """mIoU over the classes in the ground truth of these images."""
    truth, predicted = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    truth, predicted = truth[truth != 255], predicted[truth != 255]
    ious = [((truth == c) & (predicted == c)).sum() / ((truth == c) | (predicted == c)).sum() for c in np.unique(truth)]
    return float(np.mean(ious))


@pytest.mark.parametrize("seed", range(5))
def test_an_image_against_a_loop(seed):
    statistics = pixel_statistics(*maps(seed), IDS)
    assert MeanIoU.of_image(statistics) == pytest.approx(by_loop([maps(seed)]))
    assert list(statistics.category_id) == sorted(statistics.category_id) and 12 in statistics.category_id
    assert not statistics.iou.any()


def test_a_dataset_is_the_sum_of_its_images():
    pairs = [maps(seed) for seed in range(5)]
    total = total_statistics(pixel_statistics(*pair, IDS) for pair in pairs)
    assert MeanIoU.exact(total, []) == {"miou": pytest.approx(by_loop(pairs))}


def test_without_a_labelled_pixel_an_image_has_0_and_a_dataset_none():
    statistics = pixel_statistics(np.full((2, 2), 255), np.zeros((2, 2), np.uint8), IDS)
    assert MeanIoU.of_image(statistics) == 0.0 and len(statistics.category_id) == 0
    assert np.isnan(mean_iou(statistics)) and np.isnan(MeanIoU.evaluated({"mIoU": None})["evaluated_miou"])


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 2\), but its ground truth is \(2, 3\)"):
        pixel_statistics(np.zeros((2, 3), int), np.zeros((3, 2), int), IDS)


def test_a_dataset_of_class_maps_alone(tmp_path):
    Image.fromarray(np.array([[0, 0, 1, 255]], np.uint8)).save(tmp_path / "a.png")
    DatasetCatalog.register("quality_class_maps", lambda: [])
    MetadataCatalog.get("quality_class_maps").set(stuff_classes=["sky", "sea"], evaluator_type="sem_seg")
    try:
        quality = MeanIoU.of("quality_class_maps")
    finally:
        DatasetCatalog.remove("quality_class_maps")
        MetadataCatalog.remove("quality_class_maps")
    assert quality.categories == [{"id": 0, "name": "sky"}, {"id": 1, "name": "sea"}]
    compare = quality.comparison({"sem_seg_file_name": str(tmp_path / "a.png")})
    [(value, statistics)] = compare([np.array([[0, 1, 1, 0]], np.uint8)])
    assert value == pytest.approx(0.5) and statistics.tp.tolist() == [1, 1]
    assert statistics.fp.tolist() == [0, 1] and statistics.fn.tolist() == [1, 0]


@pytest.mark.slow
def test_step_b_on_class_maps_alone(tmp_path):
    """Registered as ADE20K's semantic split: images and class maps, without ids and JSON."""
    case = Case(MeanIoU, tmp_path)
    records = []
    for x in case.inputs:
        file = tmp_path / f"classes_{x['image_id']}.png"
        Image.fromarray(case.truth.class_map_reader(x)().astype(np.uint8)).save(file)
        records.append({"file_name": x["file_name"], "sem_seg_file_name": str(file)})
    names = [c["name"] for c in case.truth.class_categories]
    DatasetCatalog.register("quality_maps_alone", lambda: records)
    MetadataCatalog.get("quality_maps_alone").set(stuff_classes=names, evaluator_type="sem_seg", ignore_label=255)
    torch.save({"model": case.model.state_dict()}, tmp_path / "model.pth")
    options = ["MODEL.WEIGHTS", str(tmp_path / "model.pth"), "MODEL.ECO.QUALITY"]
    try:
        cfg = load_cfg(case.tiny.config(), [*options, "MeanIoU"])
        derive(cfg, case.model, "quality_maps_alone", str(tmp_path / "maps"), shard_size=4)
        with pytest.raises(ValueError, match="'quality_maps_alone' has no panoptic_json"):
            cfg = load_cfg(case.tiny.config(), [*options, "PanopticQuality"])
            derive(cfg, case.model, "quality_maps_alone", str(tmp_path / "no"), shard_size=4)
    finally:
        DatasetCatalog.remove("quality_maps_alone")
        MetadataCatalog.remove("quality_maps_alone")
    cfg = load_cfg(case.tiny.config(), [*options, "MeanIoU"])
    derive(cfg, case.model, case.dataset, str(tmp_path / "panoptic"), shard_size=4)
    maps, panoptic = (DerivedDataset.load(tmp_path / name) for name in ("maps", "panoptic"))
    assert np.array_equal(maps.quality, panoptic.quality) and maps.quality.any()
    everyone = [6] * len(maps)
    assert maps.exact_quality(everyone) == panoptic.exact_quality(everyone)
    assert [c["id"] for c in maps.provenance["categories"]] == list(range(len(names)))
