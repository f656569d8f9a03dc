"""The pixel decoder: projections, a transformer encoder with exits, and the mask branch.

The encoder is a plug-in (`encoders/`). The mask branch makes mask features of an exit's finest map and the backbone's
finer maps. It consists of the methods `laterals` and `mask_branch`, and has three kinds:

- `fpn`: a feature pyramid. Each finer map, coarse to fine, passes a 1x1 convolution. The upsampled sum so far is added,
  and the result passes a 3x3 convolution. Mask2Former does this for res2. MaskFormer, whose encoder reads only res5,
  does it for res4, res3 and res2;
- `lpe`, PRO-SCALE's light pixel embedding (arXiv 2404.14657): max-pooling instead of that 3x3 convolution;
- `stride8`, RT-M2F's (arXiv 2404.15244): only the encoder's finest map, so masks have stride 8.

State-dict names are Mask2Former's.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn

from ..encoders import EncoderState, build_transformer_encoder
from ..layers import at_least_float32, sine_position

MASK_BRANCHES = ("fpn", "lpe", "stride8")


@SEM_SEG_HEADS_REGISTRY.register()
class MSDeformAttnPixelDecoder(nn.Module):
    """Mask2Former's pixel decoder, for several exits of its encoder in one pass."""

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        encoder: nn.Module,
        encoder_in_features: Sequence[str],
        conv_dim: int,
        mask_dim: int,
        norm: str,
        common_stride: int,
        mask_branch: str = "fpn",
        amp: bool = False,
    ):
        """amp: run under autocast, which Mask2Former does not. bfloat16 works: residuals and offsets stay float32."""
        super().__init__()
        self.amp = amp
        if mask_branch not in MASK_BRANCHES:
            raise ValueError(f"MASK_BRANCH {mask_branch!r} is unknown; there are {list(MASK_BRANCHES)}")
        by_stride = sorted(input_shape, key=lambda name: input_shape[name].stride)
        coarse_to_fine = [n for n in reversed(by_stride) if n in encoder_in_features]
        if len(coarse_to_fine) != len(encoder_in_features):
            raise ValueError(f"encoder features {list(encoder_in_features)} are not all in the backbone's {by_stride}")
        self.encoder_in_features = coarse_to_fine
        finest = by_stride.index(coarse_to_fine[-1])
        self.mask_in_features = [] if mask_branch == "stride8" else by_stride[:finest][::-1]  # coarse to fine
        self._check_strides({n: input_shape[n].stride for n in by_stride}, common_stride, mask_branch)
        self.input_proj = nn.ModuleList(encoder.input_projection(input_shape[n].channels) for n in coarse_to_fine)
        self.transformer = encoder
        use_bias = norm == ""
        for i, name in self._pyramid():
            channels = input_shape[name].channels
            adapter = Conv2d(channels, conv_dim, 1, bias=use_bias, norm=get_norm(norm, conv_dim))
            if mask_branch == "lpe":
                layer = LightPixelEmbedding(get_norm(norm, conv_dim))
            else:
                conv = {"bias": use_bias, "norm": get_norm(norm, conv_dim), "activation": F.relu}
                layer = Conv2d(conv_dim, conv_dim, 3, padding=1, **conv)
            self.add_module(f"adapter_{i}", adapter)
            self.add_module(f"layer_{i}", layer)
        self.mask_features = Conv2d(conv_dim, mask_dim, 1)
        self._initialise()

    def _check_strides(self, strides: dict[str, int], common_stride: int, mask_branch: str) -> None:
        """Masks are at `common_stride`: the finest of the pyramid, or with `stride8` the encoder's finest."""
        finest = strides[self.encoder_in_features[-1]]
        if not self.mask_in_features:
            if common_stride != finest:
                raise ValueError(f"MASK_BRANCH {mask_branch} makes masks at stride {finest}: set COMMON_STRIDE so")
            return
        steps = [finest, *(strides[n] for n in self.mask_in_features)]
        if steps[-1] != common_stride or any(a != 2 * b for a, b in zip(steps, steps[1:])):
            raise ValueError(
                f"COMMON_STRIDE {common_stride} needs a backbone feature of that stride, and one for each stride from "
                f"the encoder's finest down to it; got feature strides {strides}, encoder features "
                f"{self.encoder_in_features}"
            )

    def _pyramid(self) -> list[tuple[int, str]]:
        """(number in the parameter names, feature) of the levels below the encoder's, coarse to fine."""
        names = self.mask_in_features
        return [(len(names) - i, name) for i, name in enumerate(names)]

    def _initialise(self) -> None:
        for proj in self.input_proj:
            nn.init.xavier_uniform_(proj[0].weight)
            if proj[0].bias is not None:
                nn.init.zeros_(proj[0].bias)
        pyramid = [self.get_submodule(f"{kind}_{i}") for i, _ in self._pyramid() for kind in ("adapter", "layer")]
        for conv in (*pyramid, self.mask_features):
            if isinstance(conv, nn.Conv2d):
                c2_xavier_fill(conv)

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        head = cfg.MODEL.SEM_SEG_HEAD
        return {
            "input_shape": {k: v for k, v in input_shape.items() if k in head.IN_FEATURES},
            "encoder": build_transformer_encoder(cfg),
            "encoder_in_features": head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES,
            "conv_dim": head.CONVS_DIM,
            "mask_dim": head.MASK_DIM,
            "norm": head.NORM,
            "common_stride": head.COMMON_STRIDE,
            "amp": head.PIXEL_DECODER_AMP,
            "mask_branch": head.MASK_BRANCH,
        }

    @property
    def exits(self) -> tuple[int, ...]:
        """The exits that the encoder offers."""
        return self.transformer.exits

    def encode(
        self, features: dict[str, Tensor], exits: Sequence[int]
    ) -> tuple[tuple[Tensor, ...], dict[int, list[Tensor]]]:
        """Runs the encoder once, to max(exits).

        Args:
            features: backbone maps by name, [B, C_i, H / stride, W / stride].

        Returns:
            The backbone's maps for the mask branch, see `laterals`, which are the same for all exits. And {exit: maps
            [B, conv_dim, h, w], coarse to fine}. All are at least float32, also under autocast.
        """
        with self._precision(next(iter(features.values()))):
            features, projected, pos = self._encoder_input(features)
            maps = self.transformer(projected, pos, exits)
            return self.laterals(features), maps

    def start(self, features: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], list[Tensor], EncoderState]:
        """(the maps for the mask branch, the encoder's input maps, its state before the first layer)."""
        with self._precision(next(iter(features.values()))):
            features, projected, pos = self._encoder_input(features)
            return self.laterals(features), projected, self.transformer.start(projected, pos)

    def advance(self, state: EncoderState, exit: int) -> tuple[EncoderState, list[Tensor]]:
        """See `ExitEncoder.advance`; the maps are those of `encode`."""
        with self._precision(self.mask_features.weight):
            return self.transformer.advance(state, exit)

    def _encoder_input(self, features: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
        """The features, the encoder's input maps and their position codes, all at least float32."""
        features = {name: at_least_float32(f) for name, f in features.items()}
        projected = [at_least_float32(m) for m in self.project(features)]  # [B, conv_dim, h, w] each
        pos = [sine_position(*m.shape[-2:], m.shape[1], m.device).to(m.dtype) for m in projected]  # [1, conv_dim, h, w]
        return features, projected, pos

    def _precision(self, x: Tensor) -> torch.autocast:
        kind = x.device.type
        if self.amp and torch.is_autocast_enabled(kind):
            return torch.autocast(kind, torch.get_autocast_dtype(kind))
        return torch.autocast(kind, enabled=False)

    def project(self, features: dict[str, Tensor]) -> list[Tensor]:
        """The encoder's input maps, coarse to fine, before position and level embedding."""
        return [proj(features[name]) for name, proj in zip(self.encoder_in_features, self.input_proj)]

    def laterals(self, features: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The mask branch's input from the backbone: [B, conv_dim, H / stride, W / stride] each, coarse to fine.

        They lie channels last, like the encoder's maps.
        """
        maps = (self.get_submodule(f"adapter_{i}")(features[name]) for i, name in self._pyramid())
        return tuple(m.contiguous(memory_format=torch.channels_last) for m in maps)

    def mask_branch(self, laterals: Sequence[Tensor], maps: Sequence[Tensor]) -> Tensor:
        """Mask features [B, mask_dim, H / common_stride, W / common_stride], from the finest map and the laterals."""
        x = maps[-1]  # [B, conv_dim, h, w]
        with self._precision(x):
            for (i, _), lateral in zip(self._pyramid(), laterals):
                up = F.interpolate(x, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
                x = self.get_submodule(f"layer_{i}")(up.add_(lateral))
            return self.mask_features(x)


class LightPixelEmbedding(nn.Module):
    """A 3x3 max-pooling that keeps the size, a norm (or None), ReLU. Only the norm has parameters."""

    def __init__(self, norm: nn.Module | None):
        super().__init__()
        self.norm = norm or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(F.max_pool2d(x, 3, stride=1, padding=1)))
