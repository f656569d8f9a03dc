"""Writes the derived dataset of a split: quality, feature and GFLOPs of each image at each exit (Step B).

MODEL.ECO.QUALITY names the quality: PQ, mIoU, AP of masks, or AP of boxes.

    tools/derive_dataset.py --config-file configs/toy/eco_maskformer2_toy.yaml --dataset toy_panoptic_train \\
        --output output/derived/train MODEL.WEIGHTS output/toy/eco/model_final.pth

If it is stopped, start it again, with any --num-gpus: it writes the missing shards. It refuses changed data, and a
folder that another run uses.
"""

import argparse
import sys

from eco_m2f.engine.command_line import argument_parser, launch, run


def main(args: argparse.Namespace) -> None:
    from eco_m2f.engine.derive import derive  # takes seconds, which --workers must not: they load this file, too
    from eco_m2f.engine.predict import build_trained
    from eco_m2f.engine.setup import setup

    cfg = setup(args)
    derive(
        cfg,
        build_trained(cfg, with_policy=False),
        args.dataset,
        args.output,
        args.shard_size,
        args.workers,
        args.hash_images,
        args.view,
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--dataset", required=True, help="registered name of the split, e.g. coco_2017_train_panoptic")
    add("--output", required=True, metavar="DIR", help="folder of the derived dataset")
    add("--shard-size", type=int, default=256, help="images per file; at most so many are repeated after a stop")
    add(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes per model that compare predictions with the ground truth",
    )
    add(
        "--hash-images",
        action="store_true",
        help="detect changed images by their bytes, not only by name and size: reads all of them once more",
    )
    add(
        "--view",
        choices=("plain", "mirrored"),
        default="plain",
        help="mirrored: the model sees each image mirrored, for tools/analyze_derived.py (default: plain)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run(launch, main, build_parser().parse_args()))
