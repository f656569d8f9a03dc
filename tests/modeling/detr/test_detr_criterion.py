"""Costs and losses of boxes, against arithmetic by hand and a slow search."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from eco_m2f.modeling.detr.criterion import BoxCriterion, BoxMatcher

WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}


def make_criterion(num_aux=0):
    return BoxCriterion(3, matcher=BoxMatcher(1.0, 5.0, 2.0), weights=WEIGHTS, no_object_weight=0.1, num_aux=num_aux)


def giou(a, b):
    """Generalised IoU of two boxes (centre x, centre y, width, height), in plain Python."""
    corners = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (a, b)]
    (ax, ay, au, av), (bx, by, bu, bv) = corners
    inner = max(0.0, min(au, bu) - max(ax, bx)) * max(0.0, min(av, bv) - max(ay, by))
    union = a[2] * a[3] + b[2] * b[3] - inner
    hull = (max(au, bu) - min(ax, bx)) * (max(av, bv) - min(ay, by))
    return inner / union - (hull - union) / hull


def random_case(seed=0, queries=5, counts=(2, 3)):
    torch.manual_seed(seed)
    pred = {
        "pred_logits": torch.randn(len(counts), queries, 4, dtype=torch.float64),
        "pred_boxes": torch.rand(len(counts), queries, 4, dtype=torch.float64) * 0.4 + 0.1,
    }
    targets = [
        {"labels": torch.randint(3, (n,)), "boxes": torch.rand(n, 4, dtype=torch.float64) * 0.4 + 0.1} for n in counts
    ]
    return pred, targets


def plain_cost(logits, boxes, target):
    rows = []
    for q in range(len(boxes)):
        p = logits[q].softmax(-1)
        rows.append(
            [
                -p[c].item() + 5 * (boxes[q] - b).abs().sum().item() - 2 * giou(boxes[q].tolist(), b.tolist())
                for c, b in zip(target["labels"], target["boxes"])
            ]
        )
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_the_matching_costs_least_of_all(seed):
    pred, targets = random_case(seed)
    (matches,) = BoxMatcher(1.0, 5.0, 2.0)([pred], targets)
    for i, (query, gt) in enumerate(matches):
        cost = plain_cost(pred["pred_logits"][i], pred["pred_boxes"][i], targets[i])
        n = cost.shape[1]
        best = min(sum(cost[q, g].item() for g, q in enumerate(p)) for p in itertools.permutations(range(5), n))
        assert cost[query, gt].sum().item() == pytest.approx(best, rel=1e-9)
        assert sorted(gt.tolist()) == list(range(n)) and len(set(query.tolist())) == n


def test_losses_by_hand():
    pred, targets = random_case(4)
    criterion = make_criterion()
    (matches,) = criterion.matcher([pred], targets)
    losses = criterion(pred, targets, 5.0)
    l1 = overlap = nll = weight = 0.0
    for i, (query, gt) in enumerate(matches):
        wanted = [3] * 5
        for q, g in zip(query.tolist(), gt.tolist()):
            a, b = pred["pred_boxes"][i, q], targets[i]["boxes"][g]
            l1 += (a - b).abs().sum().item()
            overlap += 1 - giou(a.tolist(), b.tolist())
            wanted[q] = targets[i]["labels"][g].item()
        for q, c in enumerate(wanted):
            w = 0.1 if c == 3 else 1.0
            nll -= w * F.log_softmax(pred["pred_logits"][i, q], -1)[c].item()
            weight += w
    assert losses["loss_bbox"].item() == pytest.approx(l1 / 5)
    assert losses["loss_giou"].item() == pytest.approx(overlap / 5, rel=1e-5)  # torchvision's eps
    assert losses["loss_ce"].item() == pytest.approx(nll / weight)


def test_deep_supervision_names_and_weights():
    pred, targets = random_case()
    criterion = make_criterion(num_aux=2)
    losses = criterion({**pred, "aux_outputs": [pred, pred]}, targets, 5.0)
    assert losses.keys() == criterion.weight_dict.keys() and len(losses) == 9
    assert criterion.weight_dict["loss_giou_1"] == 2.0
    assert losses["loss_bbox_0"] == losses["loss_bbox"]
    assert not criterion.state_dict()  # published checkpoints do not hold the classes' weights


def test_images_without_objects_keep_the_graph():
    pred, _ = random_case()
    pred = {name: value.requires_grad_() for name, value in pred.items()}
    empty = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    losses = make_criterion()(pred, [empty, empty], 1.0)
    assert losses["loss_bbox"] == 0 and losses["loss_giou"] == 0
    sum(losses.values()).backward()
    assert pred["pred_boxes"].grad is not None and not pred["pred_boxes"].grad.any()
    assert pred["pred_logits"].grad.any()


def test_nan_predictions_give_a_nan_loss_not_a_crash():
    pred, targets = random_case()
    broken = {name: torch.full_like(value, float("nan")) for name, value in pred.items()}
    assert make_criterion()(broken, targets, 5.0)["loss_bbox"].isnan()
