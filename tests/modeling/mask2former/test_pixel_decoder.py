"""The three kinds of mask branch, written out, and the pixel decoder under autocast."""

import pytest
import torch
import torch.nn.functional as F
from minis import ECO, MASKFORMER, PARENT, PROSCALE, RT, build, fill, make_batch, pixel_decoder_exits

from eco_m2f.modeling.layers import sine_position

LPE = ("MODEL.SEM_SEG_HEAD.MASK_BRANCH", "lpe")


def states(model):
    """The backbone's maps, and (mask features, maps) of the last exit."""
    features = model.backbone(model.preprocess(make_batch()).tensor)
    decoder = model.sem_seg_head.pixel_decoder
    return features, *pixel_decoder_exits(decoder, features, decoder.exits[-1:])[decoder.exits[-1]]


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
def test_an_encoder_of_res5_alone_stands_on_a_pyramid_of_three_levels():
    """MaskFormer's: each backbone map plus the upsampled sum so far, then a convolution, GroupNorm and ReLU."""
    model = fill(build(PARENT, *MASKFORMER))
    decoder = model.sem_seg_head.pixel_decoder
    features, mask_features, maps = states(model)
    assert [m.shape[-2:] for m in maps] == [(2, 3)]
    x = maps[0]
    for i, name in ((3, "res4"), (2, "res3"), (1, "res2")):
        adapter, layer = getattr(decoder, f"adapter_{i}"), getattr(decoder, f"layer_{i}")
        lateral = F.group_norm(F.conv2d(features[name], adapter.weight), 32, adapter.norm.weight, adapter.norm.bias)
        x = lateral + F.interpolate(x, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
        x = F.group_norm(F.conv2d(x, layer.weight, padding=1), 32, layer.norm.weight, layer.norm.bias).relu()
    torch.testing.assert_close(mask_features, decoder.mask_features(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_maskformers_decoder_predicts_after_each_layer_from_the_coarsest_map():
    model = fill(build(PARENT, *MASKFORMER))
    predictor, (_, mask_features, maps) = model.sem_seg_head.predictor, states(model)
    pred = predictor(maps, mask_features)
    memory = maps[0].flatten(2).transpose(1, 2)
    pos = sine_position(2, 3, 32, memory.device).flatten(2).transpose(1, 2).expand_as(memory)
    x = torch.zeros(2, 12, 32)
    query_pos = predictor.query_embed.weight.expand_as(x)
    outputs = [*pred["aux_outputs"], pred]
    assert len(outputs) == len(predictor.transformer.layers) == 4
    for layer, output in zip(predictor.transformer.layers, outputs):  # nn.MultiheadAttention's own forward, no masks
        q = (x + query_pos).transpose(0, 1)
        x = layer.norm1(x + layer.self_attn(q, q, x.transpose(0, 1))[0].transpose(0, 1))
        q, key = (x + query_pos).transpose(0, 1), (memory + pos).transpose(0, 1)
        x = layer.norm2(x + layer.multihead_attn(q, key, memory.transpose(0, 1))[0].transpose(0, 1))
        x = layer.norm3(x + layer.linear2(layer.linear1(x).relu()))
        found = predictor.transformer.norm(x)
        torch.testing.assert_close(output["pred_logits"], predictor.class_embed(found), atol=1e-4, rtol=1e-4)
        masks = (predictor.mask_embed(found) @ mask_features.flatten(2)).unflatten(2, mask_features.shape[-2:])
        torch.testing.assert_close(output["pred_masks"], masks, atol=1e-4, rtol=1e-4)


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
        ((*MASKFORMER, "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res2", "res3", "res5"]), "one for each stride"),
        (MASKFORMER[:-2], "TRANSFORMER_IN_FEATURE must be 'transformer_encoder' for the StandardTransformerDecoder"),
        (MASKFORMER[-2:], "TRANSFORMER_IN_FEATURE must be 'multi_scale_pixel_decoder'"),
        ((*MASKFORMER, "MODEL.MASK_FORMER.PRE_NORM", True), "PRE_NORM False"),
    ],
)
def test_what_does_not_fit_is_refused(opts, message):
    with pytest.raises(ValueError, match=message):
        build(PARENT, *opts)


@pytest.mark.parametrize("amp", [False, True])
@torch.no_grad()
def test_autocast_enters_where_the_config_lets_it(amp):
    """Outputs are close to those of float32, and equal to them bit for bit without autocast."""
    model = fill(build(ECO, "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_AMP", amp))
    pixel_decoder, kinds = model.sem_seg_head.pixel_decoder, []
    features = model.backbone(model.preprocess(make_batch()).tensor)
    layer = pixel_decoder.transformer.encoder.layers[0]
    for part in (layer.linear1, layer.self_attn.value_proj, layer.self_attn.sampling_offsets, pixel_decoder.layer_1):
        part.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    expected = pixel_decoder_exits(pixel_decoder, features, (2, 6))
    with torch.autocast("cpu", torch.bfloat16):
        kinds.clear()
        found = pixel_decoder_exits(pixel_decoder, features, (2, 6))
    low = torch.bfloat16 if amp else torch.float32
    assert kinds == [low, torch.float32, low, low, low]  # values, offsets, feed-forward network; then each exit's masks
    for k in (2, 6):
        for ours, theirs in zip((found[k][0], *found[k][1]), (expected[k][0], *expected[k][1])):
            error = (ours.float() - theirs).norm() / theirs.norm()
            assert error < 0.05 if amp else error == 0
        assert all(m.dtype == torch.float32 for m in found[k][1])
