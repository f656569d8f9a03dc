"""The base classes of the meta-architectures `MaskFormer` and `Detr`. The code for exits works on these."""

from collections.abc import Mapping, Sequence

import torch
from detectron2.structures import ImageList
from detectron2.utils import comm
from torch import Tensor, nn


class ExitHead(nn.Module):
    """The part after the backbone: an encoder with exits, and one decoder for all exits.

    A subclass has
    - `exits`: tuple of int, the encoder's exits, ascending;
    - `encode(features, exits) -> (shared, {exit: state})`: one run of the encoder. A state is a list of tensors. The
      decoder also needs shared, which is the same for all exits;
    - `decode(shared, state, aux=True) -> prediction`: a dict of tensors [B, ...], plus "aux_outputs" with `aux`. The
      state may be a batch while shared is of one image;
    - `start(features) -> (shared, maps, run)` and `advance(run, exit) -> (run, state)`: the same exit by exit, for
      inference. maps are the encoder's input, [B, C, h, w] each. A run is an `EncoderState`;
    - `encoder_features`: the names of the encoder's input maps in the backbone, coarse to fine;
    - `projected(features) -> [B, projected_channels, h, w]`: the encoder's coarsest input map, for gates.
    """

    @property
    def coarsest(self) -> str:
        """The name of the encoder's coarsest input map."""
        return self.encoder_features[0]

    def forward(self, features: dict[str, Tensor], exit: int | None = None) -> dict:
        """The prediction at an exit, by default the last; see `decode`."""
        k = self.exits[-1] if exit is None else exit
        return self.forward_exits(features, [k])[k]

    def forward_exits(self, features: dict[str, Tensor], exits: Sequence[int]) -> dict[int, dict]:
        """{exit: prediction}, by one run of the encoder; in training with aux_outputs.

        In inference all exits of a single image are decoded as one batch, which is faster.
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
    """A model that knows its classes; see `data.classes`.

    `classes` come from the config's dataset, else from the checkpoint. They are None where neither has them.
    """

    classes: list[dict] | None = None

    def set_classes(self, classes: Sequence[dict]) -> None:
        """classes: in the order of the model's classes."""
        self.classes = list(classes)


class Parent(Classified):
    """A backbone and an `ExitHead`: images in, losses or results out. It knows nothing of exits.

    A subclass sets `backbone`, `criterion`, `postprocessor` and its head, and defines
    - `head_name`: the attribute that holds the head; parameter names begin with it;
    - `prepare_targets(batched_inputs, size)`: the criterion's targets per image, with "labels" [G];
    - `postprocess(pred, images, batched_inputs)`: the result of each image;
    - `annotation`: the kind of its datasets, "panoptic" or "boxes";
    - `cost_parts`: {part: prefix of its modules' names}, without the backbone, the transformer encoder first.
    """

    head_name: str
    annotation: str
    cost_parts: Mapping[str, str]

    def set_input(self, size_divisibility: int, pixel_mean: tuple[float, ...], pixel_std: tuple[float, ...]) -> None:
        """Sets how images are normalised and padded. A size_divisibility below 1 means the backbone's."""
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
            batched_inputs: per image, `image` [3, H, W] RGB in 0..255. Training needs `instances`, for
                `prepare_targets`. Inference reads `height` and `width` of the output (default: the image's).

        Returns:
            In training, the weighted losses by name. Else the result of each image, see `postprocess`.
        """
        images = self.preprocess(batched_inputs)  # [B, 3, H, W]
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
        """The head's input: the backbone's maps [B, C, h, w] by name."""
        return self.backbone(images.tensor)

    def count_masks(self, targets: list[dict]) -> Tensor:
        """The mean number of targets (masks or boxes) per process, at least 1. The losses communicate only here."""
        num = torch.as_tensor(float(sum(len(t["labels"]) for t in targets)), device=self.device)
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(num)
        return (num / comm.get_world_size()).clamp(min=1)

    def losses(self, features: dict[str, Tensor], targets: list[dict], num_masks: Tensor) -> dict[str, Tensor]:
        return self.weighted_losses(self.head(features), targets, num_masks)

    def weighted_losses(self, pred: dict, targets: list[dict], num_masks: Tensor) -> dict[str, Tensor]:
        """The criterion's losses times their weights, without those that have no weight."""
        losses = self.criterion(pred, targets, num_masks)
        weights = self.criterion.weight_dict
        return {name: loss * weights[name] for name, loss in losses.items() if name in weights}

    def inference(self, features: dict[str, Tensor], images: ImageList, batched_inputs: list[dict]) -> list[dict]:
        return self.postprocess(self.head(features), images, batched_inputs)

    @staticmethod
    def output_size(x: dict, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the result that an input asks for, by default `size`, the input image's own."""
        return x.get("height", size[0]), x.get("width", size[1])
