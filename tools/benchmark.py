#!/usr/bin/env python3
"""Measures speed; each subcommand measures one thing and writes a CSV that names the versions and the machine.

    python tools/benchmark.py op --threads 2 --rounds 15 --output output/op_cpu.csv
    python tools/benchmark.py op --threads 2 --rounds 15 --from-logits --output output/op_cpu_from_logits.csv
    python tools/benchmark.py op --device cuda --dtype float16 --rounds 50 --output output/op_cuda.csv
    python tools/benchmark.py dovit --threads 2 --config-file \\
        configs/cityscapes/semantic-segmentation/dovit/dovit_vit_base_naive_bs16_90k.yaml --output output/dovit_cpu.csv
    python tools/benchmark.py model --threads 2 --exits 2 6 --config-file \\
        configs/coco/panoptic-segmentation/eco/eco_maskformer2_swin_tiny_bs16_50ep.yaml --output output/model_cpu.csv

op: the deformable attention alone, against PyTorch's own operators and, where it is installed, torch-ms-deform-attn.
With --from-logits the softmax and the sampling locations belong to it, and the fused op takes part.

model: one image through a whole model with random weights, from pixels to the panoptic map (of 20 queries), at each of
--exits; at the deepest also with the op in PyTorch (embedding_bag, grid_sample); transformers' Mask2Former of the same
sizes, where that is installed and the backbone is Swin; a batch of the first and the last exit; the gate alone. With
--dtype all of them run under autocast.

step_a: a training step with 1, 2 and all exits, all graphs at once (joint) or exits decoded again in the backward pass
(recompute): seconds, and the peak of memory above that before the first step. Each setting has a process of its own.
step_b: one image derived at all exits in one pass, against one evaluation per exit; and the per-image PQ of 5 exits.
step_c: fitting gates on generated features; by default as many as COCO has images, and the frontier of 240 gates.
dovit: images per second through a whole DoViT with random weights, of whose tokens a given share, drawn at random,
stops at the first decision point; 0 is the static model. The auxiliary heads run all the same where tokens stop.

All contestants take turns within each round, so that a busy machine slows them alike. Times are medians over the
rounds: wall time, and on a CPU also the CPU time of the process, which neighbours disturb less. A ratio is the median
of the rounds' quotients, contestant over eco_m2f: above 1 where eco_m2f is faster. The bound is the time that only
moving each input and output once would take, at the speed of copying memory, measured in the same run.
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import math
import multiprocessing
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eco_m2f import ops
from eco_m2f.engine.command_line import give_back_freed_memory, keep_freed_memory, run
from eco_m2f.files import prepare_output, write_csv
from eco_m2f.ops.fused import compose

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OURS = "eco_m2f"
COPY_BYTES = 2**28  # beyond every cache


@dataclass(frozen=True)
class Shape:
    """Sizes of one model's call; `queries` 0 means one per token, as in an encoder."""

    levels: tuple[tuple[int, int], ...]
    queries: int = 0
    points: int = 4
    heads: int = 8
    channels: int = 32

    @property
    def tokens(self) -> int:
        return sum(h * w for h, w in self.levels)


DETR_LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))
SHAPES = {
    "mask2former-cityscapes": Shape(((32, 64), (64, 128), (128, 256))),  # 1024 x 2048 pixels
    "mask2former-coco": Shape(((25, 42), (50, 84), (100, 167))),  # 800 x 1333
    "mask2former-coco-train": Shape(((32, 32), (64, 64), (128, 128))),  # 1024 x 1024
    "deformable-detr-encoder": Shape(DETR_LEVELS),  # 800 x 1333
    "deformable-detr-decoder": Shape(DETR_LEVELS, queries=300),
    "rt-detr-decoder": Shape(((80, 80), (40, 40), (20, 20)), queries=300),  # 640 x 640
}


@dataclass
class OpInputs:
    """Arguments of one call, before and after the softmax and the locations, and the gradient that comes back."""

    shape: Shape
    value: Tensor
    offsets: Tensor
    logits: Tensor
    reference: Tensor
    locations: Tensor
    weights: Tensor
    grad: Tensor

    @property
    def flat(self) -> list[int]:
        return [size for level in self.shape.levels for size in level]

    def leaves(self, from_logits: bool) -> tuple[Tensor, Tensor, Tensor]:
        """What a contestant is called with, and differentiated by."""
        pair = (self.offsets, self.logits) if from_logits else (self.locations, self.weights)
        return self.value, *pair


def op_inputs(shape: Shape, batch: int, pattern: str, dtype: torch.dtype, device: str) -> OpInputs:
    """Random inputs. "encoder": around the query's own position, as an untrained encoder looks (1 to `points` pixels
    along the head's direction, 1 pixel of noise; a decoder's queries sit anywhere). "uniform": anywhere, the worst.
    """
    generator = torch.Generator().manual_seed(0)
    attention = ops.MSDeformAttn(shape.heads * shape.channels, len(shape.levels), shape.heads, shape.points)
    queries = shape.queries or shape.tokens
    grid = (batch, queries, shape.heads, len(shape.levels), shape.points)
    sizes = torch.tensor([(w, h) for h, w in shape.levels], dtype=torch.float32)[:, None]
    if shape.queries:
        reference = torch.rand(1, queries, 1, 2, generator=generator)
    else:
        reference = [
            torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in shape.levels
        ]
        reference = torch.cat(reference).flip(-1)[None, :, None]  # [1, S, 1, 2], (x, y)
    if pattern == "uniform":
        offsets = (torch.rand(*grid, 2, generator=generator) - reference[:, :, None, :, None]) * sizes
    else:
        offsets = attention.sampling_offsets.bias.detach().view(grid[2:] + (2,))
        offsets = offsets + torch.randn(*grid, 2, generator=generator)
    logits = torch.randn(grid, generator=generator)
    value = torch.randn(batch, shape.tokens, shape.heads, shape.channels, generator=generator)
    grad = torch.randn(batch, queries, shape.heads * shape.channels, generator=generator)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    offsets, logits, reference = (t.to(device, wide) for t in (offsets, logits, reference))
    locations, weights = compose([size for level in shape.levels for size in level], offsets, logits, reference)
    value, weights, grad = (t.to(device, dtype) for t in (value, weights, grad))
    return OpInputs(shape, value, offsets, logits, reference, locations, weights, grad)


Contestant = Callable[[Tensor, Tensor, Tensor], Tensor]


def op_contestants(inputs: OpInputs, names: Sequence[str], from_logits: bool = False) -> dict[str, Contestant]:
    """Name -> function of `inputs.leaves(from_logits)`; ours comes first.

    Raises:
        ValueError: a name that is unknown, or whose package is not installed.
    """
    flat = inputs.flat
    table: dict[str, Contestant] = {
        OURS: lambda value, locations, weights: ops.ms_deform_attn(value, flat, locations, weights),
        "embedding_bag": lambda *t: ops.reference_ms_deform_attn(t[0], flat, t[1], t[2]),
        "grid_sample": lambda *t: ops.grid_sample_ms_deform_attn(t[0], flat, t[1], t[2]),
    }
    if importlib.util.find_spec("torch_ms_deform_attn"):
        table["torch-ms-deform-attn"] = rival(inputs)
    if from_logits:
        fused = {f"{OURS}_fused": lambda *t: ops.ms_deform_attn_fused(t[0], flat, t[1], t[2], inputs.reference)}
        table = {name: after_softmax(function, inputs) for name, function in table.items()} | fused
    unknown = set(names) - set(table)
    if unknown:
        raise ValueError(f"no contestant {sorted(unknown)}: choose from {sorted(table)}, or install it")
    return {name: function for name, function in table.items() if not names or name == OURS or name in names}


def rival(inputs: OpInputs) -> Contestant:
    """The op of the package torch-ms-deform-attn."""
    from torch_ms_deform_attn import ms_deform_attn

    sizes = torch.tensor(inputs.shape.levels, device=inputs.value.device)
    areas = [h * w for h, w in inputs.shape.levels]
    starts = torch.tensor([sum(areas[:i]) for i in range(len(areas))], device=inputs.value.device)
    return lambda *t: ms_deform_attn(t[0], sizes, starts, t[1].to(t[2].dtype), t[2])


def after_softmax(function: Contestant, inputs: OpInputs) -> Contestant:
    """The same from offsets and logits, with PyTorch's softmax and arithmetic."""

    def call(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        locations, weights = compose(inputs.flat, offsets, logits, inputs.reference)
        return function(value, locations, weights.to(value.dtype))

    return call


def timed(function: Callable[[], object], device: str, calls: int = 1) -> tuple[float, float]:
    """(wall, CPU) milliseconds per call; the device has finished before and after all of them."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / calls, math.nan
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        function()
    return 1e3 * (time.perf_counter() - wall) / calls, 1e3 * (time.process_time() - cpu) / calls


def copy_speed(device: str, rounds: int = 5, size: int = COPY_BYTES) -> float:
    """Bytes per millisecond, read and written, of copying a tensor: the best of some rounds."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(timed(lambda: target.copy_(source), device)[0] for _ in range(rounds + 1))


def compulsory_bytes(inputs: OpInputs, from_logits: bool) -> dict[str, int]:
    """What must be moved at least: each input read, each output written. The backward reads the inputs again."""
    leaves = sum(t.nbytes for t in inputs.leaves(from_logits)) + (inputs.reference.nbytes if from_logits else 0)
    return {"forward": leaves + inputs.grad.nbytes, "forward_backward": 3 * leaves + 2 * inputs.grad.nbytes}


def measure_op(
    inputs: OpInputs, names: Sequence[str], rounds: int, device: str, from_logits: bool = False, calls: int = 1
) -> list[dict]:
    """One row per contestant: medians of the forward, and of the forward with its backward."""
    contestants = op_contestants(inputs, names, from_logits)
    leaves = [t.detach().clone().requires_grad_() for t in inputs.leaves(from_logits)]

    def forward(function: Contestant) -> None:
        with torch.no_grad():
            function(*leaves)

    def both(function: Contestant) -> None:
        torch.autograd.grad(function(*leaves), leaves, inputs.grad)

    samples = {name: {"forward": [], "forward_backward": []} for name in contestants}
    for turn in range(rounds + 1):  # turn 0 warms up
        for name, function in contestants.items():
            for kind, once in (("forward", forward), ("forward_backward", both)):
                times = timed(lambda: once(function), device, calls)
                if turn:
                    samples[name][kind].append(times)
    speed, least = copy_speed(device), compulsory_bytes(inputs, from_logits)
    bounds = {kind: count / speed for kind, count in least.items()}
    return [{"contestant": name, **summary(samples[name], samples[OURS], bounds)} for name in contestants]


def summary(own: dict[str, list], ours: dict[str, list], bounds: dict[str, float]) -> dict[str, str]:
    """Column -> number, from the rounds' (wall, CPU) milliseconds."""
    columns = {}
    for kind, bound in bounds.items():
        for i, clock in enumerate(("wall_ms", "cpu_ms")):
            columns[f"{kind}_{clock}"] = f"{statistics.median(times[i] for times in own[kind]):.3f}"
        quotients = [a[0] / b[0] for a, b in zip(own[kind], ours[kind])]
        columns[f"{kind}_ratio"] = f"{statistics.median(quotients):.2f}"
        columns[f"{kind}_bound_ms"] = f"{bound:.4g}"
        columns[f"{kind}_over_bound"] = f"{float(columns[f'{kind}_wall_ms']) / bound:.2f}"
    return columns


def machine(device: str) -> dict[str, str]:
    """What a number means nothing without."""
    name = platform.processor() or platform.machine()
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":")[1].strip() if lines else name
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {"machine": name, "torch": torch.__version__, "cuda": str(torch.version.cuda), "commit": commit or "unknown"}


def run_op(args: argparse.Namespace) -> None:
    """The subcommand `op`."""
    print(ops.build_info())
    _use_threads(args.threads)
    if args.device == "cpu":
        keep_freed_memory()  # as the tools do
    calls = args.calls or (10 if args.device == "cuda" else 1)
    rows = []
    for name in args.shapes:
        for pattern in args.patterns:
            inputs = op_inputs(SHAPES[name], args.batch, pattern, DTYPES[args.dtype], args.device)
            setting = {"shape": name, "batch": args.batch, "pattern": pattern, "dtype": args.dtype}
            setting |= {"from_logits": args.from_logits, "device": args.device, "threads": torch.get_num_threads()}
            setting |= {"rounds": args.rounds, "calls": calls}
            for row in measure_op(inputs, args.contestants, args.rounds, args.device, args.from_logits, calls):
                rows.append({**setting, **row, **machine(args.device)})
                print(", ".join(f"{key} {value}" for key, value in {"shape": name, "pattern": pattern, **row}.items()))
    if args.output:
        write_csv(args.output, rows)


# --- the whole model -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def op_in_pytorch(function: Callable) -> Iterator[None]:
    """Lets every attention module call `function` instead of the compiled op."""
    from eco_m2f.ops import module

    saved = module.ONE_PASS_ON_CPU, module.ms_deform_attn
    module.ONE_PASS_ON_CPU, module.ms_deform_attn = False, function
    try:
        yield
    finally:
        module.ONE_PASS_ON_CPU, module.ms_deform_attn = saved


class WholeModel:
    """A model, and a random image that it segments at any exit with `TAKING_PART` queries in the panoptic map."""

    def __init__(self, model: torch.nn.Module, size: tuple[int, int]):
        from eco_m2f.gates.gate import Gate
        from eco_m2f.modeling.early_exits import policy_shapes
        from eco_m2f.modeling.exit_policy import LinearGate

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
        res5 = policy_shapes(model.backbone, model.head)["res5"]
        self.gate = LinearGate(res5.channels, res5.stride, model.exits)
        weight, bias = torch.randn(len(model.exits), res5.channels), torch.zeros(len(model.exits))
        device = images.tensor.device
        self.gate.use(Gate(weight.to(device), bias.to(device), model.exits, 0.0, "hard_ce", "res5", "0" * 64))

    def segment(self, exits: Sequence[int]) -> object:
        """A batch of the image, once for each exit."""
        self.model.exit_policy = ListedExits(exits)
        self.model.postprocessor = self.postprocessors[exits[0]]
        height, width = self.image.shape[1:]
        return self.model([{"image": self.image, "height": height, "width": width}] * len(exits))

    def choose(self) -> Tensor:
        return self.gate(self.features, self.sizes)


class ListedExits(torch.nn.Module):
    """An exit policy that is told the exits."""

    def __init__(self, exits: Sequence[int]):
        super().__init__()
        self.exits = tuple(exits)

    def forward(self, features, image_sizes, image_ids=None) -> Tensor:
        return torch.tensor(self.exits)


TAKING_PART = 20  # queries; of 100 on COCO about so many have a class with a score above 0.8


def score_threshold(logits: Tensor) -> float:
    """The score [Q, C + 1] above which TAKING_PART queries lie, those that say no-object aside."""
    scores, labels = logits.float().softmax(-1).max(-1)
    scores = scores[labels != logits.shape[1] - 1].sort(descending=True).values
    return float(scores[min(TAKING_PART, len(scores) - 1)]) if len(scores) else 0.0


@torch.no_grad()
def model_contestants(
    cfg, size: tuple[int, int], exits: Sequence[int], compiled: bool = False
) -> dict[str, Callable[[], object]]:
    """Name -> a call that segments one image of `size` (height, width) in pixels; the deepest exit comes first.

    Ours may be compiled; the op in PyTorch, which would be compiled in the op's place, is left out then.

    Raises ValueError for a config without exits, or an exit that it does not have.
    """
    from eco_m2f.engine.predict import compile_for_deployment
    from eco_m2f.engine.setup import build_model

    torch.manual_seed(0)
    model = build_model(cfg).eval()
    known = list(getattr(model, "exits", ()))
    if not set(exits) <= set(known):
        raise ValueError(f"--exits {list(exits)}: this config has the exits {known}; take an eco config and its exits")
    whole = WholeModel(model, size)
    if compiled:
        compile_for_deployment(model)
    exits = sorted(exits, reverse=True)
    table = {f"{OURS} exit {k}": functools.partial(whole.segment, [k]) for k in exits}
    for name, function in (
        ("embedding_bag", ops.reference_ms_deform_attn),
        ("grid_sample", ops.grid_sample_ms_deform_attn),
    )[: 0 if compiled else None]:
        segment = functools.partial(whole.segment, exits[:1])
        table[f"{OURS} exit {exits[0]}, op {name}"] = op_in_pytorch(function)(segment)
    if importlib.util.find_spec("transformers") and cfg.MODEL.BACKBONE.NAME == "D2SwinTransformer":
        table["transformers"] = transformers_model(cfg, whole.image)
    if len(exits) > 1:
        table["mixed batch"] = functools.partial(whole.segment, [exits[-1], exits[0]])
    table["gate"] = whole.choose
    return table


def model_figures(rows: list[dict], costs: dict[int, dict[str, float]], exits: Sequence[int]) -> list[str]:
    """What the rows say of early exits, a line for each figure: a saving, a batch of mixed exits, the gate."""
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


def transformers_model(cfg, image: Tensor) -> Callable[[], object]:
    """The Mask2Former of the package transformers, of the same sizes, and its panoptic post-processing."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    from transformers.models.mask2former.image_processing_mask2former import Mask2FormerImageProcessor

    swin, former = cfg.MODEL.SWIN, cfg.MODEL.MASK_FORMER
    backbone = SwinConfig(
        image_size=swin.PRETRAIN_IMG_SIZE,
        embed_dim=swin.EMBED_DIM,
        depths=list(swin.DEPTHS),
        num_heads=list(swin.NUM_HEADS),
        window_size=swin.WINDOW_SIZE,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    sizes = Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        hidden_dim=former.HIDDEN_DIM,
        feature_size=cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM,
        mask_feature_size=cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
        encoder_layers=cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS,
        encoder_feedforward_dim=1024,
        dim_feedforward=former.DIM_FEEDFORWARD,
        decoder_layers=former.DEC_LAYERS,
        num_queries=former.NUM_OBJECT_QUERIES,
    )
    model = Mask2FormerForUniversalSegmentation(sizes).eval().to(cfg.MODEL.DEVICE)
    processor = Mask2FormerImageProcessor()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    height, width = image.shape[1:]

    def predict():
        pixels = ((image - mean) / std)[None].to(cfg.MODEL.DEVICE)
        pixels = torch.nn.functional.pad(pixels, (0, -width % 32, 0, -height % 32))
        return model(pixel_values=pixels)

    threshold = score_threshold(predict().class_queries_logits[0])

    def segment() -> object:
        sizes = [(height, width)]
        return processor.post_process_panoptic_segmentation(predict(), threshold=threshold, target_sizes=sizes)

    return segment


@torch.no_grad()
def measure_model(contestants: dict[str, Callable[[], object]], rounds: int, device: str) -> list[dict]:
    """One row per contestant: medians over the rounds, and the median quotient over the first contestant."""
    samples = {name: [] for name in contestants}
    for turn in range(rounds + 1):  # turn 0 warms up
        for name, call in contestants.items():
            times = timed(call, device)
            if turn:
                samples[name].append(times)
    ours = samples[next(iter(samples))]
    rows = []
    for name, own in samples.items():
        wall, cpu = (statistics.median(times[i] for times in own) for i in range(2))
        ratio = statistics.median(a[0] / b[0] for a, b in zip(own, ours))
        rows.append({"contestant": name, "wall_ms": f"{wall:.3f}", "cpu_ms": f"{cpu:.3f}", "ratio": f"{ratio:.2f}"})
    return rows


def run_model(args: argparse.Namespace) -> None:
    """The subcommand `model`."""
    from eco_m2f.engine.setup import load_cfg
    from eco_m2f.evaluation.flops import ExitCosts

    _use_threads(args.threads)
    if args.device == "cpu":
        keep_freed_memory()
    panoptic = [f"MODEL.MASK_FORMER.TEST.{head}_ON" for head in ("SEMANTIC", "INSTANCE")]
    opts = ["MODEL.DEVICE", args.device, panoptic[0], False, panoptic[1], False, *args.opts]
    cfg = load_cfg(args.config_file, opts)
    setting = {
        "config": " ".join([args.config_file, *args.opts]),
        "height": args.size[0],
        "width": args.size[1],
        "device": args.device,
    }
    setting |= {"dtype": args.dtype, "compiled": args.compile}
    setting |= {"threads": torch.get_num_threads(), "rounds": args.rounds}
    contestants = model_contestants(cfg, tuple(args.size), args.exits, args.compile)
    with torch.autocast(args.device, DTYPES[args.dtype], enabled=args.dtype != "float32"):
        measured = measure_model(contestants, args.rounds, args.device)
    rows = [{**setting, **row, **machine(args.device)} for row in measured]
    for row in measured:
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    model = contestants["gate"].__self__.model
    for line in model_figures(measured, ExitCosts(model, model.exits).details(args.size), args.exits):
        print(line)
    if args.output:
        write_csv(args.output, rows)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", required=True, help="of an EcoMaskFormer")
    parser.add_argument("--size", type=positive, nargs=2, default=[800, 1216], metavar=("H", "W"), help="pixels")
    parser.add_argument("--exits", type=positive, nargs="+", default=[2, 6])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of autocast")
    parser.add_argument("--compile", action="store_true", help="our model through torch.compile")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=positive, help="CPU threads; default: PyTorch's choice")
    parser.add_argument("--rounds", type=positive, default=5, help="after one that warms up")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config options")
    parser.add_argument("--output", type=Path, help="CSV file to write")
    parser.set_defaults(run=run_model)


# --- the three steps -------------------------------------------------------------------------------------------------


def training_step(config: str, opts: Sequence, size: Sequence[int], batch: int, rounds: int) -> tuple[float, float]:
    """(median seconds of a step, peak MiB above the memory before the first), on random images of 20 masks each."""
    from detectron2.structures import Instances
    from detectron2.utils.events import EventStorage

    from eco_m2f.engine.optimizer import build_optimizer
    from eco_m2f.engine.setup import build_model, load_cfg

    keep_freed_memory()
    cfg = load_cfg(config, list(opts))
    torch.manual_seed(0)
    model = build_model(cfg).train()
    optimizer, inputs = build_optimizer(cfg, model), []
    for _ in range(batch):
        instances = Instances(tuple(size))
        instances.gt_classes = torch.randint(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, (20,))
        blobs = torch.nn.functional.interpolate(torch.randn(1, 20, 8, 8), tuple(size), mode="bicubic")[0]
        instances.gt_masks = blobs.argmax(0) == torch.arange(20)[:, None, None]
        inputs.append({"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8), "instances": instances})

    def step() -> None:
        optimizer.zero_grad()
        sum(model(inputs).values()).backward()
        optimizer.step()

    gpu = cfg.MODEL.DEVICE != "cpu"
    before = torch.cuda.memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with EventStorage(0):
        step()
        times = [timed(step, "cuda" if gpu else "cpu")[0] for _ in range(rounds)]
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return statistics.median(times) / 1e3, (peak - before) / 2**20


def run_step_a(args: argparse.Namespace) -> None:
    """The subcommand `step_a`."""
    from eco_m2f.engine.setup import load_cfg

    exits = list(load_cfg(args.config_file).MODEL.ECO.EXITS)
    settings = [(1, False), *((n, again) for n in (2, len(exits)) for again in (False, True))]
    rows = []
    for n, again in settings:
        opts = ["MODEL.DEVICE", args.device, "MODEL.WEIGHTS", "", "MODEL.ECO.EXITS", exits[-n:]]
        opts += ["MODEL.ECO.EXITS_PER_STEP", n, "MODEL.ECO.RECOMPUTE", again, "MODEL.ECO.EXIT", exits[-1]]
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawn, _use_threads, (args.threads,)) as process:
            work = process.submit(training_step, args.config_file, opts, args.size, args.batch, args.rounds)
            seconds, memory = work.result()
        row = {"exits": n, "way": "recompute" if again else "joint", "s_per_step": seconds, "peak_mib": memory}
        first = rows[0] if rows else row
        row |= {"time_ratio": seconds / first["s_per_step"], "memory_ratio": memory / (first["peak_mib"] or math.nan)}
        rows.append(row)
        print(_line(row), flush=True)
    setting = {"config": args.config_file, "height": args.size[0], "width": args.size[1], "batch": args.batch}
    _save(args, [{**setting, **row} for row in rows])


def _use_threads(threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)


@dataclass
class RandomTruth:
    """Stands in for `PanopticGroundTruth`: Voronoi cells of random categories."""

    ids: np.ndarray
    categories: list[int]
    dataset_id: dict[int, int]

    @classmethod
    def of(cls, size: Sequence[int], num_segments: int, num_classes: int, seed: int) -> "RandomTruth":
        rng = np.random.default_rng(seed)
        sites = rng.uniform(0, 1, (num_segments, 2)) * size
        y, x = np.mgrid[: size[0], : size[1]]
        cells = np.argmin((y - sites[:, 0, None, None]) ** 2 + (x - sites[:, 1, None, None]) ** 2, axis=0)
        return cls(cells + 1, rng.integers(num_classes, size=num_segments).tolist(), {i: i for i in range(num_classes)})

    def image(self, image_id) -> "RandomTruth":
        return self

    def id_map(self) -> np.ndarray:
        return self.ids

    @property
    def segments(self) -> list[dict]:
        return [{"id": i + 1, "category_id": c} for i, c in enumerate(self.categories)]


@torch.no_grad()
def run_step_b(args: argparse.Namespace) -> None:
    """The subcommand `step_b`."""
    from eco_m2f.engine.derive import predict_exits
    from eco_m2f.engine.setup import build_model, load_cfg
    from eco_m2f.quality import PanopticQuality
    from eco_m2f.quality.panoptic_quality import PanopticComparison, to_dataset_categories

    _use_threads(args.threads)
    if args.device == "cpu":
        keep_freed_memory()
    test = "MODEL.MASK_FORMER.TEST."
    opts = [f"{test}SEMANTIC_ON", False, f"{test}INSTANCE_ON", False, f"{test}OVERLAP_THRESHOLD", 0.0]
    cfg = load_cfg(args.config_file, ["MODEL.DEVICE", args.device, *opts])
    torch.manual_seed(0)
    whole = WholeModel(build_model(cfg).eval(), tuple(args.size))
    model = whole.model
    turn = itertools.cycle(model.exits)

    class InTurn(PanopticQuality):
        """The exits come in their order; each has its own score threshold, so that all keep as many queries."""

        def prepare(self, model, pred: dict, images, x: dict) -> tuple:
            model.postprocessor = whole.postprocessors[next(turn)]
            return super().prepare(model, pred, images, x)

    truth = RandomTruth.of(args.size, 20, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, seed=0)
    x = {"image": whole.image, "image_id": 0, "file_name": "", "height": args.size[0], "width": args.size[1]}

    def separately() -> None:
        for k in model.exits:
            panoptic, segments = whole.segment([k])[0]["panoptic_seg"]
            comparison = PanopticComparison(truth.ids, truth.segments)
            comparison.compare(panoptic.cpu().numpy(), to_dataset_categories(segments, truth.dataset_id))

    quality = InTurn(truth)
    contestants = {
        "one pass": lambda: predict_exits(model, quality, x, "res5").row(),
        "one evaluation per exit": separately,
    }
    rows = measure_model(contestants, args.rounds, args.device)
    setting = {"config": args.config_file, "height": args.size[0], "width": args.size[1], "exits": len(model.exits)}
    _save(args, [{**setting, **row} for row in rows])
    for row in rows:
        print(_line(row))
    print(f"PQ of one 640x480 image at 5 exits, 20 segments: {pq_milliseconds():.2f} ms")


def pq_milliseconds(rounds: int = 20) -> float:
    """Median time of preparing a 640x480 truth and comparing five predictions with it."""
    from eco_m2f.quality.panoptic_quality import PanopticComparison

    truth, *predictions = (RandomTruth.of((480, 640), 20, 10, seed) for seed in range(6))

    def once() -> None:
        comparison = PanopticComparison(truth.ids, truth.segments)
        for other in predictions:
            comparison.compare(other.ids, other.segments)

    return statistics.median(timed(once, "cpu")[0] for _ in range(rounds))


def run_step_c(args: argparse.Namespace) -> None:
    """The subcommand `step_c`."""
    from eco_m2f.exits import GATE_LOSSES
    from eco_m2f.gates.fit import fit_gate, fit_gates

    _use_threads(args.threads)
    give_back_freed_memory()  # as train_gate.py does
    exits, generator = (2, 3, 4, 5, 6), torch.Generator().manual_seed(0)
    features = torch.randn(args.images, args.channels, generator=generator)
    need = torch.sigmoid(features[:, :1] + 0.5 * torch.randn(args.images, 1, generator=generator))
    quality = 0.6 - 0.004 * need * torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    quality = (quality + 0.002 * torch.randn(quality.shape, generator=generator)).double().numpy()
    rows, source = [], {"feature_source": "res5", "parent_sha256": "0" * 64}

    def record(what: str, seconds: float, gates: int) -> None:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append({"what": what, "gates": gates, "seconds": seconds, "peak_gib_of_the_process": memory})
        print(_line(rows[-1]), flush=True)

    for optimizer in ("lbfgs", "adam"):
        fit = functools.partial(fit_gate, features, quality, exits, 0.0005, 6, optimizer=optimizer, **source)
        record(f"one gate, {optimizer}", timed(fit, "cpu")[0] / 1e3, 1)
    betas = np.geomspace(1e-5, 1e-2, args.betas).tolist()
    grid = [(beta, k, loss) for k in (6, 5, 4) for beta in betas for loss in GATE_LOSSES]
    start = time.perf_counter()
    fit_gates(features, quality, exits, grid, **source)
    record("frontier over beta, K and loss, lbfgs", time.perf_counter() - start, len(grid))
    _save(args, [{"images": args.images, "channels": args.channels, **row} for row in rows])


def _line(row: dict) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )


def _save(args: argparse.Namespace, rows: list[dict]) -> None:
    about = {"threads": torch.get_num_threads(), "rounds": args.rounds, "device": args.device, **machine(args.device)}
    if args.output:
        write_csv(args.output, [{**row, **about} for row in rows])


def add_step_arguments(subcommands) -> None:
    for name, size, run_step, about in (
        ("step_a", [512, 512], run_step_a, "time and memory of a training step with several exits"),
        ("step_b", [800, 1216], run_step_b, "an image derived at all exits, against one evaluation per exit"),
        ("step_c", None, run_step_c, "fitting gates"),
    ):
        parser = subcommands.add_parser(name, help=about)
        if size:
            parser.add_argument("--config-file", required=True, help="of an EcoMaskFormer")
            parser.add_argument("--size", type=positive, nargs=2, default=size, metavar=("H", "W"), help="pixels")
            parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        else:
            parser.add_argument("--images", type=positive, default=118287)
            parser.add_argument("--channels", type=positive, default=2048)
            parser.add_argument("--betas", type=positive, default=20, help="of the frontier, beside 3 K and 4 losses")
            parser.set_defaults(device="cpu")
        if name == "step_a":
            parser.add_argument("--batch", type=positive, default=1)
        parser.add_argument("--threads", type=positive, help="CPU threads; default: PyTorch's choice")
        parser.add_argument("--rounds", type=positive, default=3, help="after one that warms up")
        parser.add_argument("--output", type=Path, help="CSV file to write")
        parser.set_defaults(run=run_step)


# --- stopping tokens -------------------------------------------------------------------------------------------------


class StopShare:
    """A stop rule: that share of each image's tokens, drawn at random, at the first decision point, none later."""

    def __init__(self, heads: Sequence[torch.nn.Module], share: float):
        self.heads, self.share = heads, share
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, point: int, features: Tensor) -> Tensor:
        self.heads[point](features)  # what a decision costs
        sure = torch.zeros(len(features), features[0, 0].numel(), dtype=torch.bool)
        if point == 0:
            order = torch.rand(sure.shape, generator=self.generator).argsort(dim=1)
            sure.scatter_(1, order[:, : round(self.share * sure.shape[1])], True)
        return sure.view(len(features), *features.shape[2:]).to(features.device)


def dovit_contestants(
    cfg, size: tuple[int, int], batch: int, shares: Sequence[float]
) -> dict[str, Callable[[], list[dict]]]:
    """Name -> a call that segments a batch; the largest share comes first. Raises ValueError for another model."""
    from eco_m2f.engine.setup import build_model
    from eco_m2f.modeling import DoViT

    torch.manual_seed(0)
    model = build_model(cfg).eval()
    if not isinstance(model, DoViT):
        raise ValueError(f"--config-file is of a {type(model).__name__}: take one of a DoViT, see configs/*/*/dovit/")
    images = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)

    def segment(share: float) -> list[dict]:
        model.stop_rule = lambda: StopShare(model.auxiliary_heads, share) if share else None
        return model([{"image": image} for image in images])

    return {f"{100 * s:g} % stopped": functools.partial(segment, s) for s in sorted(shares, reverse=True)}


@torch.no_grad()
def run_dovit(args: argparse.Namespace) -> None:
    """The subcommand `dovit`."""
    from eco_m2f.engine.setup import load_cfg

    _use_threads(args.threads)
    if args.device == "cpu":
        keep_freed_memory()
    contestants = dovit_contestants(
        load_cfg(args.config_file, ["MODEL.DEVICE", args.device]), tuple(args.size), args.batch, args.stopped
    )
    setting = {"config": args.config_file, "height": args.size[0], "width": args.size[1], "batch": args.batch}
    rows = []
    for row in measure_model(contestants, args.rounds, args.device):
        tokens = contestants[row["contestant"]]()[0]["tokens"]
        row |= {"images_per_s": f"{1e3 * args.batch / float(row['wall_ms']):.3f}"}
        row |= {"gflops": f"{tokens['gflops']:.2f}", "static_gflops": f"{tokens['static_gflops']:.2f}"}
        rows.append({**setting, **row})
        print(_line(row), flush=True)
    _save(args, rows)


def share(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share below 1")
    return float(text)


def add_dovit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", required=True, help="of a DoViT")
    parser.add_argument("--size", type=positive, nargs=2, default=[512, 512], metavar=("H", "W"), help="pixels")
    parser.add_argument("--batch", type=positive, default=2)
    parser.add_argument("--stopped", type=share, nargs="+", default=[0.0, 0.5], help="shares of the tokens")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=positive, help="CPU threads; default: PyTorch's choice")
    parser.add_argument("--rounds", type=positive, default=5, help="after one that warms up")
    parser.add_argument("--output", type=Path, help="CSV file to write")
    parser.set_defaults(run=run_dovit)


# --- the command line ------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def add_op_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["mask2former-cityscapes"])
    parser.add_argument("--patterns", nargs="+", choices=("encoder", "uniform"), default=["encoder", "uniform"])
    parser.add_argument("--contestants", nargs="+", default=[], help="besides eco_m2f; default: all that are installed")
    parser.add_argument("--from-logits", action="store_true", help="with the softmax and the locations")
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=positive, help="CPU threads; default: PyTorch's choice")
    parser.add_argument("--rounds", type=positive, default=9, help="after one that warms up")
    parser.add_argument("--calls", type=positive, help="per contestant and round; default: 1, on cuda 10")
    parser.add_argument("--output", type=Path, help="CSV file to write")
    parser.set_defaults(run=run_op)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subcommands = parser.add_subparsers(required=True, metavar="what")
    add_op_arguments(subcommands.add_parser("op", help="the deformable attention alone"))
    add_model_arguments(subcommands.add_parser("model", help="a whole model, image to panoptic map"))
    add_step_arguments(subcommands)
    add_dovit_arguments(subcommands.add_parser("dovit", help="a DoViT of whose tokens some stop"))
    return run(measure, parser.parse_args())


def measure(args: argparse.Namespace) -> None:
    """What the subcommand measures, once it is clear that this can be done and kept."""
    if getattr(args, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here (nvidia-smi); take --device cpu")
    if args.output:
        prepare_output(args.output)
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
