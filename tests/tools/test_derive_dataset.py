"""Steps B, C and the evaluation with a gate, from the command line; how Step B resumes is in tests/test_derive.py."""

import re

import numpy as np
import pytest
import torch
from predicted import Predicted
from tiny import tool

from eco_m2f.derived import DerivedDataset
from eco_m2f.gate import Gate

pytestmark = pytest.mark.slow
NUM_IMAGES = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Predicted:
    return Predicted(tmp_path_factory.mktemp("data"), NUM_IMAGES)


@pytest.fixture(scope="module")
def derived(data):
    """The folder of the derived dataset."""
    folder = data.tiny.base / "derived"
    where = ["--config-file", data.tiny.config(), "--dataset", data.dataset, "--output", folder, "--shard-size", 4]
    result = tool("derive_dataset", *where, *data.options)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_it_derives(data, derived):
    dataset = DerivedDataset.load(derived)
    assert len(dataset) == NUM_IMAGES and dataset.provenance["dataset"] == data.dataset
    assert dataset.provenance["checkpoint"] == "model.pth"
    assert sorted(p.name for p in derived.glob("*.parquet")) == ["shard-00000.parquet", "shard-00001.parquet"]


def test_the_evaluation_with_a_gate_measures_what_step_c_foretold(data, derived):
    """Step C never saw an image: its PQ and GFLOPs are sums over rows, and equal those of the running model."""
    gate = data.tiny.base / "gate.pth"
    fitted = tool("train_gate", "--train", derived, "--val", derived, "--beta", 0.02, "--l2", 0.001, "--output", gate)
    assert fitted.returncode == 0, fitted.stderr[-3000:]
    foretold = Gate.load(gate).results

    options = ["DATASETS.TEST", f"('{data.dataset}',)", "MODEL.ECO.POLICY", "LinearGate", "MODEL.ECO.GATE", gate]
    output = data.tiny.base / "gated"
    config = ["--config-file", data.tiny.config(), "--eval-only"]
    result = tool("train_net", *config, *data.options, *options, "OUTPUT_DIR", output)
    assert result.returncode == 0, result.stderr[-3000:]
    measured = [float(v) for v in re.search(r"copypaste: PQ,.*\n.*copypaste: (.*)", result.stdout)[1].split(",")]
    names, values = re.search(r"copypaste: (mean_exit.*)\n.*copypaste: (.*)", result.stdout).groups()
    exits = dict(zip(names.split(","), map(float, values.split(","))))
    assert measured[0] == pytest.approx(foretold["pq"], abs=1e-3) and measured[0] > 10
    assert exits["GFLOPs"] == pytest.approx(foretold["total_gflops"], abs=1e-3)
    taken = {int(k.split("@")[1]) for k in exits if "@" in k and exits[k] > 0}
    assert len(taken) > 1, "the gate sends all images to one exit, so the test shows little"
    assert exits["mean_exit"] == pytest.approx(np.mean(list_exits(derived, gate)), abs=1e-3)


def list_exits(folder, gate) -> list[int]:
    """The exits that the gate chooses from the stored features."""
    return Gate.load(gate).choose(torch.from_numpy(DerivedDataset.load(folder).features)).tolist()
