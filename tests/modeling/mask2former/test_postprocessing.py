"""Semantic, panoptic and instance inference, against the reference implementation and in edge cases."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from eco_m2f.modeling.mask2former.postprocessing import (
    PostProcessor,
    crop_and_resize,
    instance_inference,
    panoptic_inference,
    resize_masks,
    semantic_inference,
)

THINGS = frozenset(range(4))


def check(case: dict) -> None:
    logits, masks = case["logits"], case["masks"]
    torch.testing.assert_close(semantic_inference(logits, masks), case["semantic"], atol=1e-5, rtol=1e-5)
    panoptic, segments = panoptic_inference(logits, masks, THINGS, 0.8, 0.8)
    assert panoptic.dtype == torch.int32 and torch.equal(panoptic, case["panoptic"])
    rows = [[s["id"], int(s["isthing"]), s["category_id"]] for s in segments]
    assert rows == case["segments"].tolist()
    found = instance_inference(logits, masks, 15, THINGS)
    order, wanted = found.scores.argsort(), case["inst_scores"].argsort()
    torch.testing.assert_close(found.scores[order], case["inst_scores"][wanted], atol=1e-5, rtol=1e-5)
    assert torch.equal(found.pred_classes[order], case["inst_classes"][wanted])
    assert torch.equal(found.pred_masks[order].bool(), case["inst_masks"][wanted].bool())
    assert not found.pred_boxes.tensor.any()


def test_recorded_case(assets):
    check({k: torch.from_numpy(v) for k, v in np.load(assets / "postprocess.npz").items()})


def test_all_reference_cases(shared):
    data = load_file(shared / "oracle" / "postprocess.safetensors")
    for i in range(4):
        check({k.removeprefix(f"case{i}."): v for k, v in data.items() if k.startswith(f"case{i}.")})


def test_nothing_found_is_all_void():
    logits = torch.zeros(5, 8)
    logits[:, -1] = 9
    panoptic, segments = panoptic_inference(logits, torch.randn(5, 6, 7), THINGS, 0.8, 0.8)
    assert not panoptic.any() and segments == []


def test_panoptic_alone_is_the_panoptic_of_all():
    """Without other results, queries that cannot own pixels are dropped before resizing. The map is the same."""
    torch.manual_seed(0)
    logits, masks = 4 * torch.randn(12, 8), torch.randn(12, 16, 24)
    sizes = ((64, 96), (60, 90), (33, 47))
    some = {"object_mask_threshold": 0.5, "overlap_threshold": 0.0}
    alone = PostProcessor(7, THINGS, semantic_on=False, instance_on=False, **some)
    everything = PostProcessor(7, THINGS, **some)
    panoptic, segments = alone(logits, masks, *sizes)["panoptic_seg"]
    wanted, wanted_segments = everything(logits, masks, *sizes)["panoptic_seg"]
    assert torch.equal(panoptic, wanted) and segments == wanted_segments and segments
    logits[:, -1] = 99
    panoptic, segments = alone(logits, masks, *sizes)["panoptic_seg"]
    assert panoptic.shape == (33, 47) and not panoptic.any() and segments == []


def test_stuff_of_one_class_is_merged_and_things_are_not():
    masks = torch.full((4, 4, 8), -9.0)
    for q in range(4):
        masks[q, :, 2 * q : 2 * q + 2] = 9.0
    logits = torch.zeros(4, 8)
    logits[[0, 1], 5] = 12.0  # stuff
    logits[[2, 3], 1] = 12.0  # things
    panoptic, segments = panoptic_inference(logits, masks, THINGS, 0.8, 0.8)
    assert [s["category_id"] for s in segments] == [5, 1, 1]
    assert panoptic[0].tolist() == [1, 1, 1, 1, 2, 2, 3, 3]


def test_hidden_segments_are_dropped():
    masks = torch.full((2, 4, 10), -9.0)
    masks[0, :, :5] = 9.0
    masks[1] = 3.0  # the whole image, of which it owns only half
    logits = torch.zeros(2, 8)
    logits[:, 1] = 12.0
    _, segments = panoptic_inference(logits, masks, THINGS, 0.8, 0.8)
    assert len(segments) == 1


@pytest.mark.parametrize("size", [(33, 47), (64, 96), (1, 1)])
def test_output_has_the_size_asked_for(size):
    logits, masks = torch.randn(6, 8), torch.randn(6, 16, 24)
    out = PostProcessor(7, THINGS)(logits, masks, (64, 96), (60, 90), size)
    assert out["sem_seg"].shape == (7, *size)
    assert out["panoptic_seg"][0].shape == size
    assert out["instances"].image_size == size


def test_semantic_alone_is_resized_after_the_sum():
    logits, masks = torch.randn(6, 8), torch.randn(6, 16, 24)
    only = PostProcessor(7, THINGS, panoptic_on=False, instance_on=False, resize_first=False)
    out = only(logits, masks, (64, 96), (60, 90), (30, 45))
    assert list(out) == ["sem_seg"]
    expected = crop_and_resize(semantic_inference(logits, resize_masks(masks, (64, 96))), (60, 90), (30, 45))
    torch.testing.assert_close(out["sem_seg"], expected)


def test_maps_of_tokens_are_resized_as_other_maps_are(monkeypatch):
    """PyTorch would take the view [C, h, w] of tokens [h, w, C] for channels last, and copy the whole result."""
    seen, original = [], F.interpolate
    monkeypatch.setattr(
        F, "interpolate", lambda x, **options: (seen.append(x.is_contiguous()), original(x, **options))[1]
    )
    tokens = torch.randn(4, 6, 5)
    resized = resize_masks(tokens.permute(2, 0, 1), (8, 12))
    assert seen == [True] and torch.equal(resized, resize_masks(tokens.permute(2, 0, 1).contiguous(), (8, 12)))


def test_identity_resize_is_exact():
    masks = torch.randn(3, 17, 23)
    same = torch.nn.functional.interpolate(masks[None], size=(17, 23), mode="bilinear", align_corners=False)[0]
    assert torch.equal(resize_masks(masks, (17, 23)), same)
