"""Generates the toy set in COCO panoptic format. A second run with the same parameters does nothing."""

import argparse
import sys

from eco_m2f.data.datasets.builtin import datasets_root
from eco_m2f.data.toy import ToySpec, make_toy_dataset
from eco_m2f.engine.command_line import run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", default=str(datasets_root() / "toy"), help="folder to write")
    parser.add_argument("--num-train", type=int, default=ToySpec.num_train, help="number of training images")
    parser.add_argument("--num-val", type=int, default=ToySpec.num_val, help="number of validation images")
    parser.add_argument("--size", type=int, default=ToySpec.size, help="side of the images, pixels")
    parser.add_argument("--seed", type=int, default=ToySpec.seed, help="seed of all random numbers")
    parser.add_argument("--overwrite", action="store_true", help="replace a toy set with other parameters")
    return parser


def main(args: argparse.Namespace) -> None:
    spec = ToySpec(args.num_train, args.num_val, args.size, args.seed)
    written = make_toy_dataset(args.output, spec, args.overwrite)
    print(f"{args.output}: {'written' if written else 'already there with these parameters'}")


if __name__ == "__main__":
    sys.exit(run(main, build_parser().parse_args()))
