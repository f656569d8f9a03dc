"""tools/train_net.py from the command line: the parent, resuming it, Step A on it, evaluation, several processes."""

import re

import pytest
import torch
from tiny import Tiny, here, in_processes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


def train_net(tiny: Tiny, output, *arguments, kind: str = "eco_maskformer2", run=here):
    """Runs the tool, which must succeed. Returns its output."""
    result = run("train_net", "--config-file", tiny.config(kind), *arguments, "OUTPUT_DIR", output)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def parent(tiny):
    """The output folder of a parent trained for 4 iterations, and the printed text."""
    output = tiny.base / "parent"
    return output, train_net(tiny, output, kind="maskformer2")


def final(output) -> dict:
    return torch.load(output / "model_final.pth", weights_only=False)


def test_training_the_parent(parent):
    output, printed = parent
    assert final(output)["iteration"] == 3
    assert {"config.yaml", "log.txt", "metrics.json", "last_checkpoint", "model_0000001.pth"} <= {
        p.name for p in output.iterdir()
    }
    assert "Starting training from iteration 0" in printed and "Task: panoptic_seg" in printed


def test_resuming_goes_on_to_a_later_end(tiny, parent):
    output, _ = parent
    printed = train_net(tiny, output, "--resume", "SOLVER.MAX_ITER", 6, kind="maskformer2")
    assert "Starting training from iteration 4" in printed
    assert final(output)["iteration"] == 5


def test_step_a_from_the_parent_in_two_processes_then_evaluation(tiny, parent):
    """Mixed precision, accumulation, and a dataset from the command line, all at once."""
    output, weights = tiny.base / "eco", parent[0] / "model_0000001.pth"
    options = ["MODEL.WEIGHTS", weights, "SOLVER.MAX_ITER", 2, "MODEL.ECO.EXITS_PER_STEP", 1]
    amp = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16", "SOLVER.IMS_PER_BATCH", 4]
    printed = train_net(tiny, output, "--num-gpus", 2, *options, *amp, "SOLVER.IMS_PER_GPU", 1, run=in_processes)
    assert "4 images an optimizer step: processes 2, images per process and pass 1, passes per step 2" in printed
    fitting = re.search(r"(\d+) of (\d+) backbone tensors and (\d+) of (\d+) others loaded", printed)
    assert fitting[1] == fitting[2] and fitting[3] == fitting[4]
    start = torch.load(weights, weights_only=False)["model"]
    trained = final(output)["model"]
    assert trained.keys() == start.keys() and any(not torch.equal(trained[k], start[k]) for k in start)

    custom = tiny.spec("val").replace(f"{tiny.name}_val", "from_the_command_line")
    data = ["DATASETS.CUSTOM", [custom], "DATASETS.TEST", "('from_the_command_line',)", "DATASETS.TRAIN", "()"]
    test = ["--eval-only", "MODEL.WEIGHTS", output / "model_final.pth", "MODEL.ECO.EXIT", 3, *data]
    printed = train_net(tiny, tiny.base / "evaluated", *test)
    assert "results on from_the_command_line" in printed
    written = {p.name for p in (tiny.base / "evaluated" / "inference" / "from_the_command_line").iterdir()}
    assert "panoptic.json" in written
    assert re.search(r"mean_exit.*\n.*copypaste: 3\.0000", printed)
