"""Counts the parameters of a config's model, and its GFLOPs at each exit or share of tokens, without an image.

    tools/analyze_model.py --config-file configs/cityscapes/panoptic-segmentation/maskformer2_R50_bs16_90k.yaml \\
        --size 1024 2048 --json analysis.json
    # the mean over a dataset: a CSV with the columns height and width, one row per image
    tools/analyze_model.py --config-file configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml \\
        --sizes-csv coco_val2017_sizes.csv MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS 5
    # a DoViT: static, with 60, 40 and 30 % of the tokens going on after its decision points, and with the shares that
    # tools/sweep_thresholds.py measured, one row per threshold
    tools/analyze_model.py --config-file configs/toy/dovit_toy.yaml --size 96 96 --kept 0.6 0.4 0.3 \\
        --thresholds-csv thresholds.csv

Images of the CSV are resized by INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST and padded, as in evaluation. Their results are
resized back. The image of --size is only padded. eco_m2f/costs/exits.py describes what counts.
"""

import argparse
import json
import sys
from pathlib import Path

import detectron2
import torch

import eco_m2f
from eco_m2f.costs import CostTable, analyze, at_test_size, cost_table, format_report, read_image_sizes, read_shares
from eco_m2f.engine.command_line import HelpFormatter, run
from eco_m2f.engine.setup import build_model, load_cfg
from eco_m2f.files import atomic_write
from eco_m2f.modeling import DoViT


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="YAML file, see configs/")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="height and width of an image, in pixels")
    add("--sizes-csv", metavar="CSV", help="image sizes to take the mean over")
    add("--kept", type=float, nargs="+", metavar="SHARE", help="DoViT: shares of tokens after each decision point")
    add("--thresholds-csv", metavar="CSV", help="DoViT: shares measured by tools/sweep_thresholds.py")
    add("--json", metavar="OUT", help="also write the numbers to this JSON file")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config options, as MODEL.ECO.EXITS [2,4,6]")
    return parser


def main(args: argparse.Namespace) -> None:
    if not (args.size or args.sizes_csv):
        raise ValueError("nothing to analyze: give --size H W, --sizes-csv FILE or both")
    sizes = read_image_sizes(args.sizes_csv) if args.sizes_csv else []
    cfg = load_cfg(args.config_file, ["MODEL.DEVICE", "cpu", *args.opts])
    limits = (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    images = [(at_test_size(size, *limits), size) for size in sizes]
    model = build_model(cfg)
    costs = costs_of(model, args.kept, args.thresholds_csv)
    report = analyze(model, args.size, images, costs)
    print(format_report(report, costs))
    if args.json:
        source = {"config": args.config_file, "opts": args.opts, "sizes_csv": args.sizes_csv}
        versions = {module.__name__: module.__version__ for module in (eco_m2f, torch, detectron2)}
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.json, "w") as file:
            file.write(json.dumps({**source, **report, "versions": versions}, indent=2) + "\n")


def costs_of(model: torch.nn.Module, kept: list[float] | None, thresholds_csv: str | None) -> CostTable:
    """The costs of the model's exits, or of a DoViT's shares of tokens."""
    if not isinstance(model, DoViT):
        if kept or thresholds_csv:
            raise ValueError(f"--kept and --thresholds-csv need a DoViT: this is a {type(model).__name__}")
        return cost_table(model)
    shares = {" ".join(map(str, kept)): kept} if kept else {}
    return cost_table(model, shares | (read_shares(thresholds_csv) if thresholds_csv else {}))


if __name__ == "__main__":
    sys.exit(run(main, build_parser().parse_args()))
