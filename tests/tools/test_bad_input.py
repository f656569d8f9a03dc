"""A bad config or checkpoint ends in one message with the cause and the remedy, with status 1 and without a trace."""

import pytest
import torch
from tiny import call
from tried_tools import assert_names

pytestmark = pytest.mark.slow


def test_unknown_key_on_the_command_line(tools):
    assert_names(tools.message(tools.train("MODEL.ECO.EXIST", 3)), "MODEL.ECO.EXIST", "config.py")


def test_unknown_key_in_the_file(tools, tmp_path):
    (tmp_path / "c.yaml").write_text(f"_BASE_: {tools.good.config()}\nMODEL: {{ECO: {{GATES: x}}}}\n")
    status = call("train_net", "--config-file", tmp_path / "c.yaml")
    assert_names(tools.message(status), tmp_path / "c.yaml", "MODEL.ECO.GATES", "config.py")


def test_missing_config_file(tools):
    assert_names(tools.message(call("train_net", "--config-file", "none.yaml")), "'none.yaml'", "configs/")


def test_missing_base_file(tools, tmp_path):
    (tmp_path / "c.yaml").write_text("_BASE_: gone.yaml\n")
    assert_names(tools.message(call("train_net", "--config-file", tmp_path / "c.yaml")), "gone.yaml")


def test_a_value_of_the_wrong_type(tools):
    assert_names(tools.message(tools.train("SOLVER.MAX_ITER", "many")), "MAX_ITER", "many")


def test_alpha_that_does_not_increase(tools):
    status = tools.train("MODEL.ECO.ALPHA", "[1, 2, 2, 3, 4]")
    assert_names(tools.message(status), "strictly increase", "[1.0, 2.0, 2.0, 3.0, 4.0]", "'uniform'")


@pytest.mark.parametrize("exits", ["[2, 7]", "[3, 2]", "[0, 6]"])
def test_exits_that_there_are_not(tools, exits):
    assert_names(tools.message(tools.train("MODEL.ECO.EXITS", exits, "MODEL.ECO.EXITS_PER_STEP", 2)), "exit")


def test_a_fixed_exit_outside_the_exits(tools):
    assert_names(tools.message(tools.evaluate("MODEL.ECO.EXIT", 1)), "MODEL.ECO.EXIT is 1", "[2, 3, 4, 5, 6]")


def test_k_outside_the_exits(tools):
    status = tools.evaluate("MODEL.ECO.POLICY", "LinearGate", "MODEL.ECO.MAX_EXIT", 7)
    assert_names(tools.message(status), "one of the exits [2, 3, 4, 5, 6], not 7")


def test_a_part_that_does_not_exist(tools):
    assert_names(tools.message(tools.evaluate("MODEL.ECO.POLICY", "Clairvoyant")), "'Clairvoyant'", "EXIT_POLICY")


def test_unregistered_dataset(tools):
    message = tools.message(tools.train("DATASETS.TRAIN", "('no_such_set',)"))
    assert_names(message, "no_such_set", "DATASETS.CUSTOM")


def test_missing_dataset_files(tools):
    options = ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 133, "DATASETS.TRAIN", "('coco_2017_train_panoptic_with_sem_seg',)"]
    message = tools.message(tools.train(*options, "DATASETS.TEST", "()"))
    assert_names(message, "panoptic_train2017.json", "DETECTRON2_DATASETS")


def test_no_dataset_to_train_on(tools):
    assert_names(tools.message(tools.train("DATASETS.TRAIN", "()")), "DATASETS.TRAIN")


def test_no_dataset_to_evaluate_on(tools):
    assert_names(tools.message(tools.evaluate("DATASETS.TEST", "()")), "DATASETS.TEST")


def test_a_custom_dataset_without_its_json(tools, spoilt):
    spoilt.json("train").unlink()
    assert_names(tools.message(tools.train(data=spoilt)), spoilt.json("train"), "not found")


def test_another_number_of_classes(tools):
    message = tools.message(tools.train("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 10))
    assert_names(message, "NUM_CLASSES is 10", tools.good.name, "9 categories", "set it to 9")


@pytest.mark.parametrize(
    "kind, other, lacks", [("eco_detr", "panoptic", "has no boxes"), ("maskformer2", "detection", "no panoptic")]
)
def test_a_model_on_the_other_kind_of_annotation(tools, kind, other, lacks):
    message = tools.message(tools.train("DATASETS.TRAIN", f"('toy_{other}_train',)", kind=kind))
    assert_names(message, f"'toy_{other}_train'", lacks)


def test_a_batch_that_cannot_be_shared(tools):
    assert_names(tools.message(tools.train("SOLVER.IMS_PER_BATCH", 0)), "SOLVER.IMS_PER_BATCH is 0", "set it to 1")
    message = tools.message(tools.train("SOLVER.IMS_PER_BATCH", 8, "SOLVER.IMS_PER_GPU", 3))
    assert_names(message, "SOLVER.IMS_PER_GPU is 3", "8 images", "set it to 2 or 4")
    assert_names(tools.message(tools.train("SOLVER.ACCUMULATION_STEPS", 8)), "multiply SOLVER.IMS_PER_BATCH by it")


@pytest.mark.parametrize(
    "flags", [["--num-gpus", 0], ["--num-machines", 2], ["--num-machines", 2, "--machine-rank", 2]]
)
def test_processes_that_cannot_be(tools, flags):
    assert_names(tools.message(tools.train(flags=flags)), flags[0])


def test_options_that_contradict_each_other(tools):
    assert tools.train(flags=["--resume", "--eval-only"]) == 2
    assert "not allowed with" in tools.capfd.readouterr().err


def test_processes_with_gpus_for_a_model_without(tools, monkeypatch):
    monkeypatch.setattr("eco_m2f.engine.setup.comm.get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    assert_names(tools.message(tools.train()), "MODEL.DEVICE is cpu", "CUDA_VISIBLE_DEVICES")


def test_half_of_torchruns_environment(tools, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert_names(tools.message(tools.train()), "LOCAL_RANK", "MASTER_ADDR")


def test_output_folder_that_is_a_file(tools, tmp_path):
    tools.output.write_text("")
    assert_names(tools.message(tools.train()), tools.output)


@pytest.mark.parametrize("flags", [(), ["--eval-only"]])
def test_missing_checkpoint(tools, tmp_path, flags):
    message = tools.message(tools.train("MODEL.WEIGHTS", tmp_path / "gone.pth", flags=flags))
    assert_names(message, tmp_path / "gone.pth")


def test_no_checkpoint_to_evaluate(tools):
    assert_names(tools.message(tools.train("MODEL.WEIGHTS", "", flags=["--eval-only"])), "MODEL.WEIGHTS is empty")


@pytest.mark.parametrize("flags", [(), ["--eval-only"]])
def test_truncated_checkpoint(tools, tmp_path, flags):
    content = (tools.good.base / "model.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(content[: len(content) // 2])
    assert_names(tools.message(tools.train("MODEL.WEIGHTS", tmp_path / "half.pth", flags=flags)), tmp_path / "half.pth")


def test_checkpoint_of_another_architecture(tools):
    message = tools.message(tools.evaluate("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 20))
    assert_names(message, "model.pth does not fit", "12 vs 20 queries", "Use the config that it was trained with")


def test_resuming_from_a_broken_checkpoint(tools):
    tools.output.mkdir()
    (tools.output / "last_checkpoint").write_text("model_0000001.pth")
    (tools.output / "model_0000001.pth").write_bytes(b"PK\x03\x04 cut off")
    message = tools.message(tools.train(flags=["--resume"]))
    assert_names(message, "model_0000001.pth", "truncated", "start again")


@pytest.mark.parametrize(
    "value, parts",
    [
        (float("nan"), ("weights.pth", "class_embed.bias", "1 of 10 values are NaN or infinite")),
        (3e38, ("at iteration 0", "loss_ce", "inf", "on images [", "SOLVER.BASE_LR")),
    ],
)
def test_weights_that_are_no_numbers_or_make_none(tools, tmp_path, value, parts):
    state = torch.load(tools.good.base / "model.pth")["model"]
    state["sem_seg_head.predictor.class_embed.bias"][0] = value
    torch.save({"model": state}, tmp_path / "weights.pth")
    message = tools.message(tools.train("MODEL.WEIGHTS", tmp_path / "weights.pth", "SEED", 1))
    assert_names(message, *parts)
