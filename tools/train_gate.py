"""Step C: fit the gate of a budget on a derived dataset, measure it, and save it beside the parent.

    # one gate
    tools/train_gate.py --train derived/train --val derived/val --beta 0.0005 --output gate.pth
    # the frontier over beta and K: gate_beta0.0001_K6.pth, ... and a table
    tools/train_gate.py --train derived/train --val derived/val --beta 0.0001 0.0005 0.002 --max-exit 6 5 \\
        --output gate.pth --frontier frontier.csv
    # the best gate within a cost, or the cheapest within a loss of quality
    tools/train_gate.py --train derived/train --val derived/val --target-gflops 120 --output gate.pth

No images and no parent are needed. PQ and GFLOPs are exact for the images of --val: sums over the derived dataset.
Of boxes the quality is the mean over the images of each one's AP, and takes the place of PQ.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from eco_m2f.budget import HEADER, Row, format_row, frontier, search_budget, write_csv
from eco_m2f.command_line import give_back_freed_memory, run
from eco_m2f.derived import DerivedDataset
from eco_m2f.exits import GATE_LOSSES
from eco_m2f.gate import OPTIMIZERS

HELD_OUT = 0.1  # of the training images, where there is no --val


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", required=True, metavar="DIR", help="derived dataset to fit on, from tools/derive_dataset.py")
    add("--val", metavar="DIR", help="derived dataset to measure on; without it a tenth of --train is held out")
    add("--output", required=True, metavar="gate.pth", help="the gate; of several, beta and K are put into the name")
    add("--max-exit", type=int, nargs="+", metavar="K", help="largest exit a gate may choose (default: the last)")
    add("--loss", nargs="+", choices=sorted(GATE_LOSSES), default=["hard_ce"], help="default: hard_ce, the paper's")
    add("--frontier", metavar="frontier.csv", help="write the table of everything measured")
    add("--optimizer", choices=OPTIMIZERS, default="lbfgs", help="lbfgs: to the optimum (default); adam: the paper's")
    add("--l2", type=float, help="weight of the penalty on the gate's weights, lbfgs only (default: channels / images)")
    add("--seed", type=int, default=0)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--beta", type=float, nargs="+", help="what an encoder layer costs in quality (COCO: 0.0005)")
    budget.add_argument("--target-gflops", type=float, metavar="G", help="find beta: mean GFLOPs on --val at most G")
    budget.add_argument(
        "--max-pq-drop", type=float, metavar="D", help="find beta: PQ (or mean AP) on --val at most D points lower"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.beta and (len(args.max_exit or ()) > 1 or len(args.loss) > 1):
        parser.error("a search takes one --max-exit and one --loss")
    give_back_freed_memory()
    train, val = load(args)
    max_exits = args.max_exit or [train.exits[-1]]
    options = {"optimizer": args.optimizer, "l2": args.l2, "seed": args.seed}
    about = (
        f"{len(train)} images to fit on, {len(val)} to measure on, exits {list(train.exits)}, quality {train.measure}"
    )
    print(f"{about}\n{HEADER}", flush=True)
    if args.beta:
        rows = show(frontier(train, val, args.beta, max_exits, args.loss, **options))
        best = [row for row in rows if row.gate]
    else:
        limits = {"target_gflops": args.target_gflops, "max_pq_drop": args.max_pq_drop}
        found, rows = search_budget(train, val, max_exits[0], args.loss[0], **limits, **options)
        show(rows)
        best = [found]
    for row in best:
        path = gate_path(args.output, row, alone=len(best) == 1)
        row.gate.save(path)
        quality = f"{train.measure} {row.score:.2f}"
        print(f"saved {path}: beta {row.beta:.4g}, K {row.max_exit}, {row.total_gflops:.2f} GFLOPs, {quality}")
    if args.frontier:
        write_csv(rows, args.frontier)
        print(f"saved {args.frontier}")


def load(args: argparse.Namespace) -> tuple[DerivedDataset, DerivedDataset]:
    train = DerivedDataset.load(args.train)
    if args.val:
        return train, DerivedDataset.load(args.val)
    order = np.random.default_rng(args.seed).permutation(len(train))
    held_out = max(1, round(HELD_OUT * len(train)))
    return train.subset(np.sort(order[held_out:])), train.subset(np.sort(order[:held_out]))


def show(rows) -> list[Row]:
    """Prints each row as it comes."""
    shown = []
    for row in rows:
        print(format_row(row), flush=True)
        shown.append(row)
    return shown


def gate_path(output: str, row: Row, alone: bool) -> Path:
    path = Path(output)
    if alone:
        return path
    loss = "" if row.loss == "hard_ce" else f"_{row.loss}"
    return path.with_name(f"{path.stem}_beta{row.beta:g}_K{row.max_exit}{loss}{path.suffix}")


if __name__ == "__main__":
    sys.exit(run(main))
