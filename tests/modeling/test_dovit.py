"""DoViT: its rules of stopping against slow references, the plain ViT against timm's, losses, heads and costs."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage
from minis import CONFIGS, build, fill
from torch import nn

from eco_m2f.checkpoint.fits import architecture
from eco_m2f.checkpoint.safe_load import CheckpointError
from eco_m2f.costs import TokenCosts
from eco_m2f.engine.train import load_teacher
from eco_m2f.evaluation.token_statistics import TokenStatistics
from eco_m2f.modeling.dovit.dovit import AuxiliaryRule, annealed, distillation_losses, pixel_loss
from eco_m2f.modeling.dovit.heads import MaskTransformerHead, NaiveHead
from eco_m2f.modeling.dovit.vit import Block, TokenPassViT, resized_positions, run_kept, summarise

CONFIG = "toy/dovit_toy.yaml"
MINI = [
    *("MODEL.DEVICE", "cpu", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5, "MODEL.DOVIT.HEAD_DIM", 12),
    *("MODEL.DOVIT.EMBED_DIM", 24, "MODEL.DOVIT.DEPTH", 4, "MODEL.DOVIT.PRETRAIN_IMG_SIZE", 32),
    *("MODEL.DOVIT.DECISION_LAYERS", [1, 3], "SOLVER.MAX_ITER", 11),
]

STOP = 0.6  # a threshold at which tokens of the mini model stop at both points, in numbers that differ by image


def mini_model(*opts):
    return fill(build(CONFIG, *MINI, *opts, mini=False))


def mini_vit(depth=4, decisions=(1, 3), side=32) -> TokenPassViT:
    vit = TokenPassViT(patch_size=8, dim=24, depth=depth, num_heads=3, image_size=side, decision_layers=decisions)
    return fill(vit).eval()


def photos(*sizes) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    return [
        {"image": torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8), "height": 40, "width": 50}
        for size in sizes
    ]


def drawn_rule(seed=0, share=0.4):
    """Stops random tokens, and records its inputs and its decisions."""
    generator, seen, said = torch.Generator().manual_seed(seed), [], []

    def stop(point, features):
        seen.append(features)
        said.append(torch.rand(features[:, 0].shape, generator=generator) < share)
        return said[-1]

    stop.seen, stop.said = seen, said
    return stop


# --- the plain transformer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
@torch.no_grad()
def test_without_a_rule_it_is_timms_vit(size):
    """Also with a resized position code."""
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}
    theirs = timm.models.VisionTransformer(**shape, num_classes=0, dynamic_img_size=True).eval()
    ours = mini_vit()
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = theirs.forward_features(x)[:, 1:].transpose(1, 2).unflatten(2, (size[0] // 8, size[1] // 8))
    found, passed = ours(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert passed == []


def test_positions_of_the_own_size_are_untouched_and_the_cls_tokens_always():
    positions = torch.randn(1, 17, 6)
    assert resized_positions(positions, 4, 4) is positions
    resized = resized_positions(positions, 2, 8)
    assert resized.shape == (1, 17, 6) and torch.equal(resized[:, 0], positions[:, 0])
    assert not torch.equal(resized, positions)  # as many tokens, but another shape


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 30}, "PATCH_SIZE 8 must divide PRETRAIN_IMG_SIZE 30"),
        ({"num_heads": 5}, "NUM_HEADS 5 must divide EMBED_DIM 24"),
        ({"decision_layers": [2, 1]}, r"DECISION_LAYERS \[2, 1\] must ascend, above 0 and below DEPTH 4"),
        ({"decision_layers": [0, 1]}, r"DECISION_LAYERS \[0, 1\]"),
        ({"decision_layers": [2, 4]}, r"DECISION_LAYERS \[2, 4\]"),
    ],
)
def test_impossible_shapes_are_told(options, message):
    good = {"patch_size": 8, "dim": 24, "depth": 4, "num_heads": 3, "image_size": 32, "decision_layers": [1, 3]}
    with pytest.raises(ValueError, match=message):
        TokenPassViT(**{**good, **options})


# --- the rules of stopping -------------------------------------------------------------------------------------------


def masked_layer(block: Block, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """A layer over all tokens [n, C] of one image. Tokens that are not kept are masked as keys, and not updated."""
    q, k, v = block.attn.qkv(block.norm1(x)).view(len(x), 3, block.attn.num_heads, -1).permute(1, 2, 0, 3)
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~kept, -math.inf).softmax(-1)
    y = x + block.attn.proj((weights @ v).transpose(0, 1).flatten(1))
    y = y + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(y))))
    return torch.where(kept[:, None], y, x)


def slow_vit(vit: TokenPassViT, image: torch.Tensor, said: list[torch.Tensor]) -> torch.Tensor:
    """The last map [C, h, w] of one image [3, H, W]; decisions stop tokens by masks."""
    x = vit.embed(image[None])[0]
    kept = torch.ones(len(x), dtype=torch.bool)
    for i, block in enumerate(vit.blocks):
        if i in (1, 3):
            kept[1:] &= ~said[(1, 3).index(i)].flatten()
            stopped = x[~kept]
            if len(stopped) > 0.1 * (len(x) - 1):
                x = torch.cat(((x[:1] + stopped.mean(0, keepdim=True)) / 2, x[1:]))
        x = masked_layer(block, x, kept)
    return vit.norm(x)[1:].T.unflatten(1, said[0].shape)


@torch.no_grad()
def test_stopping_is_what_masks_would_do():
    """Packed tokens of a batch, whose images keep different numbers, against masks over all tokens of each image."""
    vit, stop = mini_vit(), drawn_rule()
    images = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    found, passed = vit(images, stop)
    assert len({int(n) for n in passed[0].flatten(1).sum(1)}) > 1
    for i in range(3):
        expected = slow_vit(vit, images[i], [said[i] for said in stop.said])
        torch.testing.assert_close(found[i], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_token_that_has_stopped_never_goes_on():
    _, passed = mini_vit(decisions=(1, 2, 3))(torch.randn(2, 3, 32, 32), stop := drawn_rule(share=0.3))
    kept = torch.ones_like(passed[0])
    for after, said in zip(passed, stop.said, strict=True):
        kept &= ~said
        assert torch.equal(after, kept)
    assert (stop.said[0] & ~stop.said[1]).any()  # the second decision alone would restart some stopped tokens


@torch.no_grad()
def test_stopped_tokens_keep_their_value_and_the_map_is_restored():
    """Heads and later decisions get full maps, with each token in its place."""
    vit, stop = mini_vit(), drawn_rule()
    found, passed = vit(torch.randn(2, 3, 32, 48), stop)
    at_first, at_second = (vit.norm(m.movedim(1, -1)) for m in stop.seen)  # [B, h, w, C]
    last = found.movedim(1, -1)
    assert found.shape == (2, 24, 4, 6) and stop.seen[1].shape == (2, 24, 4, 6)
    first, second = ~passed[0], ~passed[1] & passed[0]
    assert torch.equal(at_second[first], at_first[first]) and torch.equal(last[first], at_first[first])
    assert torch.equal(last[second], at_second[second]) and second.any()
    assert (last[passed[1]] != at_second[passed[1]]).any(dim=-1).all()


@torch.no_grad()
def test_the_cls_token_goes_on_alone_where_all_others_have_stopped():
    blocks, tokens = mini_vit().blocks, torch.randn(2, 7, 24)
    kept = torch.tensor([[False] * 6, [True, False] * 3])
    found = run_kept(blocks, tokens, kept)
    alone = tokens[0, :1]
    for block in blocks:
        alone = masked_layer(block, alone, torch.tensor([True]))
    torch.testing.assert_close(found[0, :1], alone, atol=1e-5, rtol=1e-5)
    assert torch.equal(found[0, 1:], tokens[0, 1:]) and torch.equal(found[1, 2::2], tokens[1, 2::2])
    assert not torch.equal(found[1, 0], tokens[1, 0])


def test_cls_takes_the_mean_of_the_stopped_in_beyond_a_tenth():
    tokens = torch.randn(3, 21, 4)
    kept = torch.ones(3, 20, dtype=torch.bool)
    kept[0, [3, 8]] = False  # exactly a tenth
    kept[1, [3, 8, 9]] = False
    found = summarise(tokens, kept)
    expected = tokens.clone()
    expected[1, 0] = (tokens[1, 0] + (tokens[1, 4] + tokens[1, 9] + tokens[1, 10]) / 3) / 2
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[[0, 2]], tokens[[0, 2]])


def test_the_rule_stops_what_its_head_is_surer_of_than_the_threshold():
    logits = torch.zeros(1, 2, 1, 3)
    logits[0, 1] = torch.tensor([math.log(9.0), math.log(9.2), -math.log(9.2)])  # 0.9, more, more of the other class
    rule = AuxiliaryRule([nn.Identity(), lambda x: 2 * x], 0.901)
    assert rule(0, logits).tolist() == [[[False, True, True]]]
    assert rule(1, logits).all()  # each decision point has its own head
    assert len(rule.logits) == 2 and rule.logits[0] is logits
    certain = torch.tensor([1000.0, 0.0]).view(1, 2, 1, 1)
    assert not AuxiliaryRule([nn.Identity()], 1.0)(0, certain).any()  # a probability of exactly 1 does not exceed 1


@torch.no_grad()
def test_threshold_one_is_the_static_model_exactly():
    """Bit for bit, with decisions and without them."""
    model, inputs = mini_model("MODEL.DOVIT.THRESHOLD", 1.0), photos((32, 48), (32, 48))
    images = model.preprocess(inputs).tensor
    static, _ = model.backbone(images)
    deciding, passed = model.backbone(images, AuxiliaryRule(model.auxiliary_heads, 1.0))
    assert torch.equal(static, deciding) and all(p.all() for p in passed)
    results = model(inputs)
    logits = F.interpolate(model.head(static), (32, 48), mode="bilinear")
    expected = F.interpolate(logits, (40, 50), mode="bilinear")
    for i, (x, r) in enumerate(zip(inputs, results)):
        assert torch.equal(r["sem_seg"], expected[i])
        assert r["tokens"]["kept"] == [1.0, 1.0]
        tokens = TokenStatistics(TokenCosts.of(model)).row(x, r)
        assert tokens["gflops"] == tokens["static_gflops"]


def stopping_model(*opts):
    return mini_model("MODEL.DOVIT.THRESHOLD", STOP, *opts)


@pytest.mark.parametrize("head", ["MaskTransformerHead", "NaiveHead"])
@torch.no_grad()
def test_a_batch_gives_what_its_images_give_alone(head):
    """The images of a batch have different sizes and keep different numbers of tokens."""
    model = stopping_model("MODEL.SEM_SEG_HEAD.NAME", head)
    inputs = photos((32, 48), (30, 41), (20, 56), (32, 48))
    together = model(inputs)
    kept = [r["tokens"]["kept"] for r in together]
    assert kept[0] != kept[3] and all(1 > k[0] > k[1] > 0 for k in kept)
    for x, result in zip(inputs, together, strict=True):
        (alone,) = model([x])
        assert alone["tokens"] == result["tokens"]
        assert result["sem_seg"].shape == (5, 40, 50)
        torch.testing.assert_close(result["sem_seg"], alone["sem_seg"], atol=1e-5, rtol=1e-5)


# --- training --------------------------------------------------------------------------------------------------------


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


# --- distillation ----------------------------------------------------------------------------------------------------


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


# --- heads -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_naive_head_by_hand():
    head = fill(NaiveHead({"tokens": ShapeSpec(channels=6)}, num_classes=3, hidden=4, norm="BN")).eval()
    x = torch.randn(2, 6, 3, 5)
    norm = head.norm
    hidden = torch.einsum("oc,bchw->bohw", head.conv.weight[..., 0, 0], x).movedim(1, -1)
    hidden = (hidden - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    expected = hidden.relu() @ head.classifier.weight[..., 0, 0].T + head.classifier.bias
    torch.testing.assert_close(head(x), expected.movedim(-1, 1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_mask_transformer_by_hand():
    """Image by image, with plain layers over tokens and classes."""
    shape = {"tokens": ShapeSpec(channels=12)}
    head = fill(MaskTransformerHead(shape, num_classes=3, num_heads=2, num_layers=2)).eval()
    x = torch.randn(2, 12, 4, 5)
    logits = head(x)
    for i in range(2):
        tokens = torch.stack([head.project(x[i, :, r, c]) for r in range(4) for c in range(5)])
        all_tokens = torch.cat((tokens, head.class_embed[0]))
        for block in head.blocks:
            all_tokens = masked_layer(block, all_tokens, torch.ones(23, dtype=torch.bool))
        all_tokens = head.norm(all_tokens)
        for n, (r, c) in enumerate((r, c) for r in range(4) for c in range(5)):
            a = head.project_tokens(all_tokens[n])
            cosines = [F.cosine_similarity(a, head.project_classes(all_tokens[20 + k]), dim=0) for k in range(3)]
            expected = head.mask_norm(torch.stack(cosines))
            torch.testing.assert_close(logits[i, :, r, c], expected, atol=1e-4, rtol=1e-4)


# --- costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["MaskTransformerHead", "NaiveHead"])
def test_costs_of_an_image_by_hand(head):
    model = stopping_model("MODEL.SEM_SEG_HEAD.NAME", head)
    with torch.no_grad():
        (result,) = model(photos((30, 41)))
    told = TokenStatistics(TokenCosts.of(model)).row(photos((30, 41))[0], result)
    tokens, dim, classes, hidden = 24, 24, 5, 12
    layer = lambda n: 12 * n * dim**2 + 2 * n * n * dim + 10 * n * dim  # noqa: E731
    naive = tokens * (dim * hidden + 2 * hidden + hidden * classes)
    n = tokens + classes
    mask = tokens * dim**2 + 2 * layer(n) + 5 * n * dim + (tokens + classes) * dim**2 + tokens * classes * dim
    mask += 5 * tokens * classes
    around = tokens * dim * 3 * 64 + 5 * (tokens + 1) * dim + {"NaiveHead": naive, "MaskTransformerHead": mask}[head]
    around += 4 * classes * (32 * 48 + 40 * 50)
    counts = [tokens, *(round(share * tokens) for share in result["tokens"]["kept"])]
    layers = sum(number * layer(1 + n) for number, n in zip((1, 2, 1), counts))
    assert told["gflops"] == pytest.approx((around + layers + 2 * naive) / 1e9, rel=1e-9)
    assert told["static_gflops"] == pytest.approx((around + 4 * layer(1 + tokens)) / 1e9, rel=1e-9)
    assert told["threshold"] == STOP


# --- config, optimizer and checkpoints -------------------------------------------------------------------------------


def test_config_mistakes_are_told_at_build_time():
    for opts, message in (
        (("MODEL.MASK_FORMER.TEST.PANOPTIC_ON", True), "PANOPTIC_ON and INSTANCE_ON to False"),
        (("MODEL.MASK_FORMER.TEST.SEMANTIC_ON", False), "set SEMANTIC_ON to True"),
        (("MODEL.DOVIT.THRESHOLD", 0.0), "THRESHOLD 0.0 is no probability"),
        (("MODEL.DOVIT.THRESHOLD", 1.5), "THRESHOLD 1.5 is no probability"),
    ):
        with pytest.raises(ValueError, match=message):
            mini_model(*opts)


def test_position_code_and_cls_token_do_not_decay():
    from eco_m2f.engine.optimizer import parameter_groups
    from eco_m2f.engine.setup import load_cfg

    cfg = load_cfg(str(CONFIGS / CONFIG), [*MINI, "SOLVER.BACKBONE_MULTIPLIER", 0.1, "SOLVER.BASE_LR", 1.0])
    model = mini_model()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(cfg, model)
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found.keys() == set(names.values())
    assert found["backbone.pos_embed"] == found["backbone.cls_token"] == found["backbone.norm.weight"] == (0.1, 0.0)
    assert found["backbone.blocks.0.attn.qkv.weight"] == (0.1, 0.05) and found["head.project.weight"] == (1.0, 0.05)


def test_a_checkpoint_tells_that_it_is_a_vit():
    assert architecture(mini_model().state_dict()) == {"backbone": "ViT", "backbone width": 24, "backbone blocks": 4}


@torch.no_grad()
def test_timms_weights_load_through_the_converter(tmp_path):
    """A whole ViT-Ti's weights load into the backbone, by their names."""
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    import convert_timm

    from eco_m2f.checkpoint.checkpointer import Checkpointer

    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224").eval()
    torch.save(source.state_dict(), tmp_path / "source.pth")
    line = convert_timm.convert("vit_tiny_patch16_224", tmp_path / "weights.pkl", str(tmp_path / "source.pth"))
    assert "PIXEL_MEAN [127.5, 127.5, 127.5]" in line
    tiny = ["MODEL.DOVIT.PATCH_SIZE", 16, "MODEL.DOVIT.EMBED_DIM", 192, "MODEL.DOVIT.DEPTH", 12]
    tiny += ["MODEL.DOVIT.PRETRAIN_IMG_SIZE", 224]
    model = build(CONFIG, *tiny, mini=False)
    head = {k: v.clone() for k, v in model.head.state_dict().items()}
    Checkpointer(model).load(str(tmp_path / "weights.pkl"))
    x = torch.randn(1, 3, 224, 224)
    expected = source.forward_features(x)[:, 1:].transpose(1, 2).unflatten(2, (14, 14))
    torch.testing.assert_close(model.backbone(x)[0], expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(v, head[k]) for k, v in model.head.state_dict().items())
