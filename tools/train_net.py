#!/usr/bin/env python
"""Trains the parent, or an ECO model (Step A), and evaluates either.

Train:     tools/train_net.py --config-file configs/toy/maskformer2_toy.yaml
Resume:    the same with --resume
Evaluate:  tools/train_net.py --config-file C --eval-only MODEL.WEIGHTS model.pth
With gate: ... --eval-only MODEL.WEIGHTS model.pth MODEL.ECO.POLICY LinearGate MODEL.ECO.GATE gate.pth
"""

import sys

from detectron2.engine import default_argument_parser, launch

from eco_m2f import engine


def main(args) -> None:
    cfg = engine.setup(args)
    if args.eval_only:
        engine.evaluate(cfg, engine.build_trained(cfg))
        return
    trainer = engine.Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


if __name__ == "__main__":
    parser = default_argument_parser(__doc__)
    parser.formatter_class = engine.HelpFormatter
    args = parser.parse_args()
    sys.exit(engine.run(launch, main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (args,)))
