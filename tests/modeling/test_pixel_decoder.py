"""The three kinds of mask branch, written out; and what autocast does to the pixel decoder."""

import pytest
import torch
import torch.nn.functional as F
from minis import ECO, PARENT, PROSCALE, RT, build, fill, make_batch

LPE = ("MODEL.SEM_SEG_HEAD.MASK_BRANCH", "lpe")


def states(model):
    """The backbone's maps, and (mask features, maps) of the last exit."""
    features = model.backbone(model.preprocess(make_batch()).tensor)
    decoder = model.sem_seg_head.pixel_decoder
    mask_features, coarsest, maps = decoder.forward_features(features)
    assert coarsest is maps[0]
    return features, mask_features, maps


@torch.no_grad()
def test_light_pixel_embedding_takes_the_maximum_around_a_pixel():
    model = fill(build(PARENT, *LPE))
    decoder = model.sem_seg_head.pixel_decoder
    features, mask_features, maps = states(model)
    x = decoder.adapter_1(features["res2"])
    height, width = x.shape[-2:]
    x = x + F.interpolate(maps[-1], size=(height, width), mode="bilinear", align_corners=False)
    padded = F.pad(x, (1, 1, 1, 1), value=float("-inf"))
    shifted = [padded[..., dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)]
    x = F.group_norm(torch.stack(shifted).amax(0), 32, decoder.layer_1.norm.weight, decoder.layer_1.norm.bias)
    torch.testing.assert_close(mask_features, decoder.mask_features(x.relu()), atol=1e-4, rtol=1e-5)


def test_light_pixel_embedding_lacks_the_parents_convolution_alone():
    parent, light = (set(build(PARENT, *opts).state_dict()) for opts in ((), LPE))
    assert parent - light == {"sem_seg_head.pixel_decoder.layer_1.weight"} and not light - parent


@torch.no_grad()
def test_masks_at_stride_8_come_of_the_finest_map():
    model = fill(build(PARENT, *RT))
    features, mask_features, maps = states(model)
    conv = model.sem_seg_head.pixel_decoder.mask_features
    torch.testing.assert_close(mask_features, F.conv2d(maps[-1], conv.weight, conv.bias))
    assert mask_features.shape[-2:] == (64 // 8, 96 // 8)
    assert model.sem_seg_head(features)["pred_masks"].shape[-2:] == (64 // 8, 96 // 8)
    assert not [n for n in model.state_dict() if "adapter_1" in n or "layer_1" in n]
    assert [r["sem_seg"].shape[1:] for r in model(make_batch())] == [(64, 96), (60, 80)]


@pytest.mark.parametrize(
    "opts, message",
    [
        (("MODEL.SEM_SEG_HEAD.MASK_BRANCH", "stride4"), r"MASK_BRANCH 'stride4' is unknown; .*'stride8'"),
        (("MODEL.SEM_SEG_HEAD.MASK_BRANCH", "stride8"), "masks at stride 8: set COMMON_STRIDE"),
        (("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 8), "COMMON_STRIDE 8 needs a backbone feature of that stride"),
        ((*PROSCALE, "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 8), "COMMON_STRIDE 8 needs"),
    ],
)
def test_what_does_not_fit_is_refused(opts, message):
    with pytest.raises(ValueError, match=message):
        build(PARENT, *opts)


@pytest.mark.parametrize("amp", [False, True])
@torch.no_grad()
def test_autocast_enters_where_the_config_lets_it(amp):
    """Outputs stay near those of float32, and are theirs bit for bit where autocast is kept out."""
    model = fill(build(ECO, "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_AMP", amp))
    pixel_decoder, kinds = model.sem_seg_head.pixel_decoder, []
    features = model.backbone(model.preprocess(make_batch()).tensor)
    layer = pixel_decoder.transformer.encoder.layers[0]
    for part in (layer.linear1, layer.self_attn.value_proj, layer.self_attn.sampling_offsets, pixel_decoder.layer_1):
        part.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    expected = pixel_decoder.forward_exits(features, (2, 6))
    with torch.autocast("cpu", torch.bfloat16):
        kinds.clear()
        found = pixel_decoder.forward_exits(features, (2, 6))
    low = torch.bfloat16 if amp else torch.float32
    assert kinds == [low, torch.float32, low, low, low]  # values, offsets, feed-forward network; then each exit's masks
    for k in (2, 6):
        for ours, theirs in zip((found[k][0], *found[k][1]), (expected[k][0], *expected[k][1])):
            error = (ours.float() - theirs).norm() / theirs.norm()
            assert error < 0.05 if amp else error == 0
        assert all(m.dtype == torch.float32 for m in found[k][1])
