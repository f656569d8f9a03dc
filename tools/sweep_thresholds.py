"""Evaluates a DoViT at several thresholds: a table and a CSV of mIoU, tokens kept and GFLOPs saved.

    tools/sweep_thresholds.py --config-file configs/toy/dovit_toy.yaml --thresholds 0.9 0.95 0.98 1.0 \\
        --output output/toy/dovit/thresholds.csv MODEL.WEIGHTS output/toy/dovit/model_final.pth

A threshold of 1.0 is the static model. There is a row per threshold and dataset of DATASETS.TEST.
"""

import argparse
import sys
from pathlib import Path

from eco_m2f.engine.command_line import argument_parser, launch, run
from eco_m2f.files import prepare_output, write_csv


def main(args: argparse.Namespace) -> None:
    from detectron2.utils import comm  # takes seconds, which --help must not

    from eco_m2f.engine.evaluate import evaluate
    from eco_m2f.engine.predict import build_trained
    from eco_m2f.engine.setup import setup
    from eco_m2f.modeling import DoViT

    cfg = setup(args)
    if args.output:
        prepare_output(args.output)
    model = build_trained(cfg)
    if not isinstance(model, DoViT):
        raise ValueError(
            f"{args.config_file} is for {cfg.MODEL.META_ARCHITECTURE}, which has no threshold: give a config of DoViT"
        )
    rows = []
    for threshold in args.thresholds:
        model.threshold = threshold
        results = evaluate(cfg, model)
        if comm.is_main_process():
            by_name = {cfg.DATASETS.TEST[0]: results} if len(cfg.DATASETS.TEST) == 1 else results
            rows += [{"dataset": name, "mIoU": r["sem_seg"]["mIoU"], **r["tokens"]} for name, r in by_name.items()]
    if comm.is_main_process():
        report(rows, args.output)


def report(rows: list[dict], output: Path | None) -> None:
    """Prints the rows of the table, and writes them to `output`."""
    print("  ".join(rows[0]))
    for row in rows:
        print("  ".join(f"{v:>{len(k)}.4g}" if isinstance(v, float) else v for k, v in row.items()))
    if output:
        write_csv(output, rows)


def probability(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1")
    return float(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--thresholds", type=probability, nargs="+", required=True, help="thresholds in (0, 1]; 1.0 is the static model"
    )
    parser.add_argument("--output", type=Path, metavar="CSV", help="file for the table")
    return parser


if __name__ == "__main__":
    sys.exit(run(launch, main, build_parser().parse_args()))
