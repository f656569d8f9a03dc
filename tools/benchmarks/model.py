"""Measures one image through a whole model with random weights, from pixels to the panoptic map, at several exits.

    python tools/benchmarks/model.py --threads 2 --exits 2 6 --output output/model_cpu.csv --config-file \\
        configs/coco/panoptic-segmentation/eco/eco_maskformer2_swin_tiny_bs16_50ep.yaml

The panoptic map has 20 queries. The deepest exit is also measured with the op in PyTorch (embedding_bag, grid_sample).
If transformers is installed and the backbone is Swin, its Mask2Former of the same sizes is measured. So are a batch of
the first and the last exit, and the gate alone. With --dtype all run under autocast. timing.py describes the timing.
"""

import argparse
import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import timing
import torch
from timing import DTYPES, OURS, positive
from torch import Tensor

from eco_m2f import ops
from eco_m2f.costs import ExitCosts
from eco_m2f.engine.command_line import run
from eco_m2f.engine.predict import compile_for_deployment
from eco_m2f.engine.setup import build_model, load_cfg
from eco_m2f.gates.gate import Gate
from eco_m2f.modeling.early_exits import policy_shapes
from eco_m2f.ops import module as op_module
from eco_m2f.policies.linear_gate import LinearGate

QUERIES = 20  # in the panoptic map; on COCO, about 20 of 100 queries have a class with a score above 0.8
PANOPTIC_ALONE = ("MODEL.MASK_FORMER.TEST.SEMANTIC_ON", False, "MODEL.MASK_FORMER.TEST.INSTANCE_ON", False)


class WholeModel:
    """A model and a random image. At each exit, the image's panoptic map has `QUERIES` queries."""

    def __init__(self, model: torch.nn.Module, size: tuple[int, int]):
        if not hasattr(model, "sem_seg_head"):
            raise ValueError(
                f"this benchmark segments images, which a {type(model).__name__} does not: give an eco config"
            )
        self.model = model
        self.image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
        images = model.preprocess([{"image": self.image}])
        self.sizes, self.features = images.image_sizes, model.backbone(images.tensor)
        predictions = model.sem_seg_head.forward_exits(self.features, model.exits)
        self.postprocessors = {
            k: replace(model.postprocessor, object_mask_threshold=score_threshold(pred["pred_logits"][0]))
            for k, pred in predictions.items()
        }
        self.gate = random_gate(model, images.tensor.device)

    def segment(self, exits: Sequence[int]) -> object:
        """The results of a batch with the image once per exit."""
        self.model.exit_policy = ListedExits(exits)
        self.model.postprocessor = self.postprocessors[exits[0]]
        height, width = self.image.shape[1:]
        return self.model([{"image": self.image, "height": height, "width": width}] * len(exits))

    def choose(self) -> Tensor:
        return self.gate(self.features, self.sizes)


def random_gate(model: torch.nn.Module, device: torch.device) -> LinearGate:
    res5 = policy_shapes(model.backbone, model.head)["res5"]
    gate = LinearGate(res5.channels, res5.stride, model.exits)
    weight, bias = torch.randn(len(model.exits), res5.channels), torch.zeros(len(model.exits))
    gate.use(Gate(weight.to(device), bias.to(device), model.exits, 0.0, "hard_ce", "res5", "0" * 64))
    return gate


class ListedExits(torch.nn.Module):
    """An exit policy that returns given exits."""

    def __init__(self, exits: Sequence[int]):
        super().__init__()
        self.exits = tuple(exits)

    def forward(self, features, image_sizes, image_ids=None) -> Tensor:
        return torch.tensor(self.exits)


def score_threshold(logits: Tensor) -> float:
    """The score above which `QUERIES` queries have a class; logits: [Q, C + 1]."""
    scores, labels = logits.float().softmax(-1).max(-1)
    scores = scores[labels != logits.shape[1] - 1].sort(descending=True).values
    return float(scores[min(QUERIES, len(scores) - 1)]) if len(scores) else 0.0


@torch.no_grad()
def model_contestants(
    cfg, size: tuple[int, int], exits: Sequence[int], compiled: bool = False
) -> dict[str, Callable[[], object]]:
    """Name -> a call that segments one image of `size` (height, width) in pixels; the deepest exit comes first.

    `compiled` compiles our model, and leaves out the op in PyTorch. Raises ValueError if the config does not have these
    exits.
    """
    whole = whole_model(cfg, size, exits)
    if compiled:
        compile_for_deployment(whole.model)
    exits = sorted(exits, reverse=True)
    table = {f"{OURS} exit {k}": functools.partial(whole.segment, [k]) for k in exits}
    if not compiled:
        table |= with_op_in_pytorch(whole, exits[0])
    if importlib.util.find_spec("transformers") and cfg.MODEL.BACKBONE.NAME == "D2SwinTransformer":
        table["transformers"] = transformers_model(cfg, whole.image)
    if len(exits) > 1:
        table["mixed batch"] = functools.partial(whole.segment, [exits[-1], exits[0]])
    table["gate"] = whole.choose
    return table


def whole_model(cfg, size: tuple[int, int], exits: Sequence[int]) -> WholeModel:
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    known = list(getattr(model, "exits", ()))
    if not set(exits) <= set(known):
        raise ValueError(f"--exits {list(exits)}: this config has the exits {known}; take an eco config and its exits")
    return WholeModel(model, size)


def with_op_in_pytorch(whole: WholeModel, exit: int) -> dict[str, Callable[[], object]]:
    """The whole model with the op in PyTorch, in two ways."""
    functions = {"embedding_bag": ops.reference_ms_deform_attn, "grid_sample": ops.grid_sample_ms_deform_attn}
    segment = functools.partial(whole.segment, [exit])
    return {f"{OURS} exit {exit}, op {name}": op_replaced_by(f)(segment) for name, f in functions.items()}


@contextlib.contextmanager
def op_replaced_by(function: Callable) -> Iterator[None]:
    """Makes all attention modules call `function` instead of the compiled op."""
    saved = op_module.ONE_PASS_ON_CPU, op_module.ms_deform_attn
    op_module.ONE_PASS_ON_CPU, op_module.ms_deform_attn = False, function
    try:
        yield
    finally:
        op_module.ONE_PASS_ON_CPU, op_module.ms_deform_attn = saved


def transformers_model(cfg, image: Tensor) -> Callable[[], object]:
    """transformers' Mask2Former of the same sizes, with its panoptic post-processing."""
    from transformers import Mask2FormerForUniversalSegmentation
    from transformers.models.mask2former.image_processing_mask2former import Mask2FormerImageProcessor

    model = Mask2FormerForUniversalSegmentation(transformers_config(cfg)).eval().to(cfg.MODEL.DEVICE)
    processor = Mask2FormerImageProcessor()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    height, width = image.shape[1:]

    def predict():
        pixels = ((image - mean) / std)[None].to(cfg.MODEL.DEVICE)
        return model(pixel_values=torch.nn.functional.pad(pixels, (0, -width % 32, 0, -height % 32)))

    threshold = score_threshold(predict().class_queries_logits[0])

    def segment() -> object:
        sizes = [(height, width)]
        return processor.post_process_panoptic_segmentation(predict(), threshold=threshold, target_sizes=sizes)

    return segment


def transformers_config(cfg):
    """The sizes of our model, as a config of the package transformers."""
    from transformers import Mask2FormerConfig, SwinConfig

    swin, head, former = cfg.MODEL.SWIN, cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    backbone = SwinConfig(
        image_size=swin.PRETRAIN_IMG_SIZE,
        embed_dim=swin.EMBED_DIM,
        depths=list(swin.DEPTHS),
        num_heads=list(swin.NUM_HEADS),
        window_size=swin.WINDOW_SIZE,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=head.NUM_CLASSES,
        hidden_dim=former.HIDDEN_DIM,
        feature_size=head.CONVS_DIM,
        mask_feature_size=head.MASK_DIM,
        encoder_layers=head.TRANSFORMER_ENC_LAYERS,
        encoder_feedforward_dim=1024,
        dim_feedforward=former.DIM_FEEDFORWARD,
        decoder_layers=former.DEC_LAYERS,
        num_queries=former.NUM_OBJECT_QUERIES,
    )


def model_figures(rows: list[dict], costs: dict[int, dict[str, float]], exits: Sequence[int]) -> list[str]:
    """Lines on early exits: the saving, a batch of mixed exits, and the gate."""
    first, last, wall = min(exits), max(exits), {row["contestant"]: float(row["wall_ms"]) for row in rows}
    if first == last:
        return []
    early, late = wall[f"{OURS} exit {first}"], wall[f"{OURS} exit {last}"]
    saved, promised = 1 - early / late, 1 - costs[first]["total_full"] / costs[last]["total_full"]
    encoder = (late - early) / (last - first) * last
    return [
        f"wall-clock saved at exit {first}: {saved:.3f}, GFLOPs saved: {promised:.3f}, quotient {saved / promised:.2f}",
        f"a batch of exits {first} and {last} over the sum of both alone: {wall['mixed batch'] / (early + late):.3f}",
        f"the gate over the encoder's {last} layers ({encoder:.0f} ms): {wall['gate'] / encoder:.5f}",
    ]


def build_parser() -> argparse.ArgumentParser:
    parser = timing.argument_parser(__doc__, rounds=5)
    timing.add_model_options(parser, "an EcoMaskFormer", [800, 1216])
    parser.add_argument("--exits", type=positive, nargs="+", default=[2, 6])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="for autocast")
    parser.add_argument("--compile", action="store_true", help="compile our model with torch.compile")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config options")
    return parser


def main(args: argparse.Namespace) -> None:
    timing.prepare(args)
    timing.keep_freed_memory(args.device)
    cfg = load_cfg(args.config_file, ["MODEL.DEVICE", args.device, *PANOPTIC_ALONE, *args.opts])
    contestants = model_contestants(cfg, tuple(args.size), args.exits, args.compile)
    with torch.autocast(args.device, DTYPES[args.dtype], enabled=args.dtype != "float32"):
        rows = timing.measure(contestants, args.rounds, args.device)
    print("\n".join(map(timing.as_line, rows)))
    model = contestants["gate"].__self__.model
    for figure in model_figures(rows, ExitCosts(model, model.exits).details(args.size), args.exits):
        print(figure)
    options = {"dtype": args.dtype, "compiled": args.compile}
    setting = {**timing.model_setting(args), "config": " ".join([args.config_file, *args.opts]), **options}
    timing.save(args, [{**setting, **row} for row in rows])


if __name__ == "__main__":
    sys.exit(run(main, build_parser().parse_args()))
