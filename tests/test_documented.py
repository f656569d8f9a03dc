"""Runs every command of the pages and the configs, under the official names of the datasets.

One process runs them all on generated trees (documented_job.py). Each command runs unchanged, but in one process, and
with KEY VALUE pairs at its end that make model and images small. Commands that cannot run here are listed with the
reason and the test of the same code.
"""

import fcntl
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from documented import CONFIGS, PAGES, ROOT, all_commands, of_page, of_yaml, strays
from tiny import tool_environment

pytestmark = pytest.mark.slow

LONG = "takes minutes at the sizes that it measures"
NOT_RUN = {  # pattern of commands: why, and the file of tests that stands for them
    r"make (recipe|env|test|format|help)\b.*": ("make completes .venv over the network", "tests/tools/test_recipe.py"),
    r"pip install .*": ("downloads", "tests/tools/test_install.py"),
    r"tools/install_detectron2.py": ("downloads", "tests/tools/test_install.py"),
    r"tools/convert_timm.py vit_\w+ \S+\.pkl": ("timm downloads the weights", "tests/modeling/test_dovit.py"),
    r"tools/benchmarks/op.py .*": (LONG, "tests/tools/benchmarks/test_benchmark_op.py"),
    r"tools/benchmarks/model.py .*": (LONG, "tests/tools/benchmarks/test_benchmark_model.py"),
    r"tools/benchmarks/step_[abc].py .*": (LONG, "tests/tools/benchmarks/test_benchmark_steps.py"),
    r"tools/benchmarks/dovit.py .*": (LONG, "tests/tools/benchmarks/test_benchmark_dovit.py"),
    r"tools/benchmarks/new_size.py .*": (LONG, "tests/tools/benchmarks/test_benchmark_new_size.py"),
}
COMMANDS = list({(command.folder, command.text): command for command in all_commands()}.values())
LEAVES = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml") if not p.name.startswith("Base-"))


def reason(text: str) -> str | None:
    return next((pattern for pattern in NOT_RUN if re.fullmatch(pattern, text)), None)


RUN = [command for command in COMMANDS if not reason(command.text)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder of the job that has run all commands, once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    base = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "documented"
    base.mkdir(exist_ok=True)
    with open(base / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return base / "job" if (base / "job" / "batches.json").exists() else run_job(base / "job")


def run_job(base: Path) -> Path:
    base.mkdir()
    (base / "commands.json").write_text(json.dumps([asdict(command) for command in RUN]))
    job = [sys.executable, str(ROOT / "tests" / "documented_job.py"), str(base), str(base / "commands.json")]
    environment = tool_environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    done = subprocess.run(job, env=environment, capture_output=True, text=True, cwd=base)
    assert done.returncode == 0, done.stderr[-3000:]
    return base


@pytest.fixture(scope="module")
def results(folder) -> dict[tuple, dict]:
    return {(r["folder"], r["text"]): r for r in json.loads((folder / "results.json").read_text())}


@pytest.fixture(scope="module")
def batches(folder) -> dict[str, dict]:
    return json.loads((folder / "batches.json").read_text())


@pytest.mark.parametrize("command", RUN, ids=lambda c: f"{c.page}: {c.text[:90]}")
def test_a_documented_command_runs(results, command):
    result = results[command.folder, command.text]
    assert result["status"] == 0, result["output"]


def test_what_is_not_run_is_tested_elsewhere():
    unused = [p for p in NOT_RUN if not any(re.fullmatch(p, c.text) for c in COMMANDS)]
    assert unused == []
    assert [path for _, path in NOT_RUN.values() if not (ROOT / path).is_file()] == []


def test_the_configs_that_commands_name_exist():
    """Also for commands that do not run."""
    named = {word for command in COMMANDS for word in command.words if word.startswith("configs/")}
    assert {f"configs/{name}" for name in LEAVES} <= named
    assert [word for word in named if not (ROOT / word).is_file()] == []


def test_commands_are_found_wherever_they_stand(tmp_path):
    block = "python tools/a.py x  # remark\nmake b \\\n  C=1\na file\n"
    text = f"## Part\n```\n{block}```\n`tools/c.py --d`, `tools/e.py`, `pip install f && make g`\n    make h\n"
    found = [(c.text, c.section, c.tool) for c in of_text(tmp_path, text)]
    assert found == [
        *(("tools/a.py x", "Part", "a"), ("make b C=1", "Part", "make"), ("make h", "Part", "make")),
        *(("tools/c.py --d", "Part", "c"), ("pip install f", "Part", "pip"), ("make g", "Part", "make")),
    ]


def of_text(folder: Path, text: str):
    """The commands of a page with this text."""
    path = folder / "page.md"
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("documented.ROOT", folder)
        return of_page(path)


def test_commands_of_a_config_are_its_first_comments(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("# tools/a.py b      (after c)\n# text, tools/d.py\nKEY: 1\n# tools/e.py f\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("documented.ROOT", tmp_path)
        assert [c.text for c in of_yaml(path)] == ["tools/a.py b"]


def test_no_command_hides_within_a_comment():
    assert strays() == []


def test_every_page_is_read():
    assert {p.name for p in PAGES} >= {"README.md", "GUIDE.md", "MODEL_ZOO.md", "RELIABILITY.md", "ADDING.md", "toy.md"}
    assert sum(c.page == "docs/GUIDE.md" for c in COMMANDS) >= 25 and len(RUN) > 135


def trained(results) -> list[dict]:
    """The trainings that had a run of their own."""
    runs = [r for r in results.values() if r["page"].startswith("configs/") and not r["run_as"]]
    return [r for r in runs if "train_net" in r["text"] and "--eval-only" not in r["text"]]


def test_each_family_is_trained_on_each_of_its_datasets(results):
    pages = [r["page"] for r in trained(results)]
    families = {
        "coco/panoptic-segmentation": ("swin/", "eco/", "lite/lite_m", "lite/lite_eco", "rt/", "maskformer/")
        + ("proscale/proscale111_m", "proscale/proscale111_eco", "proscale/proscale333_m", "proscale/proscale333_eco"),
        "cityscapes/panoptic-segmentation": ("swin/", "eco/", "lite/lite_m", "lite/lite_eco", "rt/")
        + ("proscale/proscale111_m", "proscale/proscale111_eco", "proscale/proscale333_m", "proscale/proscale333_eco"),
        "coco/object-detection": ("detr_R50_bs", "detr_R50_dc5", "eco/eco_detr_R50_bs", "eco/eco_detr_R50_dc5"),
        "cityscapes/semantic-segmentation": ("dovit/",),
        "ade20k/semantic-segmentation": ("dovit/",),
        "nuclei": ("maskformer2_nuclei_cpu", "maskformer2_R50", "eco/"),
        "toy": ("maskformer2_toy", "eco_maskformer2_toy", "detr_toy", "eco_detr_toy", "dovit_toy"),
    }
    for folder, names in families.items():
        for name in names:
            assert any(page.startswith(f"configs/{folder}/{name}") for page in pages), (folder, name)


def test_some_trainings_accumulate_gradients(folder):
    log = (folder / "output/coco/maskformer2_R50/log.txt").read_text()
    assert "2 images an optimizer step: processes 1, images per process and pass 1, passes per step 2" in log


def test_trainings_ran_to_their_end_and_were_evaluated(folder):
    """Configs of the same model share a folder."""
    last_metrics = {
        path.parent: json.loads(path.read_text().splitlines()[-1]) for path in folder.glob("output/**/metrics.json")
    }
    wrong = [
        str(path)
        for path, metrics in last_metrics.items()
        if metrics["iteration"] != 2 or not any("/" in k for k in metrics)
    ]
    assert len(last_metrics) > 40 and wrong == []


def test_cityscapes_ap_is_among_the_results(folder):
    """The paper's AP_p, with PQ, mIoU and the exits that a gate took."""
    path = folder / "output/cityscapes/eco_maskformer2_swin_tiny/inference/cityscapes_fine_panoptic_val/results.json"
    found = json.loads(path.read_text())
    assert set(found) == {"exits", "panoptic_seg", "sem_seg", "segm"} and {"AP", "AP50"} <= set(found["segm"])


@pytest.mark.parametrize("name", LEAVES)
def test_the_first_batch_of_every_config(batches, name):
    """By the official names and file layouts, with the augmentation of the config."""
    batch = batches[name]
    sizes = {
        "coco/panoptic-segmentation": [3, 1024, 1024],
        "cityscapes/panoptic-segmentation": [3, 512, 1024],
        "cityscapes/semantic-segmentation": [3, 768, 768],
        "ade20k/semantic-segmentation": [3, 512, 512],
    }
    places = {
        "coco": ("coco/train2017/", "coco/val2017/"),
        "cityscapes": ("cityscapes/leftImg8bit/train/aachen/", "cityscapes/leftImg8bit/val/munster/"),
        "ade20k": ("ADEChallengeData2016/images/training/", "ADEChallengeData2016/images/validation/"),
        "nuclei": ("nuclei/train/", "nuclei/val/"),
        "toy": ("toy/train/", "toy/val/"),
    }
    task, dataset = "/".join(Path(name).parts[:2]), Path(name).parts[0]
    assert all(shape == sizes.get(task, shape) for shape in batch["images"]) and len(batch["images"]) == 2
    assert all(f.startswith(places[dataset][0]) for f in batch["files"])
    assert batch["test_file"].startswith(places[dataset][1])
    assert batch["classes"] or "object-detection" in name or "detr" in name
