"""The encoder and the quality of docs/ADDING.md pass their contracts and Steps A, B and C."""

import importlib.util
import inspect
import re

import pytest
import torch
import yaml
from minis import CONFIGS, ECO, PARENT, ROOT, build, make_batch
from qualities import Case

from eco_m2f.costs import ExitCosts
from eco_m2f.derived.dataset import DerivedDataset
from eco_m2f.gates.frontier import frontier
from eco_m2f.gates.gate import Gate
from eco_m2f.modeling.encoders import TRANSFORMER_ENCODER_REGISTRY
from eco_m2f.policies.fixed import FixedExit
from eco_m2f.quality import QUALITY_REGISTRY

_, ENCODER_PAGE, QUALITY_PAGE = re.split("^# Adding an? ", (ROOT / "docs/ADDING.md").read_text(), flags=re.MULTILINE)


def blocks(page: str) -> dict[str, str]:
    return dict(re.findall(r"^```(\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL))


BLOCKS, QUALITY = blocks(ENCODER_PAGE), blocks(QUALITY_PAGE)


def other_tests(path: str):
    """Another module of tests/, imported under its own name."""
    spec = importlib.util.spec_from_file_location(f"adding_{path.replace('/', '_')}", ROOT / "tests" / f"{path}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONTRACT = other_tests("modeling/test_encoders")
QUALITY_CONTRACT = other_tests("quality/test_quality")


def rules(contract, *parameters: str) -> list[str]:
    """The tests of a contract with these parameters: a member, and fixtures of pytest."""
    found = {name: list(inspect.signature(test).parameters) for name, test in vars(contract).items() if "test_" in name}
    return [
        name for name, names in found.items() if names and names[0] == parameters[0] and set(names) <= {*parameters}
    ]


RULES = rules(CONTRACT, "encoder")
QUALITY_RULES = rules(QUALITY_CONTRACT, "case", "tmp_path")


@pytest.fixture(scope="module", autouse=True)
def registered():
    exec(BLOCKS["python"], {"__name__": "adding"})
    yield
    TRANSFORMER_ENCODER_REGISTRY._obj_map.pop("DepthwiseEncoder")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(f"_BASE_: {ROOT / 'configs' / ECO}\n{BLOCKS['yaml']}")
    return str(path)


@pytest.mark.parametrize("rule", RULES)
def test_the_contract_of_the_registry(rule):
    assert len(RULES) > 6
    getattr(CONTRACT, rule)(CONTRACT.from_options("DepthwiseEncoder").eval())


def test_the_model_trains_leaves_early_and_is_counted(config):
    model = build(config)
    assert model.exits == (2, 4, 6)
    batch, costs = make_batch(), ExitCosts(model)((64, 96), (64, 96))
    for k in model.exits:
        model.exit_policy = FixedExit(k)
        with torch.no_grad():
            results = model(batch)
        assert [r["exit"] for r in results] == [k, k]
    assert costs[2]["encoder"] < costs[4]["encoder"] < costs[6]["encoder"]
    from detectron2.utils.events import EventStorage

    with EventStorage(0):
        sum(model.train()(batch).values()).backward()
    first = model.sem_seg_head.pixel_decoder.transformer.encoder.layers[0]
    assert first.depthwise.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_its_configs_go_through_all_tools(config, tmp_path):
    systems = other_tests("tools/test_systems")
    parent = tmp_path / "parent.yaml"
    encoder = "MODEL: {SEM_SEG_HEAD: {TRANSFORMER_ENCODER_NAME: DepthwiseEncoder}}"
    parent.write_text(f"_BASE_: {CONFIGS / PARENT}\n{encoder}\n")
    run = systems.Run(systems.System(str(parent), config, (2, 4, 6)), tmp_path / "run")
    derived = DerivedDataset.load(run.derived)
    assert derived.exits == (2, 4, 6)
    chosen = Gate.load(run.gate).choose(torch.from_numpy(derived.features)).tolist()
    found, exits = run.evaluate("gated", "MODEL.ECO.POLICY", "LinearGate", "MODEL.ECO.GATE", run.gate)
    assert list(exits["per_image"].values()) == chosen
    assert found == pytest.approx(systems.measured(derived, chosen), abs=1e-6) and found > 5


@pytest.fixture(scope="module")
def quality(tmp_path_factory):
    """The class of the page, in a module that other processes can import."""
    folder = tmp_path_factory.mktemp("adding_quality")
    (folder / "pixel_accuracy.py").write_text(QUALITY["python"])
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("pixel_accuracy").PixelAccuracy
    QUALITY_REGISTRY._obj_map.pop("PixelAccuracy")


@pytest.fixture(scope="module")
def case(quality, tmp_path_factory):
    QUALITY_CONTRACT.MEMBERS["PixelAccuracy"] = quality
    return Case(quality, tmp_path_factory.mktemp("case"))


@pytest.mark.slow
@pytest.mark.parametrize("rule", QUALITY_RULES)
def test_the_contract_of_qualities(rule, case, tmp_path):
    assert len(QUALITY_RULES) > 7
    test = getattr(QUALITY_CONTRACT, rule)
    test(case, tmp_path) if "tmp_path" in inspect.signature(test).parameters else test(case)


@pytest.mark.slow
def test_the_quality_goes_through_step_b_a_gate_and_the_report(quality, tmp_path):
    key = yaml.safe_load(QUALITY["yaml"])["MODEL"]["ECO"]["QUALITY"]
    QUALITY_CONTRACT.check_whole_way(key, quality, tmp_path)
    rows = frontier(*[DerivedDataset.load(tmp_path / "run" / "derived" / "val")] * 2, [1e-6], [6])
    assert [list(row.exact) for row in rows] == [["accuracy"]] * 8
