"""Configs and steps for the tests of the engine."""

from minis import CONFIGS, ECO, MINI

from eco_m2f.engine.optimizer import autocast, build_optimizer
from eco_m2f.engine.setup import load_cfg
from eco_m2f.engine.step import Step


def load(*opts, config: str = ECO):
    return load_cfg(str(CONFIGS / config), [*MINI, *opts])


def make_step(model, batches, *opts, accumulation_steps: int = 1) -> Step:
    cfg = load(*opts)
    return Step(
        model.train(),
        batches,
        build_optimizer(cfg, model),
        precision=autocast(cfg, "cpu", cfg.SOLVER.AMP.ENABLED),
        accumulation_steps=accumulation_steps,
    )
