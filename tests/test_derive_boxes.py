"""Step B, the gate and the evaluation of ECO-DETR, on a few images: what Step C foretells is what the model does."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from minis import fill
from tiny import Tiny

from eco_m2f import derive as step_b
from eco_m2f import engine
from eco_m2f.budget import GateFitter, fixed_rows, format_row
from eco_m2f.data import PanopticTestMapper
from eco_m2f.derived import DerivedDataset, DerivedDatasetError
from eco_m2f.evaluation import BoxGroundTruth, BoxTarget

NUM_IMAGES = 8


class Case:
    """A dataset annotated by what the model finds, each image at another exit, so that AP is not 0."""

    def __init__(self, base):
        self.tiny = Tiny(base, num_train=NUM_IMAGES, num_val=1)
        self.dataset = f"{self.tiny.name}_boxes_train"
        self.weights = base / "model.pth"
        self.model = fill(engine.build_model(engine.load_cfg(self.tiny.config("eco_detr"))))
        with torch.no_grad():  # boxes that differ from query to query, and confident classes
            self.model.detr.class_embed.weight.mul_(4)
            self.model.detr.class_embed.bias.zero_()
            self.model.detr.bbox_embed.layers[2].weight.mul_(2)
        torch.save({"model": self.model.state_dict()}, self.weights)
        self.options = ["MODEL.WEIGHTS", str(self.weights)]
        self.cfg = engine.load_cfg(self.tiny.config("eco_detr"), self.options)
        self._annotate()

    @torch.no_grad()
    def predict(self, x: dict, k: int):
        images = self.model.preprocess([x])
        pred = self.model.head.forward_exits(self.model.extract(images), [k])[k]
        return self.model.judged(pred, images, x)

    def inputs(self) -> list[dict]:
        mapper = PanopticTestMapper(self.cfg)
        return [mapper(record) for record in DatasetCatalog.get(self.dataset)]

    def _annotate(self) -> None:
        """Image i holds what is found at exit 2 + i % 5; the last image holds nothing."""
        path = self.tiny.json("train", "detection")
        content, inputs, objects = json.loads(path.read_text()), self.inputs(), []
        truth = BoxGroundTruth(self.dataset)
        for i, x in enumerate(inputs[:-1]):
            found = truth.detections(x["image_id"], self.predict(x, 2 + i % 5))[:4]
            for d in found:
                row = {k: d[k] for k in ("image_id", "category_id", "bbox")}
                objects.append({"id": len(objects) + 1, **row, "area": d["bbox"][2] * d["bbox"][3], "iscrowd": 0})
        path.write_text(json.dumps({**content, "annotations": objects}))


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def derived(case, tmp_path_factory) -> DerivedDataset:
    directory = tmp_path_factory.mktemp("whole") / "derived"
    step_b.derive(case.cfg, case.model, case.dataset, str(directory), 3)
    return DerivedDataset.load(directory)


def test_the_quality_of_an_exit_is_its_images_ap(case, derived):
    truth = BoxGroundTruth(case.dataset)
    assert derived.measure == "AP" and not derived.has_statistics and len(derived) == NUM_IMAGES
    for i, x in enumerate(case.inputs()):
        assert derived.image_ids[i] == str(x["image_id"])
        for column, k in enumerate(derived.exits):
            found = truth.detections(x["image_id"], case.predict(x, k))
            assert derived.quality[i, column] == BoxTarget(truth.objects(x["image_id"])).ap(found)
        if i < NUM_IMAGES - 1:
            assert derived.quality[i, i % 5] == derived.quality[i].max() > 0.5
    assert not derived.quality[-1].any()  # no objects
    assert len(np.unique(derived.quality)) > 3
    with pytest.raises(DerivedDatasetError, match="no statistics of PQ"):
        derived.dataset_pq([6] * NUM_IMAGES)


def test_workers_change_nothing(case, derived, tmp_path):
    step_b.derive(case.cfg, case.model, case.dataset, str(tmp_path / "derived"), 3, workers=1)
    again = DerivedDataset.load(tmp_path / "derived")
    assert again.image_ids == derived.image_ids
    for name in ("quality", "features", "total_gflops", "encoder_gflops"):
        assert np.array_equal(getattr(again, name), getattr(derived, name))


def test_features_and_costs(case, derived):
    assert derived.features.shape == (NUM_IMAGES, case.model.backbone.output_shape()["res5"].channels)
    assert len(np.unique(derived.features[:, 0])) == NUM_IMAGES
    assert derived.encoder_gflops[0] == pytest.approx([k * derived.encoder_gflops[0, 0] / 2 for k in derived.exits])
    assert (derived.encoder_gflops < derived.total_gflops).all()


def test_what_step_c_foretells_is_what_the_evaluation_finds(case, derived, tmp_path):
    """Step C never saw an image: its mean AP and GFLOPs are sums over rows, and equal those of the running model."""
    row = GateFitter(derived, derived, l2=1e-3).fit(0.01, 6)
    assert len({k for k, n in row.images.items() if n}) > 1
    row.gate.save(tmp_path / "gate.pth")
    opts = [*case.options, "DATASETS.TEST", (case.dataset,), "OUTPUT_DIR", str(tmp_path)]
    gated = ["MODEL.ECO.POLICY", "LinearGate", "MODEL.ECO.GATE", str(tmp_path / "gate.pth")]
    cfg = engine.load_cfg(case.tiny.config("eco_detr"), [*opts, *gated])
    results = engine.evaluate(cfg, engine.build_trained(cfg))
    assert results["bbox"]["AP_image"] == pytest.approx(row.quality, abs=1e-6)
    assert results["exits"]["GFLOPs"] == pytest.approx(row.total_gflops)
    assert results["exits"]["mean_exit"] == pytest.approx(row.mean_exit)
    written = json.loads((tmp_path / "inference" / case.dataset / "boxes.json").read_text())
    assert written["AP_image"] == pytest.approx(row.quality / 100)


def test_the_oracle_takes_the_exits_of_its_derived_dataset(case, derived, tmp_path):
    directory = tmp_path / "derived"
    step_b.derive(case.cfg, case.model, case.dataset, str(directory), 8)
    oracle = ["MODEL.ECO.POLICY", "OracleExit", "MODEL.ECO.DERIVED", str(directory), "MODEL.ECO.BETA", 0.0]
    opts = [*case.options, "DATASETS.TEST", (case.dataset,), "OUTPUT_DIR", str(tmp_path), *oracle]
    cfg = engine.load_cfg(case.tiny.config("eco_detr"), opts)
    results = engine.evaluate(cfg, engine.build_trained(cfg))
    assert results["bbox"]["AP_image"] == pytest.approx(100 * derived.quality.max(axis=1).mean())


def test_rows_without_pq_are_shown_and_named(derived):
    row = fixed_rows(derived)[-1]
    assert row.score == row.quality
    assert "nan" not in format_row(row) and f"{row.quality:.2f}" in format_row(row)


def test_a_model_on_the_other_kind_of_annotation_is_refused(case):
    cfg = engine.load_cfg(case.tiny.config("eco_detr"), case.options)
    with pytest.raises(ValueError, match="'toy_panoptic_val' has no boxes"):
        engine.check_datasets(cfg, ["toy_panoptic_val"])
    masks = engine.load_cfg(case.tiny.config("eco_maskformer2"))
    with pytest.raises(ValueError, match="has no panoptic annotation"):
        engine.check_datasets(masks, ["toy_detection_val"])


@pytest.mark.parametrize("kind", ["detr", "eco_detr"])
def test_training_goes_on_bit_for_bit(case, tmp_path, kind):
    """Two iterations and two more are four."""

    def train(folder, iterations, resume=False):
        opts = ["OUTPUT_DIR", str(tmp_path / folder), "SOLVER.MAX_ITER", iterations, "TEST.EVAL_PERIOD", 0]
        opts += ["DATASETS.TEST", (), "MODEL.DETR.DROPOUT", 0.1, "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"]
        (tmp_path / folder).mkdir(exist_ok=True)
        trainer = engine.Trainer(engine.load_cfg(case.tiny.config(kind), opts))
        trainer.resume_or_load(resume)
        trainer.train()
        return trainer.model.state_dict()

    torch.manual_seed(0)
    whole = train("whole", 4)
    torch.manual_seed(0)
    train("parts", 2)
    parts = train("parts", 4, resume=True)
    assert all(torch.equal(whole[n], parts[n]) for n in whole)
