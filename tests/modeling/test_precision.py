"""What the pixel decoder does under autocast."""

import pytest
import torch
from minis import ECO, build, fill, make_batch


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
