"""tools/analyze_model.py: what it prints and writes, and how its mistakes end."""

import importlib.util
import json

import pytest
from minis import CONFIGS, MINI, ROOT
from tiny import tool

from eco_m2f.command_line import run
from eco_m2f.engine import build_model, load_cfg
from eco_m2f.evaluation.flops import ExitCosts

TOY = CONFIGS / "toy" / "eco_maskformer2_toy.yaml"
LAYERS = "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS"


def load_tool():
    spec = importlib.util.spec_from_file_location("analyze_model", ROOT / "tools" / "analyze_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


analyze_model = load_tool()


def start(*arguments, config=TOY) -> int:
    arguments = ["--config-file", config, *arguments]
    return run(analyze_model.main, analyze_model.build_parser().parse_args(list(map(str, arguments))))


def message(capsys, status: int) -> str:
    printed = capsys.readouterr()
    assert status == 1 and printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


@pytest.fixture(scope="module")
def model():
    return build_model(load_cfg(str(TOY), ["MODEL.DEVICE", "cpu"]))


@pytest.fixture(scope="module")
def costs(model) -> ExitCosts:
    return ExitCosts(model)


@pytest.fixture
def sizes(tmp_path):
    path = tmp_path / "sizes.csv"
    path.write_text("image_id,file_name,height,width\n1,a.jpg,256,256\n2,b.jpg,64,64\n3,c.jpg,100,300\n")
    return path


def as_json(exits: dict) -> dict:
    return json.loads(json.dumps(exits))


def test_a_size(tmp_path, capsys, model, costs):
    out = tmp_path / "new folder" / "out.json"
    assert start("--size", 100, 200, "--json", out) == 0
    report = json.loads(out.read_text())
    assert report["exits"] == as_json(costs.details((128, 224), (100, 200)))
    assert list(report["exits"]) == ["2", "3", "4", "5", "6"]
    assert {"total", "pixel_decoder", "total_full", "pixel_decoder_full"} <= report["exits"]["2"].keys()
    assert report["params"] == sum(p.numel() for p in model.parameters())
    assert (report["size"], report["padded_size"], report["config"]) == ([100, 200], [128, 224], str(TOY))
    assert {"eco_m2f", "torch", "detectron2"} == report["versions"].keys() and "mean" not in report
    printed = capsys.readouterr().out
    assert f"{report['params'] / 1e6:.3f} M parameters" in printed and "100x200, padded to 128x224" in printed
    assert f"   6  {report['exits']['6']['total']:.3f}" in printed


def test_a_csv_is_resized_as_in_evaluation(tmp_path, capsys, sizes, costs):
    """256x256 and 64x64 become 128x128, and 100x300 becomes 85x256."""
    limits = ["INPUT.MIN_SIZE_TEST", 128, "INPUT.MAX_SIZE_TEST", 256]
    assert start("--sizes-csv", sizes, "--json", tmp_path / "out.json", *limits) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    images = [((128, 128), (256, 256)), ((128, 128), (64, 64)), ((96, 256), (100, 300))]
    assert report["mean"]["exits"] == report["exits"] == as_json(costs.mean(images))
    assert report["mean"]["num_images"] == 3 and report["sizes_csv"] == str(sizes)
    assert report["mean"]["padded_area"] == pytest.approx((2 * 128 * 128 + 96 * 256) / 3)
    assert "Mean GFLOPs of 3 images, 19115 pixels with padding" in capsys.readouterr().out


def test_size_and_csv_together(tmp_path, sizes, costs):
    assert start("--size", 64, 64, "--sizes-csv", sizes, "--json", tmp_path / "out.json") == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["exits"] == as_json(costs.details((64, 64))) != report["mean"]["exits"]


def test_without_json_it_prints_only(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert start("--size", 64, 64) == 0
    assert "GFLOPs of an image of 64x64" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "config, options, exits",
    [
        ("maskformer2_toy.yaml", [], "23456"),
        ("maskformer2_toy.yaml", [LAYERS, 3], "23"),
        ("maskformer2_toy.yaml", [LAYERS, 1], "1"),
        ("eco_maskformer2_toy.yaml", ["MODEL.ECO.EXITS", "[2,6]"], "26"),
    ],
)
def test_exits(tmp_path, config, options, exits):
    out = tmp_path / "out.json"
    assert start("--size", 64, 64, "--json", out, *options, config=CONFIGS / "toy" / config) == 0
    report = json.loads(out.read_text())
    assert list(report["exits"]) == list(exits) and report["opts"] == list(map(str, options))
    totals = [cost["total"] for cost in report["exits"].values()]
    assert totals == sorted(totals) and len(set(totals)) == len(totals)


def test_as_a_process():
    done = tool("analyze_model", "--config-file", TOY, "--size", 64, 0)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "error: a size is a height and a width of at least 1 pixel, got 64 x 0"


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_neither_size_nor_csv(capsys):
    assert "--size H W, --sizes-csv FILE or both" in message(capsys, start())


@pytest.mark.parametrize("size", [(0, 64), (64, -3)])
def test_a_size_that_is_none(capsys, size):
    assert f"at least 1 pixel, got {size[0]} x {size[1]}" in message(capsys, start("--size", *size))


def test_a_csv_without_its_columns(capsys, tmp_path):
    path = tmp_path / "sizes.csv"
    path.write_text("image_id,height\n1,5\n")
    told = message(capsys, start("--sizes-csv", path))
    assert str(path) in told and "lacks the columns ['width']" in told and "['image_id', 'height']" in told


def test_a_csv_that_is_not_there(capsys, tmp_path):
    assert "gone.csv" in message(capsys, start("--sizes-csv", tmp_path / "gone.csv"))


def test_a_config_without_exits(capsys):
    told = message(capsys, start("--size", 64, 64, "MODEL.META_ARCHITECTURE", "SemanticSegmentor", *SEMANTIC))
    assert "SemanticSegmentor has no postprocessor, so no exits" in told and "EcoMaskFormer" in told


SEMANTIC = ["MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead", "MODEL.SEM_SEG_HEAD.NORM", "BN", *MINI]


def test_a_config_with_no_exit_in_its_list(capsys):
    told = message(capsys, start("--size", 64, 64, "MODEL.ECO.EXITS", "[]"))
    assert "exits must be positive layer numbers" in told and "[]" in told


def test_an_unknown_key_and_a_missing_config(capsys):
    assert "MODEL.ECO.EXIST" in message(capsys, start("--size", 64, 64, "MODEL.ECO.EXIST", 3))
    assert "'none.yaml'" in message(capsys, start("--size", 64, 64, config="none.yaml"))


def test_an_output_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert start("--size", 64, 64, "--json", tmp_path / "file" / "out.json") == 1
    assert str(tmp_path / "file") in capsys.readouterr().err
