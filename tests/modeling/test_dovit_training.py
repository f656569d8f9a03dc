"""Training of a DoViT, and distillation."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.utils.events import EventStorage
from dovit_models import STOP, drawn_rule, mini_model, mini_vit, photos, stopping_model

from eco_m2f.checkpoint.safe_load import CheckpointError
from eco_m2f.engine.train import load_teacher
from eco_m2f.modeling.dovit.dovit import AuxiliaryRule, annealed, distillation_losses, pixel_loss


def test_threshold_falls_on_a_straight_line():
    values = [annealed(0.9, i, 11) for i in range(11)]
    assert values[0] == 1 and values[-1] == pytest.approx(0.9)
    assert [a - b for a, b in zip(values, values[1:])] == pytest.approx([0.01] * 10)
    assert annealed(0.9, 50, 11) == pytest.approx(0.9) and annealed(0.9, 0, 1) == 1


def labelled(*sizes, ignore=255):
    generator = torch.Generator().manual_seed(5)
    for x in (batch := photos(*sizes)):
        x["sem_seg"] = torch.randint(0, 5, x["image"].shape[1:], generator=generator)
        x["sem_seg"][:4] = ignore
    return batch


def losses_at(model, iteration, batch=None) -> tuple[dict, EventStorage]:
    with EventStorage(iteration) as storage:
        return model.train()(batch or labelled((32, 48), (30, 41))), storage


def test_training_anneals_what_stops_tokens():
    model = stopping_model()
    first, storage = losses_at(model, 0)
    told = {name: value for name, (value, _) in storage.latest().items()}
    assert told == {"threshold": 1.0, "kept@1": 100.0, "kept@2": 100.0}
    last, storage = losses_at(model, 10)
    told = {name: value for name, (value, _) in storage.latest().items()}
    assert told["threshold"] == pytest.approx(STOP) and 100 > told["kept@1"] > told["kept@2"] > 0
    assert set(first) == set(last) == {"loss_ce", "loss_aux_0", "loss_aux_1"}
    assert first["loss_ce"] != last["loss_ce"] and first["loss_aux_0"] == last["loss_aux_0"]


def test_losses_are_the_weighted_cross_entropies_of_the_full_maps():
    """Void and padding count nowhere."""
    model, batch = stopping_model(), labelled((32, 48), (30, 41))
    found, _ = losses_at(model.requires_grad_(False), 10, batch)
    images = torch.zeros(2, 3, 32, 48)
    targets = torch.full((2, 32, 48), 255)
    for i, x in enumerate(batch):
        h, w = x["sem_seg"].shape
        images[i, :, :h, :w] = (x["image"] - model.pixel_mean) / model.pixel_std
        targets[i, :h, :w] = x["sem_seg"]
    rule = AuxiliaryRule(model.auxiliary_heads, STOP)
    features, _ = model.backbone(images, rule)
    wanted = {"loss_ce": (1.0, model.head(features)), "loss_aux_0": (0.4, rule.logits[0])}
    wanted["loss_aux_1"] = (0.4, rule.logits[1])
    for name, (weight, logits) in wanted.items():
        full = F.interpolate(logits, (32, 48), mode="bilinear")
        torch.testing.assert_close(found[name], weight * F.cross_entropy(full, targets, ignore_index=255), msg=name)


def test_a_batch_of_void_costs_nothing():
    logits = torch.randn(1, 5, 2, 2, requires_grad=True)
    loss = pixel_loss(logits, torch.full((1, 8, 8), 255), 255)
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_every_parameter_learns_from_a_step_in_which_tokens_stop():
    losses, _ = losses_at(model := stopping_model(), 10)
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert [n for n, p in model.named_parameters() if not p.grad.any()] == []


@pytest.mark.parametrize("number", [1, 2])
def test_gradients_are_laid_out_as_their_parameters(number):
    """Else DistributedDataParallel warns, and copies them in each step."""
    losses, _ = losses_at(model := stopping_model(), 10, labelled(*[(32, 48)] * number))
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad.stride() != p.stride()] == []


def test_stopped_tokens_pass_gradients_from_where_they_stopped():
    """The loss at a token that stopped at the first point reaches only the layers before it."""
    vit = mini_vit()
    images = torch.randn(1, 3, 32, 32)
    stop = drawn_rule()
    found, passed = vit(images, stop)
    found.movedim(1, -1)[~passed[0]].sum().backward()
    assert vit.blocks[0].mlp.fc1.weight.grad.any() and vit.patch_embed.proj.weight.grad.any()
    for block in vit.blocks[1:]:
        assert not block.mlp.fc1.weight.grad.any()


def test_missing_class_maps_are_told():
    with pytest.raises(ValueError, match="mask_former_semantic"):
        losses_at(mini_model(), 0, photos((32, 32)))


@pytest.fixture
def teacher_file(tmp_path):
    """Weights that differ from the trained model's."""
    state = mini_model().state_dict()
    for name in ("head.project_tokens.weight", "backbone.blocks.2.mlp.fc1.weight"):
        state[name] = state[name] + 0.1 * torch.randn(state[name].shape, generator=torch.Generator().manual_seed(0))
    torch.save({"model": state}, tmp_path / "teacher.pth")
    return tmp_path / "teacher.pth"


def test_distillation_by_hand(teacher_file):
    model, teacher = stopping_model(), mini_model()
    teacher.load_state_dict(torch.load(teacher_file)["model"])
    load_teacher(model, str(teacher_file))
    batch = labelled((32, 48))
    found, _ = losses_at(model.requires_grad_(False), 10, batch)
    with torch.no_grad():
        images = model.preprocess(batch).tensor
        features, _ = model.backbone(images, AuxiliaryRule(model.auxiliary_heads, STOP))
        static, _ = teacher.backbone(images)
        p, q = teacher.head(static).softmax(1), model.head(features).softmax(1)
    kl = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(found["loss_kl"], kl, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["loss_features"], 0.5 * (features - static).square().mean())
    plain, _ = losses_at(stopping_model(), 10, batch)
    assert found.keys() - plain.keys() == {"loss_kl", "loss_features"} and kl > 1e-4
    weighted = stopping_model("MODEL.DOVIT.KL_WEIGHT", 3.0, "MODEL.DOVIT.FEATURE_WEIGHT", 0.0)
    load_teacher(weighted, str(teacher_file))
    again, _ = losses_at(weighted, 10, batch)
    torch.testing.assert_close(again["loss_kl"], 3 * found["loss_kl"])
    assert again["loss_features"] == 0


def test_a_model_that_stops_nothing_is_no_distance_from_itself():
    model = mini_model()
    images = torch.randn(1, 3, 32, 32)
    features, _ = model.backbone(images)
    losses = distillation_losses(model, images, features, model.head(features))
    assert losses["loss_kl"].abs() < 1e-6 and losses["loss_features"] == 0


def test_the_teacher_is_neither_trained_nor_saved(teacher_file):
    model = stopping_model()
    names = [n for n, _ in model.named_parameters()], list(model.state_dict())
    load_teacher(model, str(teacher_file))
    assert ([n for n, _ in model.named_parameters()], list(model.state_dict())) == names
    losses, _ = losses_at(model, 10)
    (losses["loss_kl"] + losses["loss_features"]).backward()
    (teacher,) = model._teacher
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    assert model.head.class_embed.grad.any() and model.backbone.blocks[0].mlp.fc1.weight.grad.any()


def test_a_teacher_must_fit(tmp_path):
    torch.save({"model": {"backbone.cls_token": torch.zeros(1, 1, 24)}}, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_teacher(mini_model(), str(tmp_path / "part.pth"))
