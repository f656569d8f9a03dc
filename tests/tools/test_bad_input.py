"""Every bad input of the tools ends in one message that names it and what to do, with status 1 and without a trace."""

import json
import shutil

import numpy as np
import pytest
import torch
from minis import fill
from PIL import Image
from tiny import Tiny, call

from eco_m2f.checkpoint.parent_hash import parent_sha256
from eco_m2f.data.panoptic_map import ids_to_rgb
from eco_m2f.derived.dataset import DerivedDataset
from eco_m2f.engine.setup import build_model, load_cfg
from eco_m2f.gates.gate import Gate

pytestmark = pytest.mark.slow

CHANNELS = 128  # of res5 in the tiny model


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Tiny:
    """A data set with which nothing is wrong; with model.pth, a checkpoint for it."""
    made = Tiny(tmp_path_factory.mktemp("good"), num_train=2, num_val=1)
    model = fill(build_model(load_cfg(made.config())))
    torch.save({"model": model.state_dict()}, made.base / "model.pth")
    return made


@pytest.fixture
def spoilt(good, tmp_path) -> Tiny:
    """A copy of the good data set, under another name, for a test to spoil."""
    copy = Tiny(tmp_path / "spoilt", num_train=2, num_val=1)
    return copy


class Tools:
    """Runs a tool in this process, and looks at how it ends."""

    def __init__(self, good: Tiny, output, capfd):
        self.good, self.output, self.capfd = good, output, capfd
        self.weights = ["MODEL.WEIGHTS", good.base / "model.pth"]

    def train(self, *more, data: Tiny | None = None, kind: str = "eco_maskformer2", flags=()) -> int:
        config = (data or self.good).config(kind)
        return call("train_net", "--config-file", config, *flags, *self._common(), "SOLVER.MAX_ITER", 2, *more)

    def evaluate(self, *more, data: Tiny | None = None) -> int:
        return self.train(*self.weights, *more, data=data, flags=["--eval-only"])

    def derive(self, *more, data: Tiny | None = None, split: str = "val", flags=()) -> int:
        data = data or self.good
        options = ["--dataset", f"{data.name}_{split}", "--output", self.output / "derived", "--workers", 0, *flags]
        return call("derive_dataset", "--config-file", data.config(), *options, *self._common(), *self.weights, *more)

    def fit(self, *arguments) -> int:
        return call("train_gate", *arguments)

    def _common(self) -> list:
        return ["OUTPUT_DIR", self.output]

    def message(self, status: int) -> str:
        """The message of a run that must have ended in one."""
        out, err = self.capfd.readouterr()
        assert status == 1
        assert "Traceback" not in out + err
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, err
        return err[err.index("error: ") :]


@pytest.fixture
def tools(good, tmp_path, capfd) -> Tools:
    return Tools(good, tmp_path / "output", capfd)


def assert_names(message: str, *parts) -> None:
    for part in parts:
        assert str(part) in message, message


# --- configs ---------------------------------------------------------------------------------------------------------


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


# --- checkpoints -----------------------------------------------------------------------------------------------------


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
    assert_names(message, "model.pth does not fit", "12 vs 20 queries", "Use the config it was trained with")


def test_resuming_from_a_broken_checkpoint(tools):
    tools.output.mkdir()
    (tools.output / "last_checkpoint").write_text("model_0000001.pth")
    (tools.output / "model_0000001.pth").write_bytes(b"PK\x03\x04 cut off")
    message = tools.message(tools.train(flags=["--resume"]))
    assert_names(message, "model_0000001.pth", "truncated", "start anew")


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


# --- images and annotation -------------------------------------------------------------------------------------------


def spoil_json(tiny: Tiny, split: str, change) -> None:
    content = json.loads(tiny.json(split).read_text())
    change(content)
    tiny.json(split).write_text(json.dumps(content))


def panoptic(tiny: Tiny, split: str, i: int = 0):
    return tiny.base / "data" / f"panoptic_{split}" / f"{i:06d}.png"


def picture(tiny: Tiny, split: str, i: int = 0):
    return tiny.base / "data" / split / f"{i:06d}.png"


def empty(content: dict) -> None:
    for annotation in content["annotations"]:
        annotation["segments_info"] = []


def crowds(content: dict) -> None:
    for annotation in content["annotations"]:
        for segment in annotation["segments_info"]:
            segment["iscrowd"] = 1


@pytest.mark.parametrize("change", [empty, crowds])
def test_images_without_anything_to_find_are_trained_on_evaluated_and_derived(tools, spoilt, change):
    """They teach that there is nothing; the quality of an image without segments is that of a dataset without any."""
    for split in ("train", "val"):
        spoil_json(spoilt, split, change)
        if change is empty:
            for i in range(2 if split == "train" else 1):
                Image.fromarray(ids_to_rgb(np.zeros((64, 64), np.int32))).save(panoptic(spoilt, split, i))
    assert tools.train(data=spoilt) == 0
    assert tools.evaluate(data=spoilt) == 0
    assert tools.derive(data=spoilt) == 0
    assert np.isfinite(DerivedDataset.load(tools.output / "derived").quality).all()


@pytest.mark.parametrize(
    "size, mapper",
    [((50, 1), "mask_former_panoptic"), ((1, 50), "coco_panoptic_lsj"), ((1, 1), "mask_former_panoptic")],
)
def test_images_one_pixel_thin_are_trained_on_evaluated_and_derived(tools, spoilt, size, mapper):
    def shrink(content):
        for image, annotation in zip(content["images"], content["annotations"]):
            image["height"], image["width"] = size
            annotation["segments_info"] = [{"id": 5, "category_id": 1, "iscrowd": 0, "area": size[0] * size[1]}]

    for split, count in (("train", 2), ("val", 1)):
        spoil_json(spoilt, split, shrink)
        for i in range(count):
            Image.fromarray(ids_to_rgb(np.full(size, 5, np.int32))).save(panoptic(spoilt, split, i))
            Image.fromarray(np.full((*size, 3), 99, np.uint8)).save(picture(spoilt, split, i))
    crop = ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", "[32, 32]"]
    augmented = ["INPUT.IMAGE_SIZE", 64, "INPUT.COLOR_AUG_SSD", True, *crop]
    assert tools.train("INPUT.DATASET_MAPPER_NAME", mapper, *augmented, data=spoilt) == 0
    assert tools.evaluate(data=spoilt) == 0
    assert tools.derive(data=spoilt) == 0


def test_png_with_a_segment_that_the_json_lacks(tools, spoilt):
    spoil_json(spoilt, "train", lambda content: [a["segments_info"].pop() for a in content["annotations"]])
    assert_names(tools.message(tools.train(data=spoilt)), "data/panoptic_train/00000", "check_dataset")


def test_json_with_a_segment_that_the_png_lacks(tools, spoilt):
    def add(content):
        for a in content["annotations"]:
            a["segments_info"].append({**a["segments_info"][0], "id": 77777})

    spoil_json(spoilt, "train", add)
    assert_names(tools.message(tools.train(data=spoilt)), "data/panoptic_train/00000", "77777", "check_dataset")


@pytest.mark.parametrize("run", ["evaluate", "derive"])
def test_png_and_json_that_disagree_in_evaluation(tools, spoilt, run):
    spoil_json(spoilt, "val", lambda content: [a["segments_info"].pop() for a in content["annotations"]])
    assert_names(tools.message(getattr(tools, run)(data=spoilt)), "000000.png")


@pytest.mark.parametrize("run, split", [("train", "train"), ("evaluate", "val"), ("derive", "val")])
def test_unreadable_image(tools, spoilt, run, split):
    for i in range(2 if split == "train" else 1):
        picture(spoilt, split, i).write_bytes(b"not a PNG")
    message = tools.message(getattr(tools, run)(data=spoilt))
    assert_names(message, f"data/{split}/00000", "cannot be read", "restore it")


@pytest.mark.parametrize("run, split", [("evaluate", "val"), ("derive", "val")])
def test_unreadable_panoptic_png(tools, spoilt, run, split):
    panoptic(spoilt, split).write_bytes(b"not a PNG")
    assert_names(tools.message(getattr(tools, run)(data=spoilt)), "panoptic_val/000000.png")


@pytest.mark.parametrize("run, split", [("evaluate", "val"), ("derive", "val"), ("train", "train")])
def test_missing_panoptic_png(tools, spoilt, run, split):
    for i in range(2 if split == "train" else 1):
        panoptic(spoilt, split, i).unlink()
    assert_names(tools.message(getattr(tools, run)(data=spoilt)), f"panoptic_{split}/00000")


# --- steps B and C ---------------------------------------------------------------------------------------------------


def make_gate(path, parent: str, exits=(2, 3, 4, 5, 6), channels: int = CHANNELS):
    torch.manual_seed(0)
    weight, bias = torch.randn(len(exits), channels), torch.zeros(len(exits))
    gate = Gate(weight, bias, exits, 0.001, "hard_ce", "res5", parent)
    gate.save(path)
    return path


def gated(path) -> list:
    return ["MODEL.ECO.POLICY", "LinearGate", "MODEL.ECO.GATE", path]


def parent_of(good: Tiny) -> str:
    return parent_sha256(torch.load(good.base / "model.pth")["model"])


def test_a_gate_that_fits_is_taken(tools, good, tmp_path):
    assert tools.evaluate(*gated(make_gate(tmp_path / "gate.pth", parent_of(good)))) == 0


@pytest.mark.parametrize("path", ["", "gone.pth"])
def test_missing_gate(tools, path):
    assert_names(tools.message(tools.evaluate(*gated(path))), f"no gate at '{path}'", "train_gate.py")


def test_gate_of_another_parent(tools, tmp_path):
    path = make_gate(tmp_path / "gate.pth", "b" * 64)
    assert_names(tools.message(tools.evaluate(*gated(path))), path, "bbbbbbbbbbbb", "load that parent")


def test_gate_of_other_exits_and_other_channels(tools, good, tmp_path):
    path = make_gate(tmp_path / "gate.pth", parent_of(good), channels=12)
    assert_names(tools.message(tools.evaluate(*gated(path))), path, "12 channels", CHANNELS)
    path = make_gate(tmp_path / "gate.pth", parent_of(good), exits=(1, 6))
    assert_names(tools.message(tools.evaluate(*gated(path))), path, "(1, 6)")


def test_truncated_gate(tools, good, tmp_path):
    path = make_gate(tmp_path / "gate.pth", parent_of(good))
    path.write_bytes(path.read_bytes()[:500])
    assert_names(tools.message(tools.evaluate(*gated(path))), path, "train_gate.py")


@pytest.fixture(scope="module")
def derived(good, tmp_path_factory):
    """The derived dataset of the good data's training split."""
    output = tmp_path_factory.mktemp("derived")
    tools = Tools(good, output, None)
    assert tools.derive(split="train", flags=["--shard-size", 1]) == 0
    return output / "derived"


@pytest.mark.parametrize("beta", ["-0.1", "nan", "inf"])
def test_beta_that_is_no_price(tools, derived, tmp_path, beta):
    message = tools.message(tools.fit("--train", derived, f"--beta={beta}", "--output", tmp_path / "gate.pth"))
    assert_names(message, "beta must be a finite number >= 0", beta)
    oracle = ["MODEL.ECO.POLICY", "OracleExit", "MODEL.ECO.DERIVED", derived, "MODEL.ECO.BETA", float(beta)]
    assert_names(tools.message(tools.evaluate(*oracle)).lower(), "beta", beta)
    assert not (tmp_path / "gate.pth").exists()


@pytest.mark.parametrize("k", [1, 7])
def test_max_exit_outside_the_exits(tools, derived, tmp_path, k):
    options = ["--beta", 0.1, "--max-exit", k, "--output", tmp_path / "gate.pth"]
    message = tools.message(tools.fit("--train", derived, "--val", derived, *options))
    assert_names(message, "one of the exits [2, 3, 4, 5, 6]", f"not {k}")


def test_missing_derived_dataset(tools, tmp_path):
    message = tools.message(tools.fit("--train", tmp_path, "--beta", 0.1, "--output", tmp_path / "gate.pth"))
    assert_names(message, tmp_path, "derive_dataset.py")
    message = tools.message(tools.evaluate("MODEL.ECO.POLICY", "OracleExit", "MODEL.ECO.DERIVED", tmp_path))
    assert_names(message, tmp_path, "derive_dataset.py")


def test_step_c_after_a_killed_step_b(tools, derived, tmp_path):
    shutil.copytree(derived, tmp_path / "killed")
    next((tmp_path / "killed").glob("*1.parquet")).unlink()
    message = tools.message(tools.fit("--train", tmp_path / "killed", "--beta", 0.1, "--output", tmp_path / "g.pth"))
    assert_names(message, tmp_path / "killed", "1 of 2 shards", "derive_dataset.py goes on")


def test_damaged_shard(tools, derived, tmp_path):
    shutil.copytree(derived, tmp_path / "damaged")
    shard = next((tmp_path / "damaged").glob("*1.parquet"))
    shard.write_bytes(shard.read_bytes()[:-9])
    message = tools.message(tools.fit("--train", tmp_path / "damaged", "--beta", 0.1, "--output", tmp_path / "g.pth"))
    assert_names(message, shard, "derive_dataset.py writes it anew")


def test_oracle_of_another_split(tools, derived):
    oracle = ["MODEL.ECO.POLICY", "OracleExit", "MODEL.ECO.DERIVED", derived]
    message = tools.message(tools.evaluate(*oracle))
    assert_names(message, derived, f"is of '{tools.good.name}_train'", f"'{tools.good.name}_val' is evaluated")


def test_oracle_of_other_weights(tools, derived, tmp_path):
    state = torch.load(tools.good.base / "model.pth")["model"]
    state["sem_seg_head.predictor.class_embed.bias"] += 1
    torch.save({"model": state}, tmp_path / "other.pth")
    test = ["DATASETS.TEST", f"('{tools.good.name}_train',)"]
    oracle = [*test, "MODEL.ECO.POLICY", "OracleExit", "MODEL.ECO.DERIVED", derived]
    assert tools.evaluate(*oracle) == 0
    message = tools.message(tools.evaluate(*oracle, "MODEL.WEIGHTS", tmp_path / "other.pth"))
    assert_names(message, derived, "other weights", "derive it anew")


def test_step_b_of_the_parent_alone(tools):
    assert_names(tools.message(tools.derive("MODEL.META_ARCHITECTURE", "MaskFormer")), "EcoMaskFormer")


def test_step_b_of_an_unknown_split(tools, good):
    assert_names(tools.message(tools.derive(split="none")), f"{good.name}_none")


def test_step_b_into_another_datasets_folder(tools, derived):
    tools.output = derived.parent
    message = tools.message(tools.derive(split="val", flags=["--shard-size", 1]))
    assert_names(message, derived, "another origin", "dataset", "Use another directory")


def test_step_b_with_shards_of_nothing(tools):
    assert_names(tools.message(tools.derive(flags=["--shard-size", 0])), "shard_size", "0")


# --- the other tools -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(good, derived) -> dict:
    """What the arguments of the table below name."""
    base = good.base
    (base / "empty").mkdir()
    torch.save({"model": {"fc.weight": torch.zeros(2)}}, base / "other.pth")
    (base / "cut.pth").write_bytes((base / "other.pth").read_bytes()[:200])
    dovit = good.config("dovit")
    torch.save({"model": build_model(load_cfg(dovit)).state_dict()}, base / "dovit.pth")
    recipe = base / "recipe" / "derived"
    for name in ("parent_val", "val"):
        shutil.copytree(derived, recipe / name)
    return {
        **{name: base / f"{name}.pth" for name in ("other", "cut", "dovit", "model", "none")},
        "base": base,
        "recipe": base / "recipe",
        "sweep": ["--config-file", dovit, "--thresholds", "0.5", "--output"],
        "model_config": ["--size", "64", "64", "--rounds", "1", "--config-file", good.config()],
        "dovit_config": ["--config-file", dovit],
        "parent_config": ["--config-file", good.config("maskformer2")],
    }


# tool, arguments ({x}: what `files` has under x; OUT: a file to write), parts of the message
BAD = [
    ("report {base}/none", "{base}/none/derived/parent_val", "derive_dataset.py"),
    ("report {model}", "{model}/derived/parent_val"),
    ("report {base}/empty", "{base}/empty/derived/parent_val"),
    ("report {recipe}", "no gates in {recipe}/gates", "recipe.py"),
    ("sweep_thresholds {sweep} OUT MODEL.WEIGHTS {none}", "{none}"),
    ("sweep_thresholds {sweep} OUT MODEL.WEIGHTS {cut}", "{cut}", "cannot be read"),
    ("sweep_thresholds {sweep} OUT MODEL.WEIGHTS {other}", "{other}", "does not fit"),
    ("sweep_thresholds {sweep} OUT MODEL.DOVIT.TRESHOLD 1", "MODEL.DOVIT.TRESHOLD", "config.py"),
    ("sweep_thresholds {sweep} OUT MODEL.WEIGHTS {dovit} DATASETS.TEST ()", "DATASETS.TEST is empty"),
    ("sweep_thresholds {sweep} {other}/t.csv MODEL.WEIGHTS {dovit}", "{other}/t.csv cannot be written"),
    ("sweep_thresholds --config-file none.yaml --thresholds 0.5 --output OUT", "'none.yaml'", "configs/"),
    ("sweep_thresholds {parent_config} --thresholds 0.5 --output OUT MODEL.WEIGHTS {model}", "only a DoViT"),
    ("benchmark op --device cuda", "--device cuda", "take --device cpu"),
    ("benchmark op --output {other}/op.csv", "{other}/op.csv cannot be written", "name another"),
    ("benchmark step_c --output {base}", "{base} cannot be written", "folder"),
    ("benchmark op --contestants mmcv --output OUT", "no contestant ['mmcv']"),
    ("benchmark model --config-file none.yaml --output OUT", "'none.yaml'", "configs/"),
    ("benchmark model {model_config} --exits 9 --output OUT", "--exits [9]", "[2, 3, 4, 5, 6]"),
    ("benchmark model {parent_config} --output OUT", "--exits [2, 6]", "take an eco config"),
    ("benchmark dovit {model_config} --output OUT", "EcoMaskFormer", "configs/*/*/dovit/"),
    ("convert_detr {none} OUT.pth", "no checkpoint at {none}"),
    ("convert_detr {cut} OUT.pth", "{cut}", "cannot be read"),
    ("convert_detr {other} OUT.pth", "{other} is no DETR checkpoint", "fc.weight"),
    ("convert_detr {other} OUT.pkl", "OUT.pkl must end in .pth or .safetensors"),
    ("convert_backbone {none} OUT.pkl", "no checkpoint at {none}"),
    ("convert_backbone {cut} OUT.pkl", "{cut}", "cannot be read", "may be truncated"),
    ("convert_backbone {other} OUT.pkl", "{other} holds no backbone that is known (Swin has ", "it holds fc.weight, "),
    ("convert_backbone {other} OUT.pth", "OUT.pth must end in .pkl"),
    ("convert_timm none OUT.pkl", "'none' is no model of timm", "list_models"),
    ("convert_timm resnet18 OUT.pkl --source {none}", "no checkpoint at {none}"),
    ("convert_timm resnet18 OUT.pkl --source {cut}", "{cut}", "cannot be read"),
    ("convert_timm resnet18 OUT.pkl --source no_such_package", "'no_such_package'", "pip install"),
    ("convert_timm resnet18 OUT.pkl --source {other}", "{other} holds another model: conv1.weight", "lacks it"),
    ("convert_timm resnet18 OUT.pth", "OUT.pth must end in .pkl"),
]


@pytest.mark.parametrize("line, parts", [(line, parts) for line, *parts in BAD], ids=[line for line, *_ in BAD])
def test_what_the_other_tools_cannot_use(tools, files, tmp_path, line, parts):
    if "convert_timm" in line:
        pytest.importorskip("timm")
    words = []
    for word in line.split():
        name = word.strip("{}")
        filled = files[name] if isinstance(files.get(name), list) else [word.format(**files)]
        words += [w.replace("OUT", str(tmp_path / "out")) for w in filled]
    if "sweep" in words[0]:
        words += ["OUTPUT_DIR", str(tools.output)]
    message = tools.message(call(*words))
    assert_names(message, *(part.format(**files).replace("OUT", str(tmp_path / "out")) for part in parts))
    assert not list(tmp_path.glob("out*.*")) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ("benchmark nothing", "invalid choice: 'nothing'"),
        ("benchmark op --rounds 0", "0 must be at least 1"),
        ("benchmark op --shapes vgg", "invalid choice: 'vgg'"),
        ("sweep_thresholds --config-file c.yaml --thresholds 1.5", "1.5 is not above 0 and at most 1"),
        ("sweep_thresholds --config-file c.yaml --thresholds many", "'many'"),
        ("report", "folder"),
        ("convert_detr a.pth", "target"),
        ("convert_backbone a.pth", "target"),
        ("convert_timm resnet18", "target"),
    ],
)
def test_arguments_that_a_tool_does_not_take(capfd, line, message):
    assert call(*line.split()) == 2
    assert message in capfd.readouterr().err
