"""The mirrored view of Step B equals the plain view of mirrored files, at sizes that need padding."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from predicted import OPTIONS, Split, opinionated
from tiny import Tiny

from eco_m2f.costs import ExitCosts
from eco_m2f.derived import DerivedDatasetError
from eco_m2f.derived.dataset import DerivedDataset
from eco_m2f.engine import derive as step_b
from eco_m2f.engine.setup import build_model, load_cfg
from eco_m2f.quality import QUALITY_REGISTRY, MeanIoU

SIZE = 69  # padded to 96, and no multiple of the strides
NUM_IMAGES = 2


def mirror_files(source: Tiny, copy: Tiny) -> None:
    """Writes the images and the annotation of `source` to `copy`, mirrored from left to right."""
    for folder in ("train", "panoptic_train"):
        for path in sorted((source.base / "data" / folder).iterdir()):
            mirrored = np.asarray(Image.open(path))[:, ::-1]
            Image.fromarray(np.ascontiguousarray(mirrored)).save(copy.base / "data" / folder / path.name)
    for kind in ("panoptic", "detection"):
        content = json.loads(source.json("train", kind).read_text())
        for o in content["annotations"]:
            if "bbox" in o:
                o["bbox"][0] = SIZE - o["bbox"][0] - o["bbox"][2]
        copy.json("train", kind).write_text(json.dumps(content))


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """{kind: (a split, the same with mirrored files, costs)}. The model drew the annotation of the mirrored files."""

    @functools.cache
    def make(kind: str) -> tuple[Split, Split, ExitCosts]:
        tinies = [Tiny(tmp_path_factory.mktemp(name), NUM_IMAGES, 1, SIZE) for name in ("source", "copy")]
        weights = tinies[0].base / "model.pth"
        size = ["INPUT.MIN_SIZE_TEST", SIZE, "MODEL.WEIGHTS", str(weights)]
        cfgs = [load_cfg(tiny.config(kind), [*OPTIONS, *size]) for tiny in tinies]
        model = opinionated(build_model(cfgs[0]))
        torch.save({"model": model.state_dict()}, weights)
        source, copy = (Split(tiny, "train", cfg, model) for tiny, cfg in zip(tinies, cfgs))
        mirror_files(*tinies)
        copy.annotate(model.exits)
        mirror_files(*reversed(tinies))
        return source, copy, ExitCosts(model)

    return make


@torch.no_grad()
def rows(split: Split, costs: ExitCosts, kind: type, mirrored: bool) -> list[dict]:
    quality = kind.of(split.dataset)
    predicted = [step_b.predict_exits(split.model, quality, x, "res5", costs, mirrored) for x in split.inputs()]
    return [p.row() for p in predicted]


@pytest.mark.parametrize("name", [name for name, _ in QUALITY_REGISTRY])
def test_the_mirrored_view_is_the_plain_view_of_mirrored_files(splits, name):
    kind = QUALITY_REGISTRY.get(name)
    source, copy, costs = splits("eco_detr" if kind.annotation == "boxes" else "eco_maskformer2")
    found, expected = rows(source, costs, kind, True), rows(copy, costs, kind, False)
    plain = rows(source, costs, kind, False)
    tables = [np.array([r["quality"] for r in table]) for table in (found, expected, plain)]
    assert tables[0] == pytest.approx(tables[1], abs=1e-9) and tables[0].max() > 0.01
    assert not np.allclose(tables[0], tables[2])
    for a, b, c in zip(found, expected, plain):
        assert np.array_equal(a["feature"], b["feature"]) and not np.allclose(a["feature"], c["feature"], rtol=1e-7)
        assert np.array_equal(a["stat_tp"], b["stat_tp"]) and np.array_equal(a["total_gflops"], c["total_gflops"])


def test_mirrored_twice_a_prediction_is_itself(splits):
    for kind in (k for _, k in QUALITY_REGISTRY):
        source, *_ = splits("eco_detr" if kind.annotation == "boxes" else "eco_maskformer2")
        quality, x = kind.of(source.dataset), source.inputs()[0]
        images = source.model.preprocess([x])
        with torch.no_grad():
            pred = source.model.head.forward_exits(source.model.extract(images), [3])[3]
            prepared = quality.prepare(source.model, pred, images, x)
        again = kind.mirrored(kind.mirrored(prepared, SIZE), SIZE)
        comparison = quality.comparison(x)
        assert comparison([again])[0][0] == pytest.approx(comparison([prepared])[0][0])


def test_the_provenance_names_the_view(splits, tmp_path):
    source, *_ = splits("eco_maskformer2")

    def derive(folder: str, view: str) -> DerivedDataset:
        step_b.derive(source.cfg, source.model, source.dataset, str(tmp_path / folder), 2, view=view)
        return DerivedDataset.load(tmp_path / folder)

    plain, mirrored = derive("plain", "plain"), derive("mirrored", "mirrored")
    assert (plain.view, mirrored.view) == ("plain", "mirrored")
    assert "view" not in plain.provenance and {**plain.provenance, "view": "mirrored"} == mirrored.provenance
    assert plain.image_ids == mirrored.image_ids and not np.allclose(plain.quality, mirrored.quality)
    with pytest.raises(DerivedDatasetError, match="view"):
        derive("plain", "mirrored")
    with pytest.raises(ValueError, match="the view is 'upside down', but must be one of plain, mirrored"):
        derive("other", "upside down")


def test_a_quality_that_cannot_mirror_is_refused(splits, tmp_path, monkeypatch):
    source, *_ = splits("eco_maskformer2")
    monkeypatch.delattr(MeanIoU, "mirrored")
    cfg = source.cfg.clone()
    cfg.defrost()
    cfg.MODEL.ECO.QUALITY = "MeanIoU"
    with pytest.raises(ValueError, match="MeanIoU cannot mirror predictions: add `mirrored`"):
        step_b.derive(cfg, source.model, source.dataset, str(tmp_path), 2, view="mirrored")
    assert not list(Path(tmp_path).iterdir())
