"""DoViT, "Dynamic Token-Pass Transformers for Semantic Segmentation": the meta-architecture.

At each decision point an auxiliary head classifies all tokens. A token stops there and keeps its value if its best
probability exceeds the threshold. DoViT stops tokens, not layers; it has no exits.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import build_sem_seg_head
from detectron2.structures import ImageList
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..mask2former.postprocessing import crop_and_resize, resize_masks
from ..parent import Classified
from .heads import NaiveHead
from .vit import TokenPassViT


@META_ARCH_REGISTRY.register()
class DoViT(Classified):
    """Semantic segmentation by a vision transformer whose tokens may stop early."""

    cost_parts = {"head": "head.", "auxiliary_heads": "auxiliary_heads."}

    @configurable
    def __init__(
        self,
        *,
        backbone: TokenPassViT,
        head: nn.Module,
        auxiliary_heads: Sequence[nn.Module],
        num_classes: int,
        threshold: float,
        num_iterations: int,
        weights: Mapping[str, float],
        ignore_value: int,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
    ):
        """
        Args:
            head: see `heads.py`; auxiliary_heads: the same, one per decision point.
            threshold: tokens stop above this probability; 1 stops none, which is the static model.
            num_iterations: the length of a training, in which the threshold falls from 1 to its value.
            weights: of loss_ce, loss_aux, loss_kl and loss_features.
            ignore_value: the class of pixels that do not count.
        """
        super().__init__()
        if not 0 < threshold <= 1:
            raise ValueError(f"MODEL.DOVIT.THRESHOLD {threshold} is no probability above 0: 1 stops no token")
        self.backbone = backbone
        self.head = head
        self.auxiliary_heads = nn.ModuleList(auxiliary_heads)
        self.num_classes = num_classes
        self.threshold = threshold
        self.num_iterations = num_iterations
        self.weights = dict(weights)
        self.ignore_value = ignore_value
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self._teacher = ()  # a tuple hides it from PyTorch: it is neither trained nor saved

    @classmethod
    def from_config(cls, cfg) -> dict:
        d, test = cfg.MODEL.DOVIT, cfg.MODEL.MASK_FORMER.TEST
        if test.PANOPTIC_ON or test.INSTANCE_ON or not test.SEMANTIC_ON:
            raise ValueError(
                "DoViT does semantic segmentation only: in MODEL.MASK_FORMER.TEST, set SEMANTIC_ON to True, and "
                "PANOPTIC_ON and INSTANCE_ON to False"
            )
        shape = {"tokens": ShapeSpec(channels=d.EMBED_DIM, stride=d.PATCH_SIZE)}
        return {
            "backbone": TokenPassViT(
                patch_size=d.PATCH_SIZE,
                dim=d.EMBED_DIM,
                depth=d.DEPTH,
                num_heads=d.NUM_HEADS,
                image_size=d.PRETRAIN_IMG_SIZE,
                decision_layers=d.DECISION_LAYERS,
            ),
            "head": build_sem_seg_head(cfg, shape),
            "auxiliary_heads": [NaiveHead(cfg, shape) for _ in d.DECISION_LAYERS],
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "threshold": d.THRESHOLD,
            "num_iterations": cfg.SOLVER.MAX_ITER,
            "weights": {
                "loss_ce": cfg.MODEL.SEM_SEG_HEAD.LOSS_WEIGHT,
                "loss_aux": d.AUX_WEIGHT,
                "loss_kl": d.KL_WEIGHT,
                "loss_features": d.FEATURE_WEIGHT,
            },
            "ignore_value": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def size_divisibility(self) -> int:
        """The sides of padded images are multiples of this, in pixels."""
        return self.backbone.patch_size

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """
        Args:
            batched_inputs: per image, `image` [3, H, W] RGB in 0..255. Training needs `sem_seg` [H, W], the classes.
                Inference reads `height` and `width` of the output (default: the image's).

        Returns:
            In training, the weighted losses by name. Else, per image, `sem_seg` [C, height, width] (logits) and
            `tokens`: {"threshold", "kept" (the share that goes on after each decision point)}.
        """
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess(batched_inputs).tensor
        return self.losses(images, self.prepare_targets(batched_inputs, images.shape[-2:]))

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Normalises, then pads right and bottom with 0 to whole patches."""
        images = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        return ImageList.from_tensors(images, self.size_divisibility)

    def prepare_targets(self, batched_inputs: list[dict], size: Sequence[int]) -> Tensor:
        """The classes [B, H, W] of a batch, with `ignore_value` in the padding."""
        targets = torch.full((len(batched_inputs), *size), self.ignore_value, device=self.device)
        for target, x in zip(targets, batched_inputs):
            if "sem_seg" not in x:
                raise ValueError("DoViT trains on class maps: set INPUT.DATASET_MAPPER_NAME to 'mask_former_semantic'")
            height, width = x["sem_seg"].shape
            target[:height, :width] = x["sem_seg"]
        return targets

    def losses(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        storage = get_event_storage()
        rule = AuxiliaryRule(self.auxiliary_heads, annealed(self.threshold, storage.iter, self.num_iterations))
        features, kept = self.backbone(images, rule)  # [B, dim, h, w], bool [B, h, w] each
        logits = self.head(features)  # [B, C, h, w]
        losses = {"loss_ce": self.weights["loss_ce"] * pixel_loss(logits, targets, self.ignore_value)}
        for i, auxiliary in enumerate(rule.logits):
            losses[f"loss_aux_{i}"] = self.weights["loss_aux"] * pixel_loss(auxiliary, targets, self.ignore_value)
        for teacher in self._teacher:
            for name, loss in distillation_losses(teacher, images, features, logits).items():
                losses[name] = self.weights[name] * loss
        storage.put_scalar("threshold", rule.threshold)
        for i, going_on in enumerate(kept, 1):
            storage.put_scalar(f"kept@{i}", 100 * going_on.float().mean().item())
        return losses

    def set_teacher(self, teacher: "DoViT") -> None:
        """Adds losses that compare with a trained model of this architecture, which runs without stopping tokens."""
        self._teacher = (teacher.eval().requires_grad_(False),)  # a tuple: its weights are not part of this model

    def inference(self, batched_inputs: list[dict]) -> list[dict]:
        """Images of one size run together. Others run apart, because tokens see all of the image and its padding."""
        groups = defaultdict(list)
        for i, x in enumerate(batched_inputs):
            groups[tuple(-(-side // self.size_divisibility) for side in x["image"].shape[-2:])].append(i)
        results = {}
        for members in groups.values():
            results.update(zip(members, self.segment([batched_inputs[i] for i in members])))
        return [results[i] for i in range(len(batched_inputs))]

    def segment(self, batched_inputs: list[dict]) -> list[dict]:
        """The results of images with the same padded size."""
        images = self.preprocess(batched_inputs)
        features, kept = self.backbone(images.tensor, self.stop_rule())
        padded = tuple(images.tensor.shape[-2:])
        results = []
        for i, (logits, size, x) in enumerate(zip(self.head(features), images.image_sizes, batched_inputs)):
            wanted = (x.get("height", size[0]), x.get("width", size[1]))
            sem_seg = crop_and_resize(resize_masks(logits, padded), size, wanted)
            results.append({"sem_seg": sem_seg, "tokens": self.token_shares([k[i] for k in kept])})
        return results

    def stop_rule(self) -> "AuxiliaryRule | None":
        """The stop rule of inference. At a threshold of 1 there is none, and the auxiliary heads do not run."""
        return AuxiliaryRule(self.auxiliary_heads, self.threshold) if self.threshold < 1 else None

    def token_shares(self, kept: list[Tensor]) -> dict:
        """The `tokens` of an image's result; kept: bool [h, w] after each decision point, empty for a static model."""
        shares = [1.0] * self.backbone.num_decisions
        if kept:
            counts = torch.stack(kept).flatten(1).sum(1).tolist()
            shares = [n / kept[0].numel() for n in counts]
        return {"threshold": self.threshold, "kept": shares}


class AuxiliaryRule:
    """Stops tokens whose best probability in an auxiliary head exceeds the threshold. Keeps the logits for the loss."""

    def __init__(self, heads: Sequence[nn.Module], threshold: float):
        self.heads = heads
        self.threshold = threshold
        self.logits: list[Tensor] = []

    def __call__(self, point: int, features: Tensor) -> Tensor:
        logits = self.heads[point](features)
        self.logits.append(logits)
        return logits.detach().float().softmax(dim=1).amax(dim=1) > self.threshold


def annealed(threshold: float, iteration: int, num_iterations: int) -> float:
    """The threshold of an iteration. It falls linearly from 1 in the first iteration to its value in the last."""
    progress = min(1.0, iteration / max(1, num_iterations - 1))
    return 1 - (1 - threshold) * progress


def pixel_loss(logits: Tensor, targets: Tensor, ignore_value: int) -> Tensor:
    """Cross-entropy of logits [B, C, h, w], resized, and targets [B, H, W]. It is 0 if all pixels are ignored."""
    logits = F.interpolate(logits.float(), targets.shape[-2:], mode="bilinear", align_corners=False)  # [B, C, H, W]
    total = F.cross_entropy(logits, targets, ignore_index=ignore_value, reduction="sum")
    return total / (targets != ignore_value).sum().clamp(min=1)


def distillation_losses(teacher: DoViT, images: Tensor, features: Tensor, logits: Tensor) -> dict[str, Tensor]:
    """The distance of a model's last map and logits, both [B, C, h, w], from those of the teacher without stopping.

    loss_kl is the Kullback-Leibler divergence of the class probabilities, mean over tokens. loss_features is the mean
    squared difference of the maps.
    """
    with torch.no_grad():
        wanted, _ = teacher.backbone(images)
        target = teacher.head(wanted).float().log_softmax(dim=1)
    divergence = F.kl_div(logits.float().log_softmax(dim=1), target, reduction="none", log_target=True)
    return {
        "loss_kl": divergence.sum(dim=1).mean(),
        "loss_features": F.mse_loss(features.float(), wanted.float()),
    }
