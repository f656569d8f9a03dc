"""Bad arguments of the other tools end in one message with the cause and the remedy."""

import shutil

import pytest
import torch
from tiny import call
from tried_tools import assert_names

from eco_m2f.engine.setup import build_model, load_cfg

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(good, derived) -> dict:
    """The files that the arguments in the table below name."""
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
    (
        "sweep_thresholds {parent_config} --thresholds 0.5 --output OUT MODEL.WEIGHTS {model}",
        "which has no threshold",
        "give a config of DoViT",
    ),
    ("benchmarks/op --device cuda", "--device cuda", "take --device cpu"),
    ("benchmarks/op --output {other}/op.csv", "{other}/op.csv cannot be written", "choose another file"),
    ("benchmarks/step_c --output {base}", "{base} cannot be written", "folder"),
    ("benchmarks/op --contestants mmcv --output OUT", "no contestant ['mmcv']"),
    ("benchmarks/model --config-file none.yaml --output OUT", "'none.yaml'", "configs/"),
    ("benchmarks/model {model_config} --exits 9 --output OUT", "--exits [9]", "[2, 3, 4, 5, 6]"),
    ("benchmarks/model {parent_config} --output OUT", "--exits [2, 6]", "take an eco config"),
    ("benchmarks/dovit {model_config} --output OUT", "EcoMaskFormer", "configs/*/*/dovit/"),
    ("make_toy_dataset --output {recipe}", "{recipe} holds other files", "another folder"),
    ("../datasets/prepare_nuclei {recipe} OUT", "{recipe}/index.csv not found", "instance_ids/"),
    ("convert_detr {none} OUT.pth", "no checkpoint at {none}"),
    ("convert_detr {cut} OUT.pth", "{cut}", "cannot be read"),
    ("convert_detr {other} OUT.pth", "{other} is no DETR checkpoint", "fc.weight"),
    ("convert_detr {other} OUT.pkl", "OUT.pkl must end in .pth or .safetensors"),
    ("convert_backbone {none} OUT.pkl", "no checkpoint at {none}"),
    ("convert_backbone {cut} OUT.pkl", "{cut}", "cannot be read", "may be truncated"),
    ("convert_backbone {other} OUT.pkl", "{other} holds no known backbone (Swin has ", "it holds fc.weight, "),
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
        ("benchmarks/op --device tpu", "invalid choice: 'tpu'"),
        ("benchmarks/op --rounds 0", "0 must be at least 1"),
        ("benchmarks/op --shapes vgg", "invalid choice: 'vgg'"),
        ("sweep_thresholds --config-file c.yaml --thresholds 1.5", "1.5 must be above 0 and at most 1"),
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
