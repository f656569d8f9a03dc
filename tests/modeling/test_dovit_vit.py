"""The plain vision transformer of DoViT, and its heads."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from dovit_models import masked_layer, mini_vit
from minis import fill

from eco_m2f.modeling.dovit.heads import MaskTransformerHead, NaiveHead
from eco_m2f.modeling.dovit.vit import TokenPassViT, resized_positions


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
