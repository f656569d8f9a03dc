"""Every key of the config is read, and a change of it has an effect."""

import argparse
import functools
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from config_files import LEAVES, PAPER, own_keys
from detectron2.config import CfgNode, get_cfg
from minis import CONFIGS, ECO, MINI, PROSCALE, RT
from tiny import Tiny, kept_log_handlers

from eco_m2f.config import WITHOUT_EFFECT, add_eco_config, leaves, set_without_effect
from eco_m2f.data.datasets import register_from_config
from eco_m2f.engine.derive import derive
from eco_m2f.engine.evaluate import evaluate
from eco_m2f.engine.optimizer import autocast
from eco_m2f.engine.predict import load_predictor
from eco_m2f.engine.setup import build_model, gate_settings, load_cfg, setup, warn_of_keys_without_effect
from eco_m2f.engine.train import Trainer
from eco_m2f.evaluation.build import evaluators_for


class Reads:
    """Records which keys of a config are read as attributes, also in its clones."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.seen = set()
        original = CfgNode.__getattr__

        def recording(node, name):
            path = node.__dict__.get("_path")
            if path is not None and name in node and not isinstance(node[name], CfgNode):
                self.seen.add(path + name)
            return original(node, name)

        patch.setattr(CfgNode, "__getattr__", recording)

    def watch(self, cfg: CfgNode, prefix: str = "") -> CfgNode:
        cfg.__dict__["_path"] = prefix
        for key, value in cfg.items():
            if isinstance(value, CfgNode):
                self.watch(value, f"{prefix}{key}.")
        return cfg


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"), num_train=2, num_val=1)


SWIN = [*("MODEL.BACKBONE.NAME", "D2SwinTransformer", "MODEL.SWIN.EMBED_DIM", 24, "MODEL.SWIN.DEPTHS", (1, 1, 1, 1))]


ONE_EXIT = ("MODEL.ECO.EXITS", (1,), "MODEL.ECO.EXIT", 1, "MODEL.ECO.MAX_EXIT", 1, "MODEL.ECO.EXITS_PER_STEP", 1)


VARIANTS = {
    "R50": (),
    "swin": SWIN,
    "lsj": ("INPUT.DATASET_MAPPER_NAME", "coco_panoptic_lsj", "INPUT.IMAGE_SIZE", 64),
    "semantic alone": ("MODEL.MASK_FORMER.TEST.PANOPTIC_ON", False, "MODEL.MASK_FORMER.TEST.INSTANCE_ON", False),
    "poly": ("SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR"),
    "proscale": (*PROSCALE, "MODEL.ECO.EXITS", (5, 6), "MODEL.ECO.EXITS_PER_STEP", 2),
    "hybrid": (*RT, *ONE_EXIT),
    "timm": ("MODEL.BACKBONE.NAME", "TimmBackbone", "MODEL.TIMM.NAME", "resnet18"),
}


@pytest.fixture(scope="module")
def seen(tiny) -> set[str]:
    """The keys that are read by setting up, training and evaluating models of all kinds, and by predicting."""
    with pytest.MonkeyPatch.context() as patch:
        return read_keys(tiny, patch)


def read_keys(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    reads = Reads(monkeypatch)
    spy = Spy(register_from_config)
    for module in ("setup", "datasets"):
        monkeypatch.setattr(f"eco_m2f.engine.{module}.register_from_config", spy)
    absent = () if find_spec("timm") else ("timm",)  # an optional package; its keys are read where it is installed
    variants = [("eco_maskformer2", options) for name, options in VARIANTS.items() if name not in absent]
    for kind, options in [*variants, ("eco_detr", ())]:
        cfg = reads.watch(load_cfg(tiny.config(kind), list(options)))
        trainer = Trainer(cfg)
        trainer.build_hooks()
        autocast(cfg, "cpu", cfg.SOLVER.AMP.ENABLED)
        evaluators_for(cfg.DATASETS.TEST[0])
    for head in ("NaiveHead", "MaskTransformerHead"):
        build_model(reads.watch(load_cfg(tiny.config("dovit"), ["MODEL.SEM_SEG_HEAD.NAME", head])))
    with pytest.raises(OSError):
        options = ["MODEL.DOVIT.TEACHER", str(tiny.base / "no.pth")]
        Trainer(reads.watch(load_cfg(tiny.config("dovit"), options)))
    for policy in ("LinearGate", "OracleExit"):
        with pytest.raises((ValueError, OSError)):
            cfg = load_cfg(
                tiny.config(), ["MODEL.ECO.POLICY", policy, "MODEL.ECO.GATE", "no", "MODEL.ECO.DERIVED", "no"]
            )
            build_model(reads.watch(cfg))
    build_model(reads.watch(load_cfg(tiny.config(), ["MODEL.ECO.POLICY", "StateChangeExit"])))
    gate_settings(reads.watch(load_cfg(tiny.config())))
    cfg = reads.watch(load_cfg(tiny.config(), ["MODEL.ECO.QUALITY", "BoxAP"]))
    with pytest.raises(ValueError, match="BoxAP needs a model of boxes"):
        derive(cfg, build_model(cfg), tiny.dataset("train"), str(tiny.base / "derived"), shard_size=1)
    several = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (64,), "TEST.AUG.FLIP", False]
    cfg = reads.watch(load_cfg(tiny.config(), several))
    evaluate(cfg, build_model(cfg).eval())
    with monkeypatch.context() as patch:
        patch.setattr("eco_m2f.engine.predict.load_cfg", lambda *_: cfg)
        patch.setattr("eco_m2f.engine.setup.load_cfg", lambda *_: cfg)
        patch.setattr("eco_m2f.engine.predict.build_trained", lambda cfg: build_model(cfg).eval())
        patch.setattr("eco_m2f.engine.setup.setup_logger", lambda *_, **__: None)
        load_predictor("")
        with kept_log_handlers():
            setup(argparse.Namespace(config_file="", opts=[], eval_only=False))
    assert spy.called  # DATASETS.CUSTOM is read while the config is loaded, before it can be watched
    unread_package = {key for key in own_keys() if absent and key.startswith("MODEL.TIMM.")}
    return reads.seen | {"DATASETS.CUSTOM"} | unread_package


def test_each_key_is_read_by_what_trains_and_evaluates(seen):
    assert own_keys() - seen == set()


READ_ELSEWHERE = {  # keys of detectron2 that take effect, though the models of this test do not show it
    "CUDNN_BENCHMARK": "read in the file that detectron2's default_setup writes",
    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": "of a crop",
    "SOLVER.NUM_DECAYS": "of the scheduler WarmupStepWithFixedGammaLR",
    "SOLVER.MOMENTUM": "of SGD",
    "MODEL.WEIGHTS": "loaded before a training or an evaluation",
    "TEST.EXPECTED_RESULTS": "compared after a training",
    "VERSION": "of the format of the file",
    **dict.fromkeys(("MODEL.RESNETS.RES4_DILATION", "MODEL.RESNETS.RES5_MULTI_GRID"), "of DeepLab's ResNet"),
    "MODEL.RESNETS.STEM_TYPE": "of DeepLab's ResNet",
    **dict.fromkeys(f"MODEL.FPN.{key}" for key in ("FUSE_TYPE", "IN_FEATURES", "NORM", "OUT_CHANNELS")),  # of an FPN
}


def test_the_keys_without_effect_are_those_that_nothing_reads(seen):
    """detectron2's trainer reads TEST.PRECISE_BN, but its hook does not run here."""
    every = get_cfg()
    add_eco_config(every)
    named = {key for key in leaves(every) if any(f"{key}.".startswith(f"{path}.") for path in WITHOUT_EFFECT)}
    assert set(leaves(every)) - seen - set(READ_ELSEWHERE) | {"TEST.PRECISE_BN.ENABLED"} == named
    assert set(READ_ELSEWHERE) & seen <= {"CUDNN_BENCHMARK"}


def test_a_key_without_effect_is_told_with_its_value(tiny, caplog):
    options = ["TEST.PRECISE_BN.ENABLED", True, "MODEL.RPN.NMS_THRESH", 0.5, "SOLVER.NESTEROV", False]
    warn_of_keys_without_effect(load_cfg(tiny.config(), options))
    messages = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [message.split(", which")[0] for message in messages] == [
        *("MODEL.RPN.NMS_THRESH is 0.5", "TEST.PRECISE_BN.ENABLED is True")
    ]


@pytest.mark.parametrize("name", LEAVES)
def test_no_config_of_ours_sets_a_key_without_effect(name):
    assert set_without_effect(load_cfg(str(CONFIGS / name), ["MODEL.DEVICE", "cpu"])) == {}


@pytest.mark.parametrize("key", ["DATASETS.TRAIN", "DATASETS.TEST"])
def test_names_of_datasets_are_texts(key):
    with pytest.raises(ValueError, match=rf"{key} is .*\[1\].*: give a list of dataset names"):
        load_cfg(str(CONFIGS / LEAVES[0]), [key, "[[1]]"])


class Spy:
    def __init__(self, function):
        self.function, self.called = function, False

    def __call__(self, specs, *options, **more):
        self.called = bool(specs)
        return self.function(specs, *options, **more)


def drawn(model) -> list:
    """Exits and weights of the first iterations."""
    return [model.sampler(i) for i in range(8)]


TWO = ("MODEL.ECO.EXITS_PER_STEP", 2)


CHANGES = {  # key: what is set besides, its new value, and where the change shows
    "EXITS": (TWO, (2, 4, 6), lambda model: model.exits),
    "ALPHA": (TWO, "uniform", drawn),
    "EXITS_PER_STEP": (TWO, 3, drawn),
    "SEED": (TWO, 1, drawn),
    "POLICY": ((), "LinearGate", lambda model: type(model.exit_policy)),
    "EXIT": ((), 4, lambda model: model.exit_policy.exits),
    "MAX_EXIT": (("MODEL.ECO.POLICY", "LinearGate"), 4, lambda model: model.exit_policy.exits),
    "CHANGE_THRESHOLD": (("MODEL.ECO.POLICY", "StateChangeExit"), 0.5, lambda model: model.exit_policy.threshold),
    "FEATURE": (("MODEL.ECO.POLICY", "LinearGate"), "projected", lambda model: model.exit_policy.in_channels),
}


@pytest.mark.parametrize("key", sorted(CHANGES))
def test_changing_an_eco_key_changes_the_model(tiny, key):
    """GATE, BETA and DERIVED need files: tests/policies/test_exit_policies.py; LOSS and GATE_SOLVER are Step C's."""
    common, value, look = CHANGES[key]
    before = build_model(load_cfg(tiny.config(), list(common)))
    after = build_model(load_cfg(tiny.config(), [*common, f"MODEL.ECO.{key}", value]))
    assert look(before) != look(after)


@pytest.mark.parametrize("value", ["[1, 2, 3, 4, 6]", (1, 2, 3, 4, 6), [1, 2, 3, 4, 6]])
@pytest.mark.parametrize("before", ["linear", "[1, 2, 3, 4, 5]"])
def test_alpha_is_a_text_or_a_list_in_a_file_and_as_an_option(tiny, tmp_path, value, before):
    """A later value may have another type than an earlier one."""
    path = tmp_path / "base.yaml"
    path.write_text(f"_BASE_: {tiny.config()}\nMODEL: {{ECO: {{EXITS_PER_STEP: 5, ALPHA: {before}}}}}\n")
    listed = tmp_path / "list.yaml"
    listed.write_text(f"_BASE_: {path}\nMODEL: {{ECO: {{ALPHA: [1, 2, 3, 4, 6]}}}}\n")
    wanted = {2: 1.0, 3: 2.0, 4: 3.0, 5: 4.0, 6: 6.0}
    for name, options in ((listed, []), (path, ["MODEL.ECO.ALPHA", value])):
        assert build_model(load_cfg(str(name), options)).sampler(0) == wanted
    model = build_model(load_cfg(str(listed), ["MODEL.ECO.ALPHA", "uniform"]))
    assert model.sampler(0) == dict.fromkeys(wanted, 1.0)


@pytest.mark.parametrize("value", [0.5, None, "list", "[[1], [2], [3], [4], [5]]", "['a', 'b', 'c', 'd', 'e']"])
def test_an_alpha_that_is_neither_is_refused(tiny, value):
    with pytest.raises(ValueError, match="unknown alpha .*'linear', 'uniform', or a list"):
        build_model(load_cfg(tiny.config(), ["MODEL.ECO.ALPHA", value]))


REFUSED = {"SOLVER.ACCUMULATION_STEPS": ("SOLVER.IMS_PER_BATCH", 8, 1), "MODEL.ECO.ALPHA_LIST": ("ALPHA", [1, 2], [])}


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_a_removed_key_is_refused_with_what_to_set_instead(tmp_path, key):
    remedy, set_value, idle = REFUSED[key]
    for value in (set_value, idle):
        with pytest.raises(ValueError, match=rf"options.*the key {key} was removed.*{remedy}"):
            load_cfg(str(CONFIGS / ECO), [key, value])
    with pytest.raises(ValueError, match=rf"old.yaml.*the key {key} was removed.*{remedy}"):
        load_cfg(old_config(tmp_path, key, set_value))


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_a_removed_key_that_did_nothing_may_stand_in_the_config_of_an_earlier_run(tmp_path, key):
    """Such a run can be evaluated and continued. Its config.yaml has every key."""
    kept = load_cfg(old_config(tmp_path, key, REFUSED[key][2]), MINI)
    wanted = load_cfg(str(CONFIGS / ECO), MINI)
    assert leaves(yaml.safe_load(kept.dump())) == leaves(yaml.safe_load(wanted.dump()))


def old_config(folder: Path, key: str, value: object) -> str:
    """An ECO config as an earlier version wrote it."""
    content = yaml.safe_load(load_cfg(str(CONFIGS / ECO)).dump())
    *nodes, last = key.split(".")
    functools.reduce(dict.__getitem__, nodes, content)[last] = value
    path = folder / "old.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize("name", [name for name in PAPER if "eco" in Path(name).name])
def test_step_c_of_the_papers_configs_is_the_papers(name):
    """Adam, for 2 epochs of COCO or 20k iterations of Cityscapes; hard-CE; beta by dataset; K is the last exit."""
    cfg = load_cfg(str(CONFIGS / name))
    settings = gate_settings(cfg)
    coco = Path(name).parts[0] == "coco"
    assert (settings["adam_epochs"], settings["adam_iterations"]) == ((2, 0) if coco else (0, 20000))
    assert settings["optimizer"] == "adam" and settings["loss"] == ["hard_ce"]
    assert settings["beta"] == [0.0005 if coco else 0.003] and settings["max_exit"] == [cfg.MODEL.ECO.EXITS[-1]]
