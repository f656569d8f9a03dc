"""tools/train_gate.py end to end, on a small derived dataset."""

import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from eco_m2f.derived import ShardWriter, make_row
from eco_m2f.gates.gate import Gate
from eco_m2f.quality.statistics import ImageStatistics

EXITS = [2, 4, 6]


def load_tool():
    path = Path(__file__).resolve().parents[2] / "tools" / "train_gate.py"
    spec = importlib.util.spec_from_file_location("train_gate", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


@pytest.fixture(scope="module")
def derived(tmp_path_factory):
    """{"train", "val"}: folders. The first feature is how much an image gains from depth."""
    folders = {}
    for seed, (split, n) in enumerate([("train", 150), ("val", 60)]):
        rng = np.random.default_rng(seed)
        folders[split] = tmp_path_factory.mktemp(split)
        provenance = {
            "exits": EXITS,
            "config": "",
            "checkpoint": "model.pth",
            "checkpoint_sha256": "0" * 64,
            "parent_sha256": "a" * 64,
            "feature_source": "res5",
            "dataset": f"toy_{split}",
            "categories": [{"id": 1, "name": "thing", "isthing": 1}],
            "code_version": "0",
        }
        rows = []
        for i in range(n):
            need = rng.uniform(0, 3)
            quality = [0.7 - 0.05 * need, 0.7 - 0.02 * need, 0.7]
            row = make_row(
                image_id=i,
                file_name=f"{i}.png",
                height=96,
                width=96,
                quality=quality,
                feature=[need, *rng.normal(size=2)],
                statistics={k: ImageStatistics(*np.array([[1], [q], [1], [0], [0]])) for k, q in zip(EXITS, quality)},
                total_gflops=[100.0, 120.0, 140.0],
                encoder_gflops=[20.0, 40.0, 60.0],
            )
            rows.append(row)
        ShardWriter(folders[split], provenance, n, shard_size=n).write(0, rows)
    return folders


def run(derived, tmp_path, *options, val=True):
    split = ["--train", str(derived["train"])] + (["--val", str(derived["val"])] if val else [])
    tool.main(tool.build_parser().parse_args([*split, "--output", str(tmp_path / "gate.pth"), *options]))


def test_one_beta_is_one_gate(derived, tmp_path, capsys):
    run(derived, tmp_path, "--beta", "0.01", "--max-exit", "4", "--loss", "soft_ce")
    gate = Gate.load(tmp_path / "gate.pth")
    assert (gate.beta, gate.exits, gate.loss, gate.parent_sha256) == (0.01, (2, 4), "soft_ce", "a" * 64)
    assert gate.results["num_images"] == 60 and gate.results["measured_on"] == "toy_val"
    printed = capsys.readouterr().out
    assert "150 images to fit on, 60 to evaluate on" in printed and f"PQ {gate.results['pq']:.2f}" in printed


def test_several_budgets_are_several_gates_and_a_frontier(derived, tmp_path):
    table = tmp_path / "frontier.csv"
    run(derived, tmp_path, "--beta", "0.001", "0.01", "--max-exit", "6", "4", "--frontier", str(table))
    names = sorted(p.name for p in tmp_path.glob("*.pth"))
    assert names == [f"gate_beta{beta}_K{k}.pth" for beta in ("0.001", "0.01") for k in (4, 6)]
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["policy"] for row in rows] == ["fixed"] * 3 + ["oracle", "gate", "mixture"] * 4
    for row in rows:
        if row["policy"] == "gate":
            gate = Gate.load(tmp_path / f"gate_beta{row['beta']}_K{row['max_exit']}.pth")
            assert gate.results["pq"] == float(row["pq"])


def test_lines_say_which_gates_beat_the_mixture(derived, tmp_path, capsys):
    run(derived, tmp_path, "--beta", "0.01")
    lines = capsys.readouterr().out.splitlines()
    policies = [line.split()[0] for line in lines[2:8]]
    assert policies == ["fixed"] * 3 + ["oracle", "gate", "mixture"] and all(len(line) < 140 for line in lines[1:8])
    assert lines[8].startswith("gate beta 0.01: +1.") and "PQ over the mixture of exits 4 and 6" in lines[8]
    run(derived, tmp_path, "--beta", "0.01", "--l2", "1e6")
    assert capsys.readouterr().out.splitlines()[8] == "No gate beats the mixture of fixed exits."


def test_a_search_says_what_is_best_and_saves_a_fixed_exit(derived, tmp_path, capsys):
    run(derived, tmp_path, "--target-gflops", "1000")
    printed = capsys.readouterr().out
    assert "\nBest: fixed exit 6, 70.00 PQ at 140 GFLOPs. No gate is better. The file sends every image" in printed
    gate = Gate.load(tmp_path / "gate.pth")
    assert gate.exits == (2, 4, 6) and not gate.weight.any() and gate.bias.tolist() == [0.0, 0.0, 1.0]
    run(derived, tmp_path, "--target-gflops", "118", "--l2", "1e6", "--frontier", str(tmp_path / "tried.csv"))
    printed = capsys.readouterr().out
    assert "\nBest: mixture of exits 2 and 4, 90 % of the images at exit 4" in printed
    assert "\nSaved is the best of gates and fixed exits: fixed exit 2, " in printed
    assert Gate.load(tmp_path / "gate.pth").exits == (2,) and "\nmixture,," in (tmp_path / "tried.csv").read_text()


def test_target_gflops(derived, tmp_path):
    run(derived, tmp_path, "--target-gflops", "118")
    results = Gate.load(tmp_path / "gate.pth").results
    assert 110 < results["total_gflops"] <= 118


def test_max_pq_drop(derived, tmp_path):
    run(derived, tmp_path, "--max-pq-drop", "1.5")
    results = Gate.load(tmp_path / "gate.pth").results
    assert results["pq"] >= 70 - 1.5 and results["total_gflops"] < 140


ECO = """
_BASE_: {base}
MODEL:
  ECO:
    EXITS: [2, 4, 6]
    EXITS_PER_STEP: 3
    BETA: 0.02
    MAX_EXIT: 4
    LOSS: "soft_ce"
    GATE_SOLVER: {{OPTIMIZER: "adam", ADAM_LR: 0.5, ADAM_BATCH: 75, ADAM_ITERATIONS: 3}}
"""


@pytest.fixture
def config(tmp_path):
    """make(*lines): writes a config with these lines in MODEL.ECO. Returns the options that name it."""

    def make(*lines: str) -> tuple[str, str]:
        base = Path(__file__).resolve().parents[2] / "configs" / "toy" / "eco_maskformer2_toy.yaml"
        (tmp_path / "eco.yaml").write_text(ECO.format(base=base) + "".join(f"    {line}\n" for line in lines))
        return "--config-file", str(tmp_path / "eco.yaml")

    return make


def test_a_config_gives_beta_k_loss_and_optimizer(derived, tmp_path, config):
    run(derived, tmp_path, *config())
    gate = Gate.load(tmp_path / "gate.pth")
    assert (gate.beta, gate.exits, gate.loss) == (0.02, (2, 4), "soft_ce")
    expected = {"optimizer": "adam", "lr": 0.5, "batch": 75, "iterations": 3, "seed": 0}
    assert {key: gate.fit[key] for key in expected} == expected


def test_options_come_before_the_config(derived, tmp_path, config):
    options = ["--beta", "0.01", "--max-exit", "6", "--loss", "hard_ce"]
    adam = ["--adam-lr", "0.1", "--adam-batch", "50", "--adam-epochs", "2"]
    run(derived, tmp_path, *config(), *options, *adam)
    gate = Gate.load(tmp_path / "gate.pth")
    assert (gate.beta, gate.exits, gate.loss) == (0.01, (2, 4, 6), "hard_ce")
    assert (gate.fit["lr"], gate.fit["batch"], gate.fit["iterations"]) == (0.1, 50, 2 * 3)
    run(derived, tmp_path, *config(), "--optimizer", "lbfgs", "--target-gflops", "118")
    found = Gate.load(tmp_path / "gate.pth")
    assert found.fit["optimizer"] == "lbfgs" and found.results["total_gflops"] <= 118 and found.loss == "soft_ce"


def test_a_config_of_other_exits_or_features_is_refused(derived, tmp_path, config):
    with pytest.raises(ValueError, match=r"FEATURE is projected in .*eco.yaml, but res5 in .*: give the config"):
        run(derived, tmp_path, *config('FEATURE: "projected"'))
    toy = Path(__file__).resolve().parents[2] / "configs" / "toy" / "eco_maskformer2_toy.yaml"
    with pytest.raises(ValueError, match=r"EXITS is \[2, 3, 4, 5, 6\] in .*, but \[2, 4, 6\] in "):
        run(derived, tmp_path, "--config-file", str(toy))
    (tmp_path / "eco.yaml").write_text((tmp_path / "eco.yaml").read_text().replace("soft_ce", "mse"))
    with pytest.raises(ValueError, match="MODEL.ECO.LOSS is 'mse': choose one of"):
        run(derived, tmp_path, "--config-file", str(tmp_path / "eco.yaml"))


def test_without_a_config_no_model_code_is_imported(derived, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "eco_m2f.engine", None)  # makes its import fail
    run(derived, tmp_path, "--beta", "0.01")


def test_a_gate_is_a_safetensors_file_where_its_name_says_so(derived, tmp_path):
    run(derived, tmp_path, "--beta", "0.01", "0.02", "--output", str(tmp_path / "gate.safetensors"))
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["gate_beta0.01_K6.safetensors", "gate_beta0.02_K6.safetensors"]
    assert Gate.load(tmp_path / names[0]).beta == 0.01


def test_a_search_with_a_loss_that_has_no_minimum_at_every_beta_keeps_to_those_that_have(derived, tmp_path):
    run(derived, tmp_path, "--target-gflops", "130", "--loss", "u_ce")
    gate = Gate.load(tmp_path / "gate.pth")
    assert gate.loss == "u_ce" and gate.results["total_gflops"] <= 130 and gate.beta < 0.2
    with pytest.raises(ValueError, match="the loss u_ce has no minimum at beta 0.5"):
        run(derived, tmp_path, "--beta", "0.001", "0.5", "--loss", "u_ce")


def test_without_val_a_tenth_is_held_out(derived, tmp_path, capsys):
    run(derived, tmp_path, "--beta", "0.01", val=False)
    assert "135 images to fit on, 15 to evaluate on" in capsys.readouterr().out
    assert Gate.load(tmp_path / "gate.pth").results["num_images"] == 15


def test_adam_and_seed_are_recorded(derived, tmp_path):
    run(derived, tmp_path, "--beta", "0.01", "--optimizer", "adam", "--seed", "3")
    fit = Gate.load(tmp_path / "gate.pth").fit
    assert fit["optimizer"] == "adam" and fit["seed"] == 3


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--beta", "0.1", "--target-gflops", "118"),
        ("--beta", "0.1", "--loss", "mse"),
        ("--beta", "0.1", "--adam-lr", "0.1"),
        ("--beta", "0.1", "--optimizer", "adam", "--adam-epochs", "2", "--adam-iterations", "3"),
        ("--target-gflops", "118", "--max-exit", "4", "6"),
    ],
)
def test_wrong_usage_ends_with_an_error(derived, tmp_path, options):
    with pytest.raises(SystemExit) as error:
        run(derived, tmp_path, *options)
    assert error.value.code not in (0, None)
    assert not list(tmp_path.glob("*.pth"))


def test_help_explains(capsys):
    with pytest.raises(SystemExit):
        tool.build_parser().parse_args(["--help"])
    printed = capsys.readouterr().out
    assert "--target-gflops" in printed and "Images and parent are not needed" in printed
