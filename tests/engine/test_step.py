"""One optimizer step: gradient accumulation, and losses that must be finite."""

import pytest
import torch
from engine_steps import make_step
from minis import ECO, build, fill, make_batch
from torch import nn

from eco_m2f.engine.setup import load_cfg, warn_of_keys_without_effect
from eco_m2f.engine.train import Trainer


@pytest.fixture
def same_points(monkeypatch):
    """The same random points for every mask and image, so that a batch can be compared with its parts."""

    original = torch.rand

    def rand(n, count, two, device=None, dtype=None):
        generator = torch.Generator().manual_seed(count)
        return original((1, count, two), generator=generator, dtype=dtype).expand(n, count, two)

    monkeypatch.setattr(torch, "rand", rand)


def gradients(batches, accumulation_steps: int = 1) -> dict[str, torch.Tensor]:
    model = fill(build(ECO))
    step = make_step(
        model, batches, "SOLVER.CLIP_GRADIENTS.ENABLED", False, "SOLVER.AMP.ENABLED", False,
        accumulation_steps=accumulation_steps,
    )  # fmt: skip
    step.train(0, 1)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict, wanted: dict) -> None:
    """Float32 sums in another order. A few gradients are only the noise of such sums."""
    largest = max(v.norm().item() for v in wanted.values())
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= 2e-3 * value.norm() + 1e-6 * largest, name


def test_accumulated_batches_of_equally_many_masks_are_one_batch(same_points):
    """The documented behaviour: with unequal numbers each batch is divided by its own."""
    a, b = make_batch(sizes=((64, 96), (64, 96)))
    whole = gradients([[a, b]])
    parts = gradients([[a], [b]], accumulation_steps=2)
    assert whole.keys() == parts.keys()
    assert_close(parts, whole)


def test_accumulated_gradients_are_the_mean_of_the_batches(same_points):
    a, b = make_batch(sizes=((64, 96), (32, 64)))
    b["instances"] = b["instances"][:1]
    parts = gradients([[a], [b]], accumulation_steps=2)
    each = [gradients([[x]]) for x in (a, b)]
    assert_close(parts, {name: (each[0][name] + each[1][name]) / 2 for name in parts})


def test_accumulated_losses_are_reported_as_their_mean():
    class Model(nn.Linear):
        def forward(self, batch):
            return {"loss": super().forward(torch.tensor(batch)).sum() * 0 + batch[0][0]}

    step = make_step(Model(1, 1), [[[1.0]], [[4.0]], [[7.0]]], accumulation_steps=3)
    step.train(0, 1)
    assert step.storage.latest()["total_loss"][0] == pytest.approx(4.0)


def test_a_training_splits_its_batch_and_tells_how(tiny, caplog):
    options = ["SOLVER.IMS_PER_BATCH", 6, "SOLVER.IMS_PER_GPU", 2, "OUTPUT_DIR", str(tiny.base / "split")]
    with caplog.at_level("INFO", "eco_m2f"):
        step = Trainer(load_cfg(tiny.config(), options))._trainer
    assert step.accumulation_steps == 3 and len(next(iter(step.data_loader))) == 2
    assert caplog.messages.count(
        "6 images an optimizer step: processes 1, images per process and pass 2, passes per step 3"
    ) == 1  # fmt: skip
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_GPU is 4, .* 6 images .*: set it to 3 or 6, or to 0"):
        Trainer(load_cfg(tiny.config(), [*options, "SOLVER.IMS_PER_GPU", 4]))


def test_a_reference_number_of_gpus_changes_no_schedule(tiny, caplog):
    """detectron2 would scale batch, rate and iterations by it. Here IMS_PER_GPU is for any number of GPUs."""
    options = ["SOLVER.REFERENCE_WORLD_SIZE", 8, "OUTPUT_DIR", str(tiny.base / "reference")]
    cfg = load_cfg(tiny.config(), options)
    warn_of_keys_without_effect(cfg)
    assert "SOLVER.REFERENCE_WORLD_SIZE is 8, which has no effect" in caplog.text
    assert Trainer(cfg).cfg == cfg and cfg.SOLVER.IMS_PER_BATCH == 2


def test_no_accumulation_steps_are_refused():
    with pytest.raises(ValueError, match="accumulation_steps must be at least 1, got 0"):
        make_step(nn.Linear(1, 1), [], accumulation_steps=0)
