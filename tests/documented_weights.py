"""Files with the names and the layouts of published weights, of small shapes and random values."""

from collections.abc import Sequence
from pathlib import Path

import torch
from minis import CONFIGS, fill
from torchvision.models import resnet50

from eco_m2f.checkpoint.published import read_backbone, resnet_name, write_backbone
from eco_m2f.engine.setup import build_model, load_cfg

COCO = "coco/panoptic-segmentation"
COCO_IDS = 91  # classes of the published DETR: category ids, not contiguous ones
CONVERTED = (  # what a config names, for which no page has the command
    "swin_tiny_patch4_window7_224.pkl",
    "swin_small_patch4_window7_224.pkl",
    "swin_base_patch4_window12_384_22k.pkl",
)


def write_published(folder: Path, small: Sequence[str]) -> None:
    """small: the KEY VALUE pairs of the models that load them."""
    folder.mkdir()
    swin = backbone(f"{COCO}/swin/maskformer2_swin_tiny_bs16_50ep.yaml", small)
    torch.save({"model": swin}, folder / "swin_tiny_patch4_window7_224.pth")
    for name in CONVERTED:
        write_backbone(folder / name, read_backbone(folder / "swin_tiny_patch4_window7_224.pth").weights)
    moby = {f"{name}.{k}": v for name in ("encoder", "encoder_k") for k, v in swin.items()}
    torch.save({"model": moby}, folder / "moby_swin_t_300ep_pretrained.pth")
    resnet = in_torchvisions_names(backbone(f"{COCO}/maskformer2_R50_bs16_50ep.yaml", small))
    torch.save(resnet, folder / "dino_resnet50_pretrain.pth")
    for name, config in (("detr-r50-e632da11", "detr_R50"), ("detr-r50-dc5-f0fb7ef5", "detr_R50_dc5")):
        torch.save({"model": detr(config, small)}, folder / f"{name}.pth")


def build(config: str, opts: Sequence[str]) -> torch.nn.Module:
    return fill(build_model(load_cfg(str(CONFIGS / config), [*opts, "MODEL.WEIGHTS", ""])))


def backbone(config: str, small: Sequence[str]) -> dict[str, torch.Tensor]:
    """The weights of a backbone. Swin's are without the norms of the maps, as the originals."""
    state = build(config, small).backbone.state_dict()
    return {k: v for k, v in state.items() if not k.startswith(("norm0", "norm1", "norm2", "norm3"))}


def in_torchvisions_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        names = list(resnet50().state_dict())
    return {name: state[ours] for name in names if (ours := resnet_name(name)) in state}


def detr(config: str, small: Sequence[str]) -> dict[str, torch.Tensor]:
    opts = [*small, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", COCO_IDS]
    state = build(f"coco/object-detection/{config}_bs16_500ep.yaml", opts).state_dict()
    body = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    head = {k.removeprefix("detr."): v for k, v in state.items() if k.startswith("detr.")}
    return head | {f"backbone.0.body.{k}": v for k, v in in_torchvisions_names(body).items()}
