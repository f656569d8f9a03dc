"""Lists what is wrong with a panoptic dataset, or one of boxes (COCO's detection format); exit code 1 if anything is.

tools/check_dataset.py toy_panoptic_train
tools/check_dataset.py --config-file configs/toy/maskformer2_toy.yaml --sample 50
tools/check_dataset.py cells --custom name=cells,images=cells/img,panoptic=cells/pan,json=cells/pan.json
tools/check_dataset.py coco_2017_val --config-file configs/coco/object-detection/detr_R50_bs16_500ep.yaml
"""

import argparse
import os
import sys

from eco_m2f.data.check import check_dataset, summary
from eco_m2f.data.datasets import register_from_config


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="registered datasets (default: those of --config-file and --custom)")
    parser.add_argument("--config-file", help="take datasets, DATASETS.CUSTOM and the number of classes from here")
    parser.add_argument("--custom", action="append", default=[], help="a DATASETS.CUSTOM entry; may be repeated")
    parser.add_argument("--num-classes", type=int, help="what the model has (default: that of --config-file)")
    parser.add_argument("--sample", type=int, help="look into the files of this many images only (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that read files")
    parser.add_argument("--lines", type=int, default=10, help="findings shown per kind")
    return parser


def main() -> int:
    parser = build_parser()
    args = parser.parse_args()
    try:
        names, num_classes = _datasets(args)
        if not names:
            parser.error("no dataset: give a name, --config-file or --custom")
        results = {n: check_dataset(n, num_classes, args.sample, args.seed, args.workers) for n in names}
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    for name, findings in results.items():
        print(f"{name}: {len(findings)} finding(s)" + (f"\n{summary(findings, args.lines)}" if findings else ""))
    return int(any(results.values()))


def _datasets(args: argparse.Namespace) -> tuple[list[str], int | None]:
    """The names to check, each once, and the model's number of classes."""
    names, num_classes = [*args.names, *register_from_config(args.custom)], args.num_classes
    if args.config_file:
        from eco_m2f.engine import load_cfg  # only here: it pulls in the models

        cfg = load_cfg(args.config_file)
        register_from_config(cfg.DATASETS.CUSTOM)  # all of them, or a message about what is missing
        names = names or [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
        num_classes = num_classes or cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    return list(dict.fromkeys(names)), num_classes


if __name__ == "__main__":
    sys.exit(main())
