"""docs/ADDING.md: its encoder, taken through the contract, through an ECO model, and through Steps A, B and C."""

import importlib.util
import inspect
import re

import pytest
import torch
from minis import CONFIGS, ECO, PARENT, ROOT, build, make_batch

from eco_m2f.costs import ExitCosts
from eco_m2f.derived.dataset import DerivedDataset
from eco_m2f.gates.gate import Gate
from eco_m2f.modeling.encoders import TRANSFORMER_ENCODER_REGISTRY
from eco_m2f.policies.fixed import FixedExit

BLOCKS = dict(re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "docs/ADDING.md").read_text(), re.MULTILINE | re.DOTALL))


def other_tests(path: str):
    """Another module of tests/, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"adding_{path.replace('/', '_')}", ROOT / "tests" / f"{path}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONTRACT = other_tests("modeling/test_encoders")
RULES = [
    name
    for name, rule in vars(CONTRACT).items()
    if name.startswith("test_") and list(inspect.signature(rule).parameters) == ["encoder"]
]


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
