"""tools/analyze_model.py: its output, its files and its error messages."""

import importlib.util
import json

import pytest
import torch
from minis import CONFIGS, MINI, ROOT, fill
from tiny import tool

from eco_m2f.costs import ExitCosts, TokenCosts, TokenTable
from eco_m2f.engine.command_line import run
from eco_m2f.engine.setup import build_model, load_cfg
from eco_m2f.evaluation.token_statistics import TokenStatistics

pytestmark = pytest.mark.slow

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


DOVIT = CONFIGS / "toy" / "dovit_toy.yaml"
THRESHOLDS = """dataset,mIoU,threshold,kept@1,kept@2,kept@3,GFLOPs,static_GFLOPs,saved
val,50.0,0.9,75.0,50.0,25.0,0.1,0.2,50.0
val,60.0,1.0,100.0,100.0,100.0,0.2,0.2,0.0
"""


@pytest.fixture
def thresholds(tmp_path):
    path = tmp_path / "thresholds.csv"
    path.write_text(THRESHOLDS)
    return path


def test_shares_of_tokens(tmp_path, capsys, thresholds):
    """Given shares and shares from a table. The layers are counted by hand, the rest as without stopping."""
    out = tmp_path / "out.json"
    arguments = ["--size", 90, 96, "--kept", 0.5, 0.5, 0, "--thresholds-csv", thresholds, "--json", out]
    assert start(*arguments, config=DOVIT) == 0
    report = json.loads(out.read_text())
    assert list(report["tokens"]) == ["static", "0.5 0.5 0.0", "val at 0.9"] and report["padded_size"] == [96, 96]
    dovit = build_model(load_cfg(str(DOVIT), ["MODEL.DEVICE", "cpu"]))
    assert report["params"] == sum(p.numel() for p in dovit.parameters()) == sum(report["params_by_part"].values())
    tokens, dim, depths = 144, 96, (2, 2, 2, 2)
    layer = lambda n: 12 * n * dim**2 + 2 * n * n * dim + 10 * n * dim  # noqa: E731
    layers = lambda *kept: sum(d * layer(1 + tokens * k) for d, k in zip(depths, (1, *kept), strict=True))  # noqa: E731
    static = report["tokens"]["static"]
    assert static["auxiliary_heads"] == 0 and static["postprocessing"] == 4 * 9 * (96 * 96 + 90 * 96) / 1e9
    for name, kept in (("static", (1, 1, 1)), ("0.5 0.5 0.0", (0.5, 0.5, 0)), ("val at 0.9", (0.75, 0.5, 0.25))):
        gflops = report["tokens"][name]
        assert gflops["total"] == pytest.approx(sum(v for part, v in gflops.items() if part != "total"))
        assert gflops["backbone"] - static["backbone"] == pytest.approx((layers(*kept) - layers(1, 1, 1)) / 1e9)
        assert gflops["head"] == static["head"] and (name == "static") == (gflops["auxiliary_heads"] == 0)
    printed = capsys.readouterr().out
    assert f"     static  {static['total']:.3f}" in printed and "auxiliary heads" in printed


def test_what_is_told_of_an_image_is_what_the_evaluation_tells(tmp_path):
    """The tokens that an image really kept, as shares."""
    dovit = fill(build_model(load_cfg(str(DOVIT), ["MODEL.DEVICE", "cpu", "MODEL.DOVIT.THRESHOLD", 0.5]))).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        x = {"image": torch.randint(0, 256, (3, 96, 72), dtype=torch.uint8)}
        tokens = TokenStatistics(TokenCosts.of(dovit)).row(x, dovit([x])[0])
    assert 1 > tokens["kept"][0] > tokens["kept"][1] > tokens["kept"][2] > 0
    out = tmp_path / "out.json"
    assert start("--size", 96, 72, "--kept", *tokens["kept"], "--json", out, config=DOVIT) == 0
    static, dynamic = (gflops["total"] for gflops in json.loads(out.read_text())["tokens"].values())
    assert static == pytest.approx(tokens["static_gflops"], rel=1e-9)
    assert dynamic == pytest.approx(tokens["gflops"], rel=1e-9)


def test_mean_over_a_csv_with_shares(tmp_path, sizes):
    limits = ["INPUT.MIN_SIZE_TEST", 128, "INPUT.MAX_SIZE_TEST", 256]
    out = tmp_path / "out.json"
    assert start("--sizes-csv", sizes, "--kept", 0.5, 0.5, 0.5, "--json", out, *limits, config=DOVIT) == 0
    report = json.loads(out.read_text())
    dovit = build_model(load_cfg(str(DOVIT), ["MODEL.DEVICE", "cpu"]))
    images = [((128, 128), (256, 256)), ((128, 128), (64, 64)), ((88, 256), (100, 300))]
    each = [TokenTable(dovit, {"0.5 0.5 0.5": [0.5] * 3}).details(*image) for image in images]
    for name, gflops in report["mean"]["tokens"].items():
        assert gflops["total"] == pytest.approx(sum(e[name]["total"] for e in each) / 3)


@pytest.mark.parametrize("kept", [[0.5, 0.5], [0.5, 0.6, 0.1], [1.2, 0.5, 0.1], [0.5, 0.4, -0.1], ["nan", 0.5, 0.1]])
def test_shares_that_are_none(capsys, kept):
    printed = message(capsys, start("--size", 64, 64, "--kept", *kept, config=DOVIT))
    assert "must be 3 numbers (one per decision point) from 1 down to 0" in printed


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a,b\n1,2\n", "is no table of tools/sweep_thresholds.py"),
        (THRESHOLDS.replace("0.9,75.0", "0.9,many"), "is no table of tools/sweep_thresholds.py"),
        (
            "\n".join(line for line in THRESHOLDS.splitlines() if ",0.9," not in line),
            "has no row with a threshold below 1",
        ),
    ],
)
def test_a_table_without_shares(capsys, thresholds, text, expected):
    thresholds.write_text(text)
    assert expected in message(capsys, start("--size", 64, 64, "--thresholds-csv", thresholds, config=DOVIT))


def test_shares_of_a_model_that_stops_no_tokens(capsys):
    told = message(capsys, start("--size", 64, 64, "--kept", 0.5, 0.5, 0.5))
    assert "--kept and --thresholds-csv need a DoViT: this is a EcoMaskFormer" in told


def test_neither_size_nor_csv(capsys):
    assert "--size H W, --sizes-csv FILE or both" in message(capsys, start())


@pytest.mark.parametrize("size", [(0, 64), (64, -3)])
def test_a_size_that_is_none(capsys, size):
    assert f"at least 1 pixel, got {size[0]} x {size[1]}" in message(capsys, start("--size", *size))


def test_a_csv_without_its_columns(capsys, tmp_path):
    path = tmp_path / "sizes.csv"
    path.write_text("image_id,height\n1,5\n")
    printed = message(capsys, start("--sizes-csv", path))
    assert str(path) in printed and "lacks the columns ['width']" in printed and "['image_id', 'height']" in printed


def test_a_csv_that_is_not_there(capsys, tmp_path):
    assert "gone.csv" in message(capsys, start("--sizes-csv", tmp_path / "gone.csv"))


def test_a_config_without_exits(capsys):
    printed = message(capsys, start("--size", 64, 64, "MODEL.META_ARCHITECTURE", "SemanticSegmentor", *SEMANTIC))
    assert "SemanticSegmentor has no postprocessor, so no exits" in printed and "EcoMaskFormer" in printed


SEMANTIC = ["MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead", "MODEL.SEM_SEG_HEAD.NORM", "BN", *MINI]


def test_a_config_with_no_exit_in_its_list(capsys):
    printed = message(capsys, start("--size", 64, 64, "MODEL.ECO.EXITS", "[]"))
    assert "exits must be positive layer numbers" in printed and "[]" in printed


def test_an_unknown_key_and_a_missing_config(capsys):
    assert "MODEL.ECO.EXIST" in message(capsys, start("--size", 64, 64, "MODEL.ECO.EXIST", 3))
    assert "'none.yaml'" in message(capsys, start("--size", 64, 64, config="none.yaml"))


def test_an_output_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert start("--size", 64, 64, "--json", tmp_path / "file" / "out.json") == 1
    assert str(tmp_path / "file") in capsys.readouterr().err
