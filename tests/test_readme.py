"""The examples of README and guide: the Python code runs, the commands exist, and the links exist."""

import json
import re
import runpy
import shlex

import numpy as np
import pytest
import torch
from minis import ROOT

PAGES = (ROOT / "README.md", ROOT / "docs" / "GUIDE.md")
BLOCKS = [
    block for page in PAGES for block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
]
COMMANDS = [
    line.split("#")[0].strip()
    for kind, block in BLOCKS
    if not kind
    for line in block.splitlines()
    if line.split("#")[0].strip()
]


def test_every_kind_of_example_is_tested():
    assert {kind for kind, _ in BLOCKS} == {"", "python", "yaml"}
    assert {shlex.split(c)[0] for c in COMMANDS} == {"python", "make", "pip"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python ")])
def test_command_is_understood_by_its_tool(command):
    tool, *arguments = shlex.split(command)[1:]
    if tool == "tools/install_detectron2.py":  # runs before the package is installed, and takes no arguments
        assert not arguments
        return
    parsed = runpy.run_path(str(ROOT / tool))["build_parser"]().parse_args(arguments)
    config = getattr(parsed, "config_file", None)
    if config:
        from eco_m2f.engine.setup import load_cfg

        load_cfg(str(ROOT / config), getattr(parsed, "opts", ()))  # train_gate.py takes none


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_target_exists(command):
    target = shlex.split(command.split("<")[0])[1]
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_yaml_of_own_data_merges(tmp_path):
    from eco_m2f.engine.setup import load_cfg

    (block,) = (text for kind, text in BLOCKS if kind == "yaml" and "CUSTOM" in text)
    base = f"_BASE_: {ROOT / 'configs/toy/maskformer2_toy.yaml'}\n"
    for split in ("train", "val"):
        block = block.replace(f"cells_{split},", f"readme_cells_{split},")
        block = block.replace(f"json=cells/pan_{split}.json", f"json={tmp_path / split}.json")
        kinds = [{"id": i, "name": name, "isthing": 1 - i} for i, name in enumerate(("cell", "ground"))]
        content = {"images": [], "annotations": [], "categories": kinds}
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    (tmp_path / "own.yaml").write_text(base + block)
    assert load_cfg(str(tmp_path / "own.yaml")).MODEL.SEM_SEG_HEAD.NUM_CLASSES == 2


def test_yaml_of_another_backbone_builds_it(tmp_path):
    pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    from eco_m2f.engine.setup import build_model, load_cfg

    (block,) = (text for kind, text in BLOCKS if kind == "yaml" and "TIMM" in text)
    (tmp_path / "own.yaml").write_text(f"_BASE_: {ROOT / 'configs/toy/eco_maskformer2_toy.yaml'}\n{block}")
    model = build_model(load_cfg(str(tmp_path / "own.yaml")))
    assert model.backbone.output_shape()["res5"].channels == 320


def test_python_examples_run(tmp_path, monkeypatch, capsys):
    """Runs all blocks in a folder with the files that they name: weights and a derived dataset."""
    from eco_m2f.derived import PROVENANCE_KEYS, ShardWriter, make_row
    from eco_m2f.engine.setup import build_model, load_cfg
    from eco_m2f.quality.statistics import ImageStatistics

    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    model = build_model(load_cfg("configs/toy/eco_maskformer2_toy.yaml"))
    torch.save({"model": model.state_dict()}, "eco.pth")
    categories = [{"id": 1, "name": "one", "isthing": 1}]
    known = {"exits": [2, 6], "categories": categories, "feature_source": "res5"}
    known |= {"checkpoint_sha256": "0" * 64, "parent_sha256": "0" * 64}
    writer = ShardWriter("derived/val", {k: known.get(k, "-") for k in PROVENANCE_KEYS if k != "num_images"}, 2)
    one = [np.array([v]) for v in (1, 0.8, 1, 0, 0)]
    none = [np.array([v]) for v in (1, 0.0, 0, 0, 1)]
    rows = [
        make_row(
            image_id=i,
            file_name="x.png",
            height=8,
            width=8,
            quality=[float(i), 0.8],
            feature=[0.0],
            statistics={2: ImageStatistics(*(one if i else none)), 6: ImageStatistics(*one)},
            total_gflops=[2.0, 4.0],
            encoder_gflops=[1.0, 3.0],
        )
        for i in range(2)
    ]
    writer.write(0, rows)
    first, second = (text for kind, text in BLOCKS if kind == "python")
    variables = {}
    exec(first, variables)
    assert variables["panoptic"].shape == (96, 128) and variables["result"]["exit"] == 3
    exec(second, variables)
    assert variables["best"].tolist() == [6, 2]
    assert "{'total': 4.0, 'encoder': 3.0}" in capsys.readouterr().out
