"""Lists what is wrong with a panoptic dataset, or with a dataset of boxes (COCO's detection format).

The exit status is 0 if nothing was found, 1 if something was found, and 2 if the command is wrong.

tools/check_dataset.py toy_panoptic_train
tools/check_dataset.py --config-file configs/toy/maskformer2_toy.yaml --sample 50
tools/check_dataset.py cells --custom name=cells,images=cells/img,panoptic=cells/pan,json=cells/pan.json
tools/check_dataset.py coco_2017_val --config-file configs/coco/object-detection/detr_R50_bs16_500ep.yaml
tools/check_dataset.py --custom name=a,images=a,panoptic=ap,json=a.json --custom name=b,... --train a
"""

import argparse
import os
import sys
from pathlib import Path

from eco_m2f.data.annotations import Finding
from eco_m2f.data.check import check_dataset, examine_file, summary
from eco_m2f.data.datasets import parse_custom, register_from_config
from eco_m2f.data.datasets.paths import resolve
from eco_m2f.data.panoptic_map import DataError
from eco_m2f.data.schema import DETECTION, PANOPTIC
from eco_m2f.engine.command_line import run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="registered datasets (default: those of --config-file and --custom)")
    parser.add_argument("--config-file", help="use the datasets, DATASETS.CUSTOM and number of classes of this config")
    parser.add_argument("--custom", action="append", default=[], help="a DATASETS.CUSTOM entry; may be repeated")
    parser.add_argument("--train", help="training set; all others must have its categories (default: the config's)")
    parser.add_argument("--num-classes", type=int, help="the model's number of classes (default: the config's)")
    parser.add_argument("--sample", type=int, help="check the files of only this many images (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of --sample")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that read files")
    parser.add_argument("--lines", type=int, default=10, help="number of findings to show per kind")
    return parser


def main(args: argparse.Namespace) -> int:
    try:
        results = _check(args)
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            build_parser().error(str(error))
        print(f"a dataset that cannot be registered: 1 finding(s)\n  {error}")
        return 1
    except (ValueError, FileNotFoundError) as error:
        build_parser().error(str(error))
    for name, findings in results.items():
        print(f"{name}: {len(findings)} finding(s)" + (f"\n{summary(findings, args.lines)}" if findings else ""))
    return int(any(results.values()))


def _check(args: argparse.Namespace) -> dict[str, list[Finding]]:
    """The findings of each dataset."""
    custom, results = _register(args.custom, args.train)
    names, num_classes, reference = [*args.names, *custom], args.num_classes, args.train
    if args.config_file:
        from eco_m2f.engine.setup import load_cfg  # here, because it imports the models

        cfg = load_cfg(args.config_file)
        register_from_config(cfg.DATASETS.CUSTOM, cfg.DATASETS.TRAIN)  # all, or an error
        names = names or [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
        num_classes = num_classes or cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        reference = reference or next(iter(cfg.DATASETS.TRAIN), None)
    if not names and not results:
        raise ValueError("no dataset: give a name, --config-file or --custom")
    for name in dict.fromkeys(names):
        if name not in results:
            results[name] = check_dataset(
                name, num_classes, args.sample, args.seed, args.workers, reference=reference, tell=print
            )
    return results


def _register(specs: list[str], training: str | None) -> tuple[list[str], dict[str, list[Finding]]]:
    """The names of the --custom entries that could be registered, and the findings on those with a faulty JSON."""
    try:
        return register_from_config(specs, [training] if training else []), {}
    except DataError:
        pass
    names, results = [], {}
    for spec in specs:
        try:
            names += register_from_config([spec])
        except DataError:
            fields = parse_custom(spec)
            kind = DETECTION if "boxes" in fields else PANOPTIC
            json_file = resolve(fields["boxes"] if kind is DETECTION else fields["json"])
            if not Path(json_file).exists():
                raise
            results[fields["name"]] = examine_file(json_file, kind)[1]
    return names, results


if __name__ == "__main__":
    sys.exit(run(main, build_parser().parse_args()))
