"""What the meta-architectures `MaskFormer` and `Detr` share, so that everything with exits serves both."""

from collections.abc import Mapping, Sequence

import torch
from detectron2.structures import ImageList
from detectron2.utils import comm
from torch import Tensor, nn


class ExitHead(nn.Module):
    """What follows the backbone: an encoder with exits, and one decoder that reads any of them.

    A subclass has
    - `exits`: tuple of int, those of its encoder, ascending;
    - `encode(features, exits) -> (shared, {exit: state})`: one run of the encoder. shared is what the decoder needs
      besides, the same for every exit; a state is a list of tensors;
    - `decode(shared, state, aux=True) -> prediction`, a dict of tensors [B, ...], with "aux_outputs" if asked for; the
      state may have a batch where shared is of one image;
    - `start(features) -> (shared, maps, run)` and `advance(run, exit) -> (run, state)`: the same, exit by exit, in
      inference. maps are the encoder's input, [B, C, h, w] each; a run is an `EncoderState`;
    - `encoder_features`: the names of the backbone's maps that the encoder takes, coarse to fine;
    - `projected(features) -> [B, projected_channels, h, w]`: the coarsest as the encoder takes it, which a gate may
      read.
    """

    @property
    def coarsest(self) -> str:
        """The coarsest map of the backbone that the encoder takes."""
        return self.encoder_features[0]

    def forward(self, features: dict[str, Tensor], exit: int | None = None) -> dict:
        """The prediction at an exit, by default after the last encoder layer; see `decode`."""
        k = self.exits[-1] if exit is None else exit
        return self.forward_exits(features, [k])[k]

    def forward_exits(self, features: dict[str, Tensor], exits: Sequence[int]) -> dict[int, dict]:
        """{exit: prediction}; the encoder runs once. Training has aux_outputs.

        In inference the exits of a single image are decoded as a batch, which takes less time than one after the other.
        """
        shared, states = self.encode(features, exits)
        exits = sorted(states)
        batch = len(states[exits[0]][0])
        if self.training or len(exits) == 1 or batch > 1:
            return {k: self.decode(shared, states[k], aux=self.training) for k in exits}
        joined = [torch.cat(parts) for parts in zip(*(states[k] for k in exits))]
        pred = self.decode(shared, joined, aux=False)
        return {k: {name: value[i : i + 1] for name, value in pred.items()} for i, k in enumerate(exits)}


class Classified(nn.Module):
    """A model that knows what its classes are called; see `data.classes`.

    `classes` are those of the dataset of the config, or else those that its checkpoint holds; None where neither tells.
    """

    classes: list[dict] | None = None

    def set_classes(self, classes: Sequence[dict]) -> None:
        """In the order of the model's classes. A subclass takes from them what else it needs."""
        self.classes = list(classes)


class Parent(Classified):
    """A backbone and an `ExitHead`: images in, losses or results out. It knows nothing of exits.

    A subclass sets `backbone`, `criterion`, `postprocessor` and its head, and says with
    - `head_name`: the attribute that holds the head, by which its parameters are called;
    - `prepare_targets(batched_inputs, size)`: the criterion's targets, with "labels" [G] each;
    - `postprocess(pred, images, batched_inputs)`: the results of every image;
    - `annotation`: "panoptic" or "boxes", what its datasets hold;
    - `cost_parts`: {part: prefix of its modules' names} beside the backbone, the transformer encoder first.
    """

    head_name: str
    annotation: str
    cost_parts: Mapping[str, str]

    def set_input(self, size_divisibility: int, pixel_mean: tuple[float, ...], pixel_std: tuple[float, ...]) -> None:
        """How images are normalised, and the multiple that a batch is padded to (below 1: the backbone's)."""
        self.size_divisibility = size_divisibility if size_divisibility > 0 else self.backbone.size_divisibility
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @property
    def head(self) -> ExitHead:
        return getattr(self, self.head_name)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """
        Args:
            batched_inputs: per image, `image` [3, H, W] RGB in 0..255; for training `instances` with what
                `prepare_targets` reads; for inference `height` and `width` of the wanted output (default: the image's).

        Returns:
            In training, the weighted losses by name. Else the result of every image, see `postprocess`.
        """
        images = self.preprocess(batched_inputs)
        features = self.extract(images)
        if self.training:
            targets = self.prepare_targets(batched_inputs, images.tensor.shape[-2:])
            return self.losses(features, targets, self.count_masks(targets))
        return self.inference(features, images, batched_inputs)

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Normalises, then pads right and bottom with 0."""
        images = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        return ImageList.from_tensors(images, self.size_divisibility)

    def extract(self, images: ImageList) -> dict[str, Tensor]:
        """What the head reads: the backbone's maps by name, each with the batch first."""
        return self.backbone(images.tensor)

    def count_masks(self, targets: list[dict]) -> Tensor:
        """Mean number of targets (masks or boxes) per process, at least 1. The only communication of the losses."""
        num = torch.as_tensor(float(sum(len(t["labels"]) for t in targets)), device=self.device)
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(num)
        return (num / comm.get_world_size()).clamp(min=1)

    def losses(self, features: dict[str, Tensor], targets: list[dict], num_masks: Tensor) -> dict[str, Tensor]:
        return self.weighted_losses(self.head(features), targets, num_masks)

    def weighted_losses(self, pred: dict, targets: list[dict], num_masks: Tensor) -> dict[str, Tensor]:
        """The criterion's losses times their weights; a loss without a weight is left out."""
        losses = self.criterion(pred, targets, num_masks)
        weights = self.criterion.weight_dict
        return {name: loss * weights[name] for name, loss in losses.items() if name in weights}

    def inference(self, features: dict[str, Tensor], images: ImageList, batched_inputs: list[dict]) -> list[dict]:
        return self.postprocess(self.head(features), images, batched_inputs)

    @staticmethod
    def output_size(x: dict, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the result that an input asks for; size: that of the image as it was given."""
        return x.get("height", size[0]), x.get("width", size[1])
