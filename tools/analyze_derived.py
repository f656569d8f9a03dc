"""Shows how much any gate could win on a derived dataset, and how much of it is chance.

    tools/analyze_derived.py --train derived/train --val derived/val --second derived/val_mirrored --beta 0.003

All numbers are mean utilities, quality minus beta times the exit, in points over the best fixed exit. Intervals are of
95 %, from a bootstrap over the images. Images and parent are not needed.

  targets      the exit targets on --val: no gate gains more there
  both views   the exit targets, as a mean over --val and --second
  survives     the exit targets of one view, rated on the other view: the rest is chance
  predictable  ridge regression on the features of --train, out of fold
  gate         the gate of tools/train_gate.py, fitted on --train, rated on --val
"""

import argparse
import math
import sys

from eco_m2f.derived.dataset import DerivedDataset
from eco_m2f.engine.command_line import give_back_freed_memory, run
from eco_m2f.exits import exits_up_to
from eco_m2f.files import prepare_output, write_csv
from eco_m2f.gates import potential
from eco_m2f.gates.frontier import check_pair
from eco_m2f.gates.potential import Estimate, Predictable, Survival

Row = tuple[str, Estimate, int]  # what it is of, its gain, the number of images


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", required=True, metavar="DIR", help="derived dataset to fit on, from tools/derive_dataset.py")
    add("--val", required=True, metavar="DIR", help="derived dataset to rate exit targets and the gate on")
    add("--second", metavar="DIR", help="derived dataset of the images of --val, made with --view mirrored")
    add("--beta", type=float, required=True, help="price of an encoder layer in quality (COCO: 0.0005)")
    add("--max-exit", type=int, metavar="K", help="deepest exit to choose (default: the last)")
    add("--seed", type=int, default=0, help="of the folds, the bootstrap and the fit (default: 0)")
    add("--output", metavar="CSV", help="file for the table and R2")
    return parser


def main(args: argparse.Namespace) -> None:
    give_back_freed_memory()
    if args.output:
        prepare_output(args.output)
    train, val = DerivedDataset.load(args.train), DerivedDataset.load(args.val)
    second = DerivedDataset.load(args.second, with_features=False) if args.second else None
    check_pair(train, val)
    if second:
        potential.check_views(val, second)
    max_exit = args.max_exit or train.exits[-1]
    exits = exits_up_to(train.exits, max_exit)
    u_train, u_val = (potential.utilities(dataset, args.beta, max_exit) for dataset in (train, val))
    rows: list[Row] = [("targets", potential.oracle_gain(u_val, args.seed), len(val))]
    survival = None
    if second:
        survival = potential.survival(u_val, potential.utilities(second, args.beta, max_exit), args.seed)
        rows += [("both views", survival.gain, len(val)), ("survives", survival.survives, len(val))]
    found = potential.predictable(train.features, u_train, exits, args.seed)
    gate = potential.gate_gain(train, val, args.beta, max_exit, seed=args.seed)
    rows += [("predictable", found.gain, len(train)), ("gate", gate, len(val))]
    fixed = exits[potential.best_fixed(u_val)]
    print(f"beta {args.beta:g}, K {max_exit}, {val.quality_name}; the best fixed exit on --val is {fixed}")
    print("             gain    from    to      images")
    for name, gain, images in rows:
        print(f"{name:12} {gain.value:<+7.2f} {gain.low:<+7.2f} {gain.high:<+7.2f} {images}")
    print("R2           " + "  ".join(f"exit {k}: {value:.3f}" for k, value in found.r2.items()))
    print(*sentences(rows[0][1], survival, second and second.view, found, gate), sep="\n")
    if args.output:
        write_csv(args.output, list(lines(args.beta, max_exit, rows, found)))
        print(f"saved {args.output}")


def sentences(
    oracle: Estimate, survival: Survival | None, view: str | None, found: Predictable, gate: Estimate
) -> list[str]:
    """What the numbers say, a plain sentence for each."""
    said = [f"With the exit targets, images of --val gain {oracle.value:.2f} points over the best fixed exit."]
    if survival:
        gain, vanish = survival.gain.value, survival.gain.value - survival.survives.value
        part = "all" if vanish >= gain else f"{vanish:.2f}"
        rest = "" if survival.survives.low > 0 else " It is not proven that any survives."
        said.append(
            f"Of the {gain:.2f} points that the exit targets gain on both views, {part} vanish when they are chosen "
            f"on the other view ({view}): they are chance.{rest}"
        )
    said.append(_predicted(found))
    doubt = "" if gate.low > 0 else f". That is not proven: the interval reaches down to {gate.low:+.2f}"
    return [*said, f"The gate gains {gate.value:.2f} points on --val{doubt}."]


def _predicted(found: Predictable) -> str:
    gain, oracle = f"{found.gain.value:.2f}", f"{found.oracle.value:.2f}"
    if found.gain.low > 0:
        return f"The features predict {gain} of the {oracle} points that the exit targets gain on --train."
    return (
        f"The features predict nothing that is proven: ridge regression gains {gain} points on --train, where the "
        f"exit targets gain {oracle}."
    )


def lines(beta: float, max_exit: int, rows: list[Row], found: Predictable):
    """The lines of the CSV: the gains, and R2 of each exit."""
    budget = {"beta": beta, "max_exit": max_exit}
    for name, gain, images in rows:
        numbers = {"value": gain.value, "low": gain.low, "high": gain.high, "images": images}
        yield {**budget, "name": name, "exit": "", **numbers}
    for k, value in found.r2.items():
        numbers = {"value": value, "low": math.nan, "high": math.nan, "images": rows[-2][2]}
        yield {**budget, "name": "r2", "exit": k, **numbers}


if __name__ == "__main__":
    sys.exit(run(main, build_parser().parse_args()))
