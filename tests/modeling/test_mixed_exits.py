"""Batches whose images leave at different exits."""

import copy
import re

import pytest
import torch
from early_exit_systems import (
    SIZES,
    SYSTEMS,
    System,
    assert_all_close,
    each_system,
)
from minis import make_batch

from eco_m2f.checkpoint.parent_hash import parent_sha256
from eco_m2f.costs import ExitCosts, padded_size
from eco_m2f.engine.predict import load_gate
from eco_m2f.evaluation.exit_statistics import ExitStatistics
from eco_m2f.gates.gate import Gate

pytestmark = pytest.mark.slow


@each_system
@torch.no_grad()
def test_mixed_exits_in_one_batch_equal_one_image_at_a_time(system):
    """In float64, where the order of summation in a batch does not matter."""
    eco = copy.deepcopy(system.models()[1]).double()
    chosen = [system.exits[0], system.last, system.exits[1], system.exits[0], system.exits[-2]]
    batch = make_batch(((64, 96), (30, 70), (64, 20), (64, 96), (33, 96)))
    features = eco.extract(eco.preprocess(batch))
    together = eco.predict(features, chosen)
    assert "pred_logits" in together and len(together) == 2
    for i, k in enumerate(chosen):
        alone = eco.predict({n: f[i : i + 1] for n, f in features.items()}, [k])
        assert_all_close({n: together[n][i] for n in together}, {n: alone[n][0] for n in together}, 1e-9)
    first = {n: f[:1] for n, f in features.items()}
    of_exit = [eco.predict(first, [k])["pred_logits"] for k in system.exits]
    assert not any(torch.allclose(a, b) for a, b in zip(of_exit, of_exit[1:]))


@each_system
@torch.no_grad()
def test_exits_of_a_single_image_are_decoded_at_once_as_each_alone(system, monkeypatch):
    eco = copy.deepcopy(system.models()[1]).double()
    features = eco.extract(eco.preprocess(make_batch(SIZES[:1])))
    original, calls = eco.head.decode, []
    monkeypatch.setattr(eco.head, "decode", lambda *a, **kw: calls.append(a) or original(*a, **kw))
    together = eco.head.forward_exits(features, system.exits)
    assert len(calls) == 1
    for k in system.exits:
        assert_all_close(together[k], eco.head.forward_exits(features, [k])[k], 1e-9)
    first, last = (together[k]["pred_logits"] for k in (system.exits[0], system.last))
    assert not torch.allclose(first, last, atol=1e-2)


@each_system
@torch.no_grad()
def test_no_image_runs_a_layer_that_it_does_not_need(system):
    eco = copy.deepcopy(system.models()[1])
    rows = []
    for name, layer in eco.named_modules():
        if re.search(r"transformer\.encoder\.layers\.\d+$", name):
            layer.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    chosen = [system.exits[0], system.exits[1], system.exits[0]]
    eco.predict(eco.extract(eco.preprocess(make_batch(((64, 64),) * 3))), chosen)
    assert sum(rows) == sum(chosen)


@each_system
@torch.no_grad()
def test_results_tell_exit_and_cost(system):
    eco, (first, last) = copy.deepcopy(system.models()[1]), (system.exits[0], system.last)
    eco.exit_policy.forward = lambda features, sizes, image_ids: torch.tensor([first, last])
    results = eco(make_batch(SIZES))
    assert [r["exit"] for r in results] == [first, last]
    assert all(r["sem_seg"].isfinite().all() for r in results if "sem_seg" in r)
    assert results[0].keys() - system.models()[0](make_batch(SIZES))[0].keys() == {"exit"}  # nothing is counted
    table = ExitCosts(eco)
    costs, small = table(SIZES[0], SIZES[0]), table(SIZES[0], SIZES[1])
    for x, result, size, k in zip(make_batch(SIZES), results, SIZES, (first, last)):
        alone = table(padded_size(size, eco.size_divisibility), size)[k]
        assert ExitStatistics(table).row(x, result) == (k, alone["total"], alone["encoder"])
    # results are resized to the image's own size, which boxes are not
    assert (small[last]["total"] < costs[last]["total"]) == ("sem_seg" in results[0])
    for part in ("total", "encoder"):
        values = [costs[k][part] for k in system.exits]
        assert values == sorted(values) and len(set(values)) == len(values)
        if system.layers:
            layer = values[1] - values[0]
            assert values == pytest.approx([values[0] + i * layer for i in range(len(values))])


def sensitive(system: System, tmp_path):
    """A gated model in float64 whose exits depend on small differences of the features."""
    eco = system.twin("MODEL.ECO.POLICY", "LinearGate")
    channels = eco.backbone.output_shape()["res5"].channels
    weight = 10 * torch.randn(len(system.exits), channels, generator=torch.Generator().manual_seed(2))
    path, sha = tmp_path / "gate.pth", parent_sha256(eco.state_dict())
    Gate(weight, torch.zeros(len(system.exits)), system.exits, 0.0, "hard_ce", "res5", sha).save(path)
    load_gate(eco, str(path))
    return eco.double()


@pytest.mark.parametrize("system", [SYSTEMS[name] for name in ("m2f", "detr")], ids=("m2f", "detr"))
@torch.no_grad()
def test_what_an_image_gets_depends_on_the_size_of_its_batch_alone(system, tmp_path):
    """As the guide and early_exits.py say: the other images do not matter, but the padded size does."""
    eco = sensitive(system, tmp_path)
    small, large = make_batch(((30, 70), (64, 96)))
    other = {**large, "image": 255 - large["image"]}
    first, second = eco([small, large])[0], eco([small, other])[0]
    assert first["exit"] == second["exit"]
    assert_all_close(numbers_of(first), numbers_of(second), 1e-9)

    def pooled(batch):
        images = eco.preprocess(batch)
        return eco.pooled_feature(eco.extract(images), images.image_sizes, "res5")

    torch.testing.assert_close(pooled([small, large])[0], pooled([small, other])[0], atol=1e-12, rtol=1e-9)
    assert not torch.allclose(pooled([small, large])[0], pooled([small])[0], atol=1e-6)  # padding reaches the features
    blank = {**small, "image": torch.zeros(3, 30, 70, dtype=torch.uint8)}
    for alone, mate in ((small, blank), (large, {**other, "image": other["image"][:, :40, :90]})):
        together = eco([alone, mate])[0]  # padded as each would be alone
        assert together["exit"] == eco([alone])[0]["exit"]
        assert_all_close(numbers_of(together), numbers_of(eco([alone])[0]), 1e-9)


def numbers_of(result: dict) -> dict:
    found = {"scores": result["instances"].scores, "boxes": result["instances"].pred_boxes.tensor}
    return {**found, "sem_seg": result["sem_seg"]} if "sem_seg" in result else found
