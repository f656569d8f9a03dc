"""Matcher costs and losses against numbers recorded with the reference implementation."""

import numpy as np
import pytest
import torch
from minis import PARENT, build
from scipy.optimize import linear_sum_assignment

from eco_m2f.modeling.mask2former.criterion import SetCriterion, dice_loss, focal_loss, mask_loss, uncertain_points
from eco_m2f.modeling.mask2former.matcher import (
    HungarianMatcher,
    class_cost,
    pairwise_dice_cost,
    pairwise_focal_cost,
    pairwise_mask_cost,
    point_sample,
)


@pytest.fixture(scope="module")
def recorded(assets):
    data = {k: torch.from_numpy(v) for k, v in np.load(assets / "criterion.npz").items()}
    for i in (0, 1):
        size = data["mask_size"].tolist()
        count = size[0] * size[1]
        bits = np.unpackbits(data[f"target{i}.bits"].numpy(), axis=1)[:, :count]
        data[f"target{i}.masks"] = torch.from_numpy(bits).reshape(-1, *size).bool()
    return data


def make_criterion(num_points=256, cost=pairwise_mask_cost, loss=mask_loss, num_aux=0):
    matcher = HungarianMatcher(2.0, 5.0, 5.0, num_points, cost)
    weights = {"loss_ce": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    return SetCriterion(
        7,
        matcher=matcher,
        weights=weights,
        no_object_weight=0.1,
        num_points=num_points,
        oversample_ratio=3.0,
        importance_sample_ratio=0.75,
        num_aux=num_aux,
        mask_loss=loss,
    )


@pytest.mark.parametrize("i", [0, 1])
def test_costs_and_losses_at_given_points(recorded, i):
    logits = point_sample(recorded["pred_masks"][i][None], recorded["points"])[0]
    targets = point_sample(recorded[f"target{i}.masks"][None].float(), recorded["points"])[0]
    labels = recorded[f"target{i}.labels"]
    close = lambda a, b: torch.testing.assert_close(a, recorded[b], atol=1e-5, rtol=1e-5)  # noqa: E731
    close(pairwise_mask_cost(logits, targets), f"cost{i}.mask")
    close(pairwise_dice_cost(logits, targets), f"cost{i}.dice")
    close(class_cost(recorded["pred_logits"][i], labels), f"cost{i}.class")
    matched = logits[: len(targets)]
    close(mask_loss(matched, targets, len(targets)), f"loss{i}.mask")
    close(dice_loss(matched, targets, len(targets)), f"loss{i}.dice")
    outputs = [recorded["pred_logits"][i]] * 2, [recorded["pred_masks"][i]] * 2
    points = recorded["points"].expand(2, -1, -1)
    whole = HungarianMatcher(2.0, 5.0, 5.0, 1).cost(*outputs, labels, recorded[f"target{i}.masks"], points)
    parts = 2 * recorded[f"cost{i}.class"] + 5 * recorded[f"cost{i}.mask"] + 5 * recorded[f"cost{i}.dice"]
    torch.testing.assert_close(whole, parts.expand(2, -1, -1), atol=1e-4, rtol=1e-5)


def test_the_whole_criterion_has_the_recorded_means(recorded):
    """Points are random, so the means over seeds must agree within 4 standard errors of the two samples."""
    criterion, seeds, recorded_seeds = make_criterion(), 60, 300
    pred = {"pred_logits": recorded["pred_logits"], "pred_masks": recorded["pred_masks"]}
    targets = [{"labels": recorded[f"target{i}.labels"], "masks": recorded[f"target{i}.masks"]} for i in (0, 1)]
    samples = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        for name, loss in criterion(pred, targets, 8).items():
            samples.setdefault(name, []).append(loss.item())
    for name, values in samples.items():
        mean, std = recorded[f"mean.{name}"].item(), recorded[f"std.{name}"].item()
        assert abs(np.mean(values) - mean) <= 4 * std * (1 / seeds + 1 / recorded_seeds) ** 0.5, name


def test_focal_loss_by_its_definition_and_as_a_cost_of_pairs():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 50) * 3, torch.rand(2, 50) < 0.3
    costs = pairwise_focal_cost(logits, targets.float())
    for q, x in enumerate(logits):
        for g, target in enumerate(targets):
            p = torch.where(target, x.sigmoid(), 1 - x.sigmoid())  # of the target
            alpha = torch.where(target, 0.25, 0.75)
            wanted = (-alpha * (1 - p) ** 2 * p.log()).mean()
            torch.testing.assert_close(costs[q, g], wanted, atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(focal_loss(x[None], target[None].float(), 1), wanted, atol=1e-6, rtol=1e-4)
    assert focal_loss(logits, targets.float()[[0, 1, 1]], 2) == focal_loss(logits, targets.float()[[0, 1, 1]], 1) / 2


def test_without_a_number_of_points_all_pixels_are_compared():
    """Masks of 4 x 6 against targets of twice that size, in which each 2 x 2 pixels are equal."""
    torch.manual_seed(0)
    masks, small = torch.randn(1, 5, 4, 6) * 3, torch.rand(2, 4, 6) < 0.5
    pred = {"pred_logits": torch.randn(1, 5, 8), "pred_masks": masks}
    target = {"labels": torch.tensor([3, 1]), "masks": small.repeat_interleave(2, 1).repeat_interleave(2, 2)}
    criterion = make_criterion(None, pairwise_focal_cost, focal_loss)
    logits, wanted = masks[0].flatten(1), small.flatten(1).float()
    cost = 5 * pairwise_focal_cost(logits, wanted) + 5 * pairwise_dice_cost(logits, wanted)
    cost += 2 * class_cost(pred["pred_logits"][0], target["labels"])
    given = criterion.matcher.cost([pred["pred_logits"][0]], [masks[0]], target["labels"], target["masks"])
    torch.testing.assert_close(given[0], cost, atol=1e-5, rtol=1e-5)
    rows, columns = linear_sum_assignment(cost.numpy())
    losses = criterion(pred, [target], 2.0)
    torch.testing.assert_close(losses["loss_mask"], focal_loss(logits[rows], wanted[columns], 2.0))
    torch.testing.assert_close(losses["loss_dice"], dice_loss(logits[rows], wanted[columns], 2.0))


def test_an_unknown_mask_loss_is_refused():
    with pytest.raises(ValueError, match=r"MASK_LOSS 'iou' is unknown; there are \['cross_entropy', 'focal'\]"):
        build(PARENT, "MODEL.MASK_FORMER.MASK_LOSS", "iou")


def test_uncertain_points_prefer_small_logits():
    ramp = torch.linspace(-8, 8, 64).expand(1, 1, 32, 64)
    torch.manual_seed(0)
    points = uncertain_points(ramp, 1000, 3.0, 0.75)
    assert points.shape == (1, 1000, 2)
    near = (points[0, :750, 0] - 0.5).abs()
    # Of 3000 uniform points, the nearest 750 fill a quarter of the width. Zeros outside the map add a few points.
    assert near.quantile(0.95) < 0.14
    assert (points[0, 750:, 0] - 0.5).abs().max() > 0.4  # the rest are uniform


def test_images_without_targets_keep_the_graph():
    pred = {
        "pred_logits": torch.randn(2, 5, 8, requires_grad=True),
        "pred_masks": torch.randn(2, 5, 8, 8, requires_grad=True),
    }
    empty = {"labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 32, 32, dtype=torch.bool)}
    losses = make_criterion(64)(pred, [empty, empty], 1.0)
    assert losses["loss_mask"] == 0 and losses["loss_dice"] == 0
    sum(losses.values()).backward()
    assert pred["pred_masks"].grad is not None and not pred["pred_masks"].grad.any()
    assert pred["pred_logits"].grad.any()


def test_more_targets_than_queries():
    torch.manual_seed(0)
    pred = {"pred_logits": torch.randn(1, 2, 8), "pred_masks": torch.randn(1, 2, 8, 8)}
    target = {"labels": torch.arange(5), "masks": torch.rand(5, 32, 32) > 0.5}
    (((query, gt),),) = make_criterion(64).matcher([pred], [target])
    assert sorted(query.tolist()) == [0, 1] and len(set(gt.tolist())) == 2


def test_outputs_and_images_are_matched_each_on_its_own():
    """The queries are permutations of the targets, which differ by output and image. One image is empty."""
    torch.manual_seed(0)
    cells = torch.arange(4)[:, None] == torch.arange(4).repeat_interleave(8)[None]  # [4, 32]: stripes
    masks = cells[:, None].expand(-1, 32, -1)
    targets = [{"labels": torch.arange(n), "masks": masks[:n]} for n in (4, 0, 3)]
    orders = torch.stack([torch.randperm(4) for _ in range(6)]).view(2, 3, 4)
    logits = 9.0 * torch.eye(8)[:4]
    outputs = [
        {"pred_logits": logits[order], "pred_masks": (18.0 * masks.float() - 9)[order]} for order in orders
    ]  # query q predicts target order[q]
    matched = make_criterion(64).matcher(outputs, targets)
    assert [len(of_output) for of_output in matched] == [3, 3]
    for order, of_output in zip(orders, matched):
        for image, (query, gt) in enumerate(of_output):
            assert sorted(gt.tolist()) == list(range(len(targets[image]["labels"])))
            assert torch.equal(order[image][query], gt)


def test_nan_predictions_give_a_nan_loss_not_a_crash():
    pred = {"pred_logits": torch.full((1, 3, 8), float("nan")), "pred_masks": torch.full((1, 3, 8, 8), float("nan"))}
    target = {"labels": torch.tensor([1]), "masks": torch.ones(1, 32, 32, dtype=torch.bool)}
    assert make_criterion(64)(pred, [target], 1.0)["loss_mask"].isnan()


def test_deep_supervision_names(recorded):
    criterion = make_criterion(num_aux=2)
    output = {"pred_logits": recorded["pred_logits"], "pred_masks": recorded["pred_masks"]}
    targets = [{"labels": recorded[f"target{i}.labels"], "masks": recorded[f"target{i}.masks"]} for i in (0, 1)]
    losses = criterion({**output, "aux_outputs": [output, output]}, targets, 8)
    assert losses.keys() == criterion.weight_dict.keys()
    assert {"loss_ce", "loss_mask_0", "loss_dice_1"} <= losses.keys() and len(losses) == 9
