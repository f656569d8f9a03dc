"""The optimizer: parameter groups, gradient clipping, schedules."""

import math

import pytest
import torch
from engine_steps import load
from torch import nn

from eco_m2f.engine.optimizer import build_optimizer, gradient_clipper
from eco_m2f.engine.train import Trainer


def clipped(kind: str, limit: float, norm_type: float = 2.0) -> list[torch.Tensor]:
    """Gradients (3, 4) and (12) after clipping."""
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, -4.0]), torch.tensor([12.0])
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    optimizer.register_step_pre_hook(gradient_clipper(kind, limit, norm_type))
    optimizer.step()
    return [-p.detach() for p in parameters]


def test_full_model_clipping_scales_all_alike():
    a, b = clipped("full_model", 1.3)
    torch.testing.assert_close(a, torch.tensor([0.3, -0.4]))
    torch.testing.assert_close(b, torch.tensor([1.2]))


def test_clipping_by_each_parameters_norm():
    a, b = clipped("norm", 1.0)
    torch.testing.assert_close(a, torch.tensor([0.6, -0.8]))
    torch.testing.assert_close(b, torch.tensor([1.0]))
    a, _ = clipped("norm", 2.0, norm_type=math.inf)
    torch.testing.assert_close(a, torch.tensor([1.5, -2.0]))


def test_clipping_by_value():
    a, b = clipped("value", 3.5)
    torch.testing.assert_close(a, torch.tensor([3.0, -3.5]))
    torch.testing.assert_close(b, torch.tensor([3.5]))


def test_small_gradients_are_left_alone():
    for kind in ("full_model", "norm", "value"):
        assert [p.tolist() for p in clipped(kind, 100.0)] == [[3.0, -4.0], [12.0]]


def test_clipping_is_on_as_the_config_says():
    model = nn.Linear(2, 2)
    for enabled, largest in ((True, 0.01), (False, 100.0)):
        cfg = load("SOLVER.CLIP_GRADIENTS.ENABLED", enabled, "SOLVER.OPTIMIZER", "SGD", "SOLVER.MOMENTUM", 0.0)
        optimizer = build_optimizer(cfg, model)
        for p in model.parameters():
            p.grad = torch.full_like(p, 100.0)
        optimizer.step()
        assert max(p.grad.abs().max().item() for p in model.parameters()) <= largest


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("SOLVER.OPTIMIZER", "LION", "'LION'.*ADAMW.*SGD"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "median", "'median'.*full_model, norm or value"),
    ],
)
def test_unknown_kinds_are_refused(option, value, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(load(option, value), nn.Linear(1, 1))


def learning_rates(*opts) -> list[float]:
    """The rates of 10 iterations, for one parameter with initial rate 1."""
    cfg = load("SOLVER.BASE_LR", 1.0, "SOLVER.MAX_ITER", 10, *opts)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = Trainer.build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_poly_schedule_is_cityscapes():
    opts = ("SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.WARMUP_ITERS", 0, "SOLVER.POLY_LR_POWER", 0.9)
    assert learning_rates(*opts) == pytest.approx([(1 - i / 10) ** 0.9 for i in range(10)])
    ending = learning_rates(*opts, "SOLVER.POLY_LR_CONSTANT_ENDING", 0.3)
    assert ending[0] == 1 and ending[-1] == ending[-2] == pytest.approx(0.3)


def test_multistep_schedule_is_cocos():
    opts = ("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", (4, 8), "SOLVER.WARMUP_FACTOR", 1.0)
    assert learning_rates(*opts, "SOLVER.WARMUP_ITERS", 2) == pytest.approx([1] * 4 + [0.1] * 4 + [0.01] * 2)


def test_cosine_schedule_with_warmup():
    opts = ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.WARMUP_ITERS", 2, "SOLVER.WARMUP_FACTOR", 0.1)
    rates = learning_rates(*opts)
    assert rates[0] == pytest.approx(0.1) and rates[0] < rates[1] < rates[2]
    assert rates[2:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(2, 10)])
