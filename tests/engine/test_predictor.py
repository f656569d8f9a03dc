"""The predictor: its inputs, and a model on a machine without its dataset."""

import numpy as np
import pytest
import torch
from minis import fill
from PIL import Image
from tiny import Tiny

from eco_m2f.checkpoint.checkpointer import Checkpointer
from eco_m2f.checkpoint.safe_load import CheckpointError, read_checkpoint
from eco_m2f.costs import ExitCosts, padded_size
from eco_m2f.data.classes import dataset_classes
from eco_m2f.engine.predict import load_predictor
from eco_m2f.engine.predictor import Predictor
from eco_m2f.engine.setup import build_model, load_cfg

EVERYTHING = ("MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", 0.0, "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", 0.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(tiny, its config): model.pth has the classes, as after a training, and old.pth has not."""
    tiny = Tiny(tmp_path_factory.mktemp("tiny"), 1, 1)
    model = fill(build_model(load_cfg(tiny.config())))
    Checkpointer(model, str(tiny.base)).save("model")
    torch.save({"model": model.state_dict()}, tiny.base / "old.pth")
    return tiny, tiny.config()


def predictor(trained, name: str = "model.pth", *opts) -> Predictor:
    tiny, config = trained
    return load_predictor(config, ["MODEL.WEIGHTS", str(tiny.base / name), *EVERYTHING, *opts])


@pytest.fixture(scope="module")
def predict(trained):
    return predictor(trained)


def picture(trained) -> str:
    return str(trained[0].base / "data" / "val" / "000000.png")


def kinds(result) -> tuple[int, int]:
    return len(result["instances"]), sum(s["isthing"] for s in result["panoptic_seg"][1])


def test_all_ways_to_give_an_image_agree(trained, predict):
    path = picture(trained)
    with Image.open(path) as image:
        array = np.asarray(image.convert("RGB"))
        results = [
            predict(x) for x in (array, path, image, torch.from_numpy(array.copy()).permute(2, 0, 1), array / 255)
        ]
    for other in results[1:]:
        assert torch.equal(other["sem_seg"], results[0]["sem_seg"])
        assert torch.equal(other["panoptic_seg"][0], results[0]["panoptic_seg"][0])


@pytest.mark.parametrize("shape", [(9, 9), (7, 3000, 3), (1, 5000, 3), (1, 1, 4), (300, 2)])
def test_thin_and_tiny_images_give_a_result_at_their_size(predict, shape):
    result = predict(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    assert result["panoptic_seg"][0].shape == result["sem_seg"].shape[1:] == shape[:2]
    assert result["sem_seg"].isfinite().all()


def test_costs_are_those_of_the_sizes_that_the_model_gets_and_gives(trained, predict):
    image = np.zeros((40, 70, 3), np.uint8)
    shown = predict.mapper.to_tensor(image).shape[-2:]
    assert shown != (40, 70)
    expected = ExitCosts(predict.model).details(padded_size(shown, predict.model.size_divisibility), (40, 70))
    assert predict.costs(image) == expected and predict(image)["exit"] in expected


def test_costs_of_what_is_no_image(predict):
    with pytest.raises(ValueError):
        predict.costs(np.zeros((0, 5, 3), np.uint8))


def test_an_image_whose_masks_do_not_fit_into_the_memory_is_refused(predict, monkeypatch):
    """12 queries and 9 classes in float32, 64 x 64; the queries' binary masks and their floats; 60 instances."""
    post = predict.model.postprocessor
    assert min(post.detections_per_image, 12 * len(post.thing_classes)) == 60 and post.instance_on
    monkeypatch.setattr("eco_m2f.engine.predictor.available_memory", lambda: (4 * 21 + 5 * 12 + 5 * 60) * 64 * 64)
    predict(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="65x64 pixels is too large.*tiles"):
        predict(np.zeros((64, 65, 3), np.uint8))


def test_memory_that_runs_out_ends_in_one_message(predict, monkeypatch):
    def forward(batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(predict.model, "forward", forward)
    with pytest.raises(ValueError, match="64x64 pixels is too large.*allocate 9 bytes"):
        predict(np.zeros((64, 64, 3), np.uint8))


def test_channels_are_given_in_the_order_of_the_config(trained, predict, monkeypatch):
    seen = []
    monkeypatch.setattr(predict.model, "forward", lambda batch: seen.append(batch[0]["image"]) or [{}])
    image = np.zeros((64, 64, 3), np.uint8)
    image[..., 0] = 200
    predict(image)
    predict.mapper.image_format = "BGR"
    predict(image)
    predict.mapper.image_format = "RGB"
    assert [x.amax((1, 2)).tolist() for x in seen] == [[200, 0, 0], [0, 0, 200]]


@pytest.fixture
def gone(trained, monkeypatch):
    """Options for a machine without registered datasets."""
    return "DATASETS.CUSTOM", "[]", "DATASETS.TRAIN", "('not_here',)", "DATASETS.TEST", "('nor_here',)"


def test_the_checkpoint_holds_the_classes(trained):
    tiny, _ = trained
    assert read_checkpoint(str(tiny.base / "model.pth"))["classes"] == dataset_classes(tiny.dataset("train"))


def test_without_its_dataset_a_model_gives_the_same(trained, predict, gone):
    away = predictor(trained, "model.pth", *gone)
    wanted, found = predict(picture(trained)), away(picture(trained))
    assert kinds(found) == kinds(wanted) and kinds(found)[0] > 0
    assert found["panoptic_seg"][1] == wanted["panoptic_seg"][1]
    assert away.classes == predict.classes == dataset_classes(trained[0].dataset("train"))


def test_the_annotation_may_be_absent_though_the_config_names_it(trained, predict, tmp_path):
    tiny, config = trained
    absent = open(config).read().replace(tiny.name, tiny.name + "x").replace("annotations/", "nowhere/")
    (tmp_path / "away.yaml").write_text(absent)
    away = load_predictor(str(tmp_path / "away.yaml"), ["MODEL.WEIGHTS", str(tiny.base / "model.pth")])
    assert away.classes == predict.classes


def test_an_old_checkpoint_takes_the_classes_of_the_dataset(trained, predict):
    assert predictor(trained, "old.pth").classes == predict.classes


def test_where_nothing_tells_the_classes_the_predictor_refuses(trained, gone):
    with pytest.raises(
        ValueError, match="old.pth does not hold its classes.*DATASETS.TRAIN.*JSON of the annotation is enough"
    ):
        predictor(trained, "old.pth", *gone)


def test_classes_of_another_dataset_are_refused_with_both_lists(trained, tmp_path):
    tiny, config = trained
    stored = torch.load(tiny.base / "model.pth", weights_only=False)
    for change, text in (
        (lambda c: c[0].update(name="whale"), "whale"),
        (lambda c: c[0].update(isthing=0), "stuff"),
        (lambda c: c.reverse(), "in this order"),
        (lambda c: c.pop(), "are not those of"),
        (lambda c: c.clear(), "`classes` must be a list"),
    ):
        classes = [dict(c) for c in stored["classes"]]
        change(classes)
        torch.save({**stored, "classes": classes}, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match="other.pth") as caught:
            load_predictor(config, ["MODEL.WEIGHTS", str(tmp_path / "other.pth")])
        assert text in str(caught.value)


def test_classes_of_another_number_are_refused_without_a_dataset_too(trained, gone, tmp_path):
    stored = torch.load(trained[0].base / "model.pth", weights_only=False)
    stored["classes"].pop()
    torch.save(stored, tmp_path / "other.pth")
    with pytest.raises(
        CheckpointError, match="other.pth holds 8 classes and the model has 9: set MODEL.SEM_SEG_HEAD.NUM_CLASSES to 8"
    ):
        load_predictor(trained[1], ["MODEL.WEIGHTS", str(tmp_path / "other.pth"), *gone])


def test_weights_of_other_classes_may_be_trained_on(trained, tmp_path, caplog):
    tiny, config = trained
    stored = torch.load(tiny.base / "model.pth", weights_only=False)
    stored["classes"][0] = {**stored["classes"][0], "name": "whale"}
    torch.save(stored, tmp_path / "other.pth")
    model = build_model(load_cfg(config))
    Checkpointer(model).load(str(tmp_path / "other.pth"))
    assert "whale" in caplog.text and model.classes[0]["name"] != "whale"
