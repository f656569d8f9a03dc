"""Fits gates on a derived dataset, computes their quality and GFLOPs, and saves them (Step C).

    # one gate
    tools/train_gate.py --train derived/train --val derived/val --beta 0.0005 --output gate.safetensors
    # the frontier over beta and K: gate_beta0.0001_K6.safetensors, ... and a table
    tools/train_gate.py --train derived/train --val derived/val --beta 0.0001 0.0005 0.002 --max-exit 6 5 \\
        --output gate.safetensors --frontier frontier.csv
    # the best gate or fixed exit within a limit of GFLOPs; with --max-pq-drop the cheapest within a loss of quality
    tools/train_gate.py --train derived/train --val derived/val --target-gflops 120 --output gate.safetensors
    # beta, K, loss and optimizer from MODEL.ECO of a config (the paper's for COCO and Cityscapes); options override it
    tools/train_gate.py --train derived/train --val derived/val --output gate.safetensors \\
        --config-file configs/coco/panoptic-segmentation/eco/eco_maskformer2_R50_bs16_50ep.yaml

A name that ends in .safetensors gives a file of that format, any other name PyTorch's archive.

The table shows each gate beside fixed exits, exit targets and the mixture. The mixture sends images to fixed exits at
random, at the gate's mean GFLOPs. The gain over it has a 95 % interval and a p value, from a paired bootstrap over the
images of --val. Lines below say which gates beat the mixture.

With --target-gflops or --max-pq-drop a fixed exit or a mixture may be best; the tool then says so. A fixed exit is
saved as a gate that sends every image there. A mixture cannot be a gate: the best gate or fixed exit is saved instead.

Images and parent are not needed. Quality and GFLOPs are exact for the images of --val, because they are sums over the
derived dataset. AP is no such sum: the mean over the images is used.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from eco_m2f.derived.dataset import DerivedDataset
from eco_m2f.engine.command_line import give_back_freed_memory, run
from eco_m2f.exits import GATE_LOSSES
from eco_m2f.files import write_csv
from eco_m2f.gates.fit import OPTIMIZERS, AdamOptions
from eco_m2f.gates.frontier import Row, format_row, frontier, header
from eco_m2f.gates.search import search_budget
from eco_m2f.gates.verdict import conclusion, verdict

HELD_OUT = 0.1  # share of the training images, without --val


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", required=True, metavar="DIR", help="derived dataset to fit on, from tools/derive_dataset.py")
    add("--val", metavar="DIR", help="derived dataset for quality and GFLOPs; default: a tenth of --train is held out")
    add(
        "--output",
        required=True,
        metavar="gate.safetensors",
        help="file of the gate; for several gates beta and K are added to the name",
    )
    add("--config-file", metavar="FILE", help="YAML file with beta, K, loss and optimizer in MODEL.ECO, see configs/")
    add("--max-exit", type=int, nargs="+", metavar="K", help="deepest exit that a gate may choose (default: the last)")
    add("--loss", nargs="+", choices=sorted(GATE_LOSSES), help="gate loss (default: hard_ce, the paper's)")
    add("--frontier", metavar="frontier.csv", help="write all rows of the frontier to this file")
    add("--optimizer", choices=OPTIMIZERS, help="lbfgs runs to the optimum (default); adam is the paper's")
    add("--adam-lr", type=float, metavar="LR", help="adam's learning rate (default: 0.003), which falls to 0")
    add("--adam-batch", type=int, metavar="N", help="images per step of adam (default: 256)")
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument(
        "--adam-epochs", type=int, metavar="N", help="passes of adam over --train (default: 10, but at least 300 steps)"
    )
    steps.add_argument("--adam-iterations", type=int, metavar="N", help="steps of adam, instead of epochs")
    add("--l2", type=float, help="weight penalty, lbfgs only (default: channels / images)")
    add("--seed", type=int, default=0, help="of the held-out images and of the fit (default: 0)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--beta", type=float, nargs="+", help="price of an encoder layer in quality (COCO: 0.0005)")
    budget.add_argument("--target-gflops", type=float, metavar="G", help="search: mean GFLOPs on --val are at most G")
    budget.add_argument(
        "--max-pq-drop",
        type=float,
        metavar="D",
        help="search: the quality on --val is at most D points below the last exit's",
    )
    return parser


def complete(args: argparse.Namespace) -> None:
    """Fills in options that are not given, from --config-file or defaults. Refuses contradictory options."""
    parser = build_parser()
    args.searched = args.target_gflops is not None or args.max_pq_drop is not None
    if not (args.config_file or args.beta or args.searched):
        parser.error("one of --beta, --target-gflops, --max-pq-drop and --config-file is needed")
    adam_alone = [name for name in vars(args) if name.startswith("adam_") and getattr(args, name) is not None]
    fill_in(args)
    if args.optimizer != "adam" and adam_alone:
        parser.error(f"--{adam_alone[0].replace('_', '-')} is only for --optimizer adam")
    if args.searched and (len(args.max_exit or ()) > 1 or len(args.loss) > 1):
        parser.error("a search takes one --max-exit and one --loss")


def main(args: argparse.Namespace) -> None:
    complete(args)
    give_back_freed_memory()
    train, val = load(args)
    check_derived_with(args, train)
    kind = train.quality_kind
    about = f"{len(train)} images to fit on, {len(val)} to evaluate on, exits {list(train.exits)}, quality {kind.name}"
    print(f"{about}\n{header(val)}", flush=True)
    rows, best = fit(args, train, val)
    by_quality = args.target_gflops is not None
    lines = conclusion(best[0], rows, by_quality, kind.name) if args.searched else verdict(rows, kind.name)
    print(*lines, sep="\n")
    for row in best:
        path = gate_path(args.output, row, alone=len(best) == 1)
        row.gate.save(path)
        words = f"fixed exit {row.max_exit}" if row.beta is None else f"beta {row.beta:.4g}, K {row.max_exit}"
        print(f"saved {path}: {words}, {row.total_gflops:.2f} GFLOPs, {kind.name} {row.score:.2f}")
    if args.frontier:
        write_csv(args.frontier, [row.numbers() for row in rows])
        print(f"saved {args.frontier}")


def fit(args: argparse.Namespace, train: DerivedDataset, val: DerivedDataset) -> tuple[list[Row], list[Row]]:
    """All frontier rows, printed as they come, and those whose gates are saved."""
    max_exits = args.max_exit or [train.exits[-1]]
    adam = AdamOptions(args.adam_lr, args.adam_batch, args.adam_epochs, args.adam_iterations)
    options = {"optimizer": args.optimizer, "l2": args.l2, "seed": args.seed, "adam": adam}
    if not args.searched:
        rows = show(frontier(train, val, args.beta, max_exits, args.loss, **options), train.quality_kind)
        return rows, [row for row in rows if row.gate]
    limits = {"target_gflops": args.target_gflops, "max_pq_drop": args.max_pq_drop}
    found, rows = search_budget(train, val, max_exits[0], args.loss[0], **limits, **options)
    return show(rows, train.quality_kind), [found]


def fill_in(args: argparse.Namespace) -> None:
    """Fills in options that are not given: from --config-file, or without it the defaults."""
    adam = AdamOptions()
    settings = {"loss": ["hard_ce"], "optimizer": "lbfgs", **{f"adam_{k}": v for k, v in vars(adam).items()}}
    if args.config_file:
        from eco_m2f.engine.setup import (  # this import takes seconds
            gate_settings,
            load_cfg,
        )

        settings = gate_settings(load_cfg(args.config_file))
    if args.adam_epochs or args.adam_iterations:  # one option overrides both
        settings |= {"adam_epochs": 0, "adam_iterations": 0}
    for name, value in settings.items():
        if getattr(args, name, None) is None and not (name == "beta" and args.searched):
            setattr(args, name, value)
    unknown = sorted(set(args.loss) - set(GATE_LOSSES))
    if unknown:
        raise ValueError(f"MODEL.ECO.LOSS is {unknown[0]!r}: choose one of {', '.join(sorted(GATE_LOSSES))}")


def check_derived_with(args: argparse.Namespace, train: DerivedDataset) -> None:
    """Raises ValueError if --config-file has other exits or another feature than the derived dataset."""
    for name, key in (("exits", "EXITS"), ("feature_source", "FEATURE")):
        if args.config_file and getattr(args, name) != train.provenance[name]:
            raise ValueError(
                f"MODEL.ECO.{key} is {getattr(args, name)} in {args.config_file}, but {train.provenance[name]} in "
                f"{args.train}: give the config of that dataset"
            )


def load(args: argparse.Namespace) -> tuple[DerivedDataset, DerivedDataset]:
    """The derived datasets to fit on and to evaluate on."""
    train = DerivedDataset.load(args.train)
    if args.val:
        return train, DerivedDataset.load(args.val)
    order = np.random.default_rng(args.seed).permutation(len(train))
    held_out = max(1, round(HELD_OUT * len(train)))
    return train.subset(np.sort(order[held_out:])), train.subset(np.sort(order[:held_out]))


def show(rows: Iterable[Row], kind: type) -> list[Row]:
    """Prints each frontier row as it comes."""
    shown = []
    for row in rows:
        print(format_row(row, kind), flush=True)
        shown.append(row)
    return shown


def gate_path(output: str, row: Row, alone: bool) -> Path:
    """The file of a gate. alone: it is the only one, so its name needs no budget."""
    path = Path(output)
    if alone:
        return path
    loss = "" if row.loss == "hard_ce" else f"_{row.loss}"
    return path.with_name(f"{path.stem}_beta{row.beta:g}_K{row.max_exit}{loss}{path.suffix}")


if __name__ == "__main__":
    sys.exit(run(main, build_parser().parse_args()))
