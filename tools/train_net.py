"""Trains or evaluates a parent, an ECO model (Step A) or a DoViT.

Train:     tools/train_net.py --config-file configs/toy/maskformer2_toy.yaml
Resume:    the same with --resume
Evaluate:  tools/train_net.py --config-file C --eval-only MODEL.WEIGHTS model.pth
Processes: --num-gpus 8, or torchrun --nproc-per-node 8 tools/train_net.py ...; on the CPU if there is no GPU
With gate: ... --eval-only MODEL.WEIGHTS model.pth MODEL.ECO.POLICY LinearGate MODEL.ECO.GATE gate.pth
"""

import argparse
import sys

from eco_m2f.engine.command_line import argument_parser, launch, run


def main(args: argparse.Namespace) -> None:
    from eco_m2f.engine.evaluate import evaluate  # takes seconds, which --help must not
    from eco_m2f.engine.predict import build_trained
    from eco_m2f.engine.setup import setup
    from eco_m2f.engine.train import Trainer

    cfg = setup(args)
    if args.eval_only:
        evaluate(cfg, build_trained(cfg))
        return
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def build_parser() -> argparse.ArgumentParser:
    parser = argument_parser(__doc__)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR, if any")
    mode.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST")
    return parser


if __name__ == "__main__":
    sys.exit(run(launch, main, build_parser().parse_args()))
