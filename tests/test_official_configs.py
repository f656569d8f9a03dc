"""The table of Mask2Former's own configs in MODEL_ZOO.md, checked by the needs of each folder of configs."""

import re

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from minis import CONFIGS, PARENT, ROOT

from eco_m2f.data.check import check_class_count
from eco_m2f.data.mappers import MAPPERS, build_train_mapper
from eco_m2f.engine.datasets import check_number_of_classes
from eco_m2f.engine.setup import load_cfg
from eco_m2f.evaluation.build import BOX_TYPE, PANOPTIC_TYPES, SEMANTIC_TYPES

ROW = re.compile(r"^\| `([\w/-]+)` \| `(\w+)` \| `(\w+)` \| (\d+) \| (.+) \|$", re.MULTILINE)
ROWS = {folder: rest for folder, *rest in ROW.findall((ROOT / "MODEL_ZOO.md").read_text())}
VIDEO = {"INPUT.SAMPLING_FRAME_NUM": 2, "INPUT.SAMPLING_FRAME_RANGE": 20}  # which youtubevis_* set


def lacking(mapper: str, dataset: str, classes: int) -> list[str]:
    """The needs of a config that this project lacks."""
    found = [] if mapper in MAPPERS else ["mapper"]
    test = dataset.replace("_train", "_val")
    if not {dataset, test} <= set(DatasetCatalog.list()):
        return [*found, "dataset"]
    kind = MetadataCatalog.get(test).evaluator_type
    if kind not in (*PANOPTIC_TYPES, *SEMANTIC_TYPES, BOX_TYPE):
        return [*found, "evaluator"]
    if kind != BOX_TYPE:
        check_class_count(dataset, classes)
    return found


def options(mapper: str, dataset: str, classes: str) -> list:
    test = dataset.replace("_train", "_val")
    return [
        *("INPUT.DATASET_MAPPER_NAME", mapper, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", int(classes), "MODEL.DEVICE", "cpu"),
        *("DATASETS.TRAIN", (dataset,), "DATASETS.TEST", (test,)),
    ]


def test_the_table_has_every_folder():
    tasks = ("panoptic", "instance", "semantic")
    sets = {"coco": tasks[:2], "cityscapes": tasks, "ade20k": tasks, "mapillary-vistas": (tasks[0], tasks[2])}
    assert set(ROWS) == {f"{name}/{task}-segmentation" for name, of in sets.items() for task in of}


@pytest.mark.parametrize("folder", ROWS)
def test_a_folder_is_supported_as_the_table_says(folder):
    mapper, dataset, classes, answer = ROWS[folder]
    missing = lacking(mapper, dataset, int(classes))
    assert answer == ("no: " + ", ".join(missing) if missing else "yes")
    cfg = load_cfg(str(CONFIGS / PARENT), options(mapper, dataset, classes))
    if not missing:
        check_number_of_classes(cfg, (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
        assert type(build_train_mapper(cfg)) is MAPPERS[mapper]
        return
    with pytest.raises(ValueError, match=f"{mapper}|{dataset}"):
        check_number_of_classes(cfg, cfg.DATASETS.TRAIN)
        build_train_mapper(cfg)


@pytest.mark.parametrize("key", VIDEO)
def test_configs_of_videos_are_refused_by_the_key(key):
    with pytest.raises(ValueError, match=key):
        load_cfg(str(CONFIGS / PARENT), [key, VIDEO[key]])
