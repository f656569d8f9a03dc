"""GFLOPs of a model at each of its exits, in the convention of the paper, without running it.

The model's backbone and head run once on tensors that have a shape but no values, and a tape notes what each operator
costs and which operators its inputs came from. The cost of exit k is that of the operators its prediction depends on;
post-processing, which depends on values, is counted by its formula. A size takes a fraction of a second, and neither
weights nor random state are touched.

The `paper` convention is that of detectron2's `FlopCountAnalysis` on a traced Mask2Former with its CUDA op:
- a multiply-add is one FLOP; convolutions and matrix products count, layer and group norm (5 per element), batch norm
  (2) and bilinear resizing (4 per element of the output); softmax, element-wise operations and embeddings do not;
- the core of deformable attention counts nothing, for the tool cannot see into a CUDA op;
- of attention, weights times values counts, and queries times keys only where it is not masked (the tool does not know
  `baddbmm`); here attention is one operator, so it is counted by that rule;
- results that nothing depends on are not in a trace: the class logits of the auxiliary predictions do not count, but
  their masks do, at full size, as attention follows them; inference here makes those smaller, and that is not counted;
- "Tx. Enc.", here `pixel_decoder`, is what runs in submodules of the pixel decoder: not the resizing between them. Of
  DETR it is the layers of the transformer encoder, where every product of queries and keys is masked.

The `full` convention adds the deformable core by its own formula. A gate's few thousand multiply-adds are in neither.
The paper's means over COCO resize every result to its image's own size: `mean` takes that size beside the padded one.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import functools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from detectron2.data.transforms import ResizeShortestEdge
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops.flops import OP_NAME, multiply_adds

CONVENTION = {
    "unit": "GFLOPs: 1e9 multiply-adds; an element costs 5 in layer and group norm, 2 in batch norm, 4 when resized",
    "paper": "total and its parts: the core of deformable attention and masked query-key products count nothing",
    "full": "total_full and pixel_decoder_full: the same with the core, 4 per channel and sampling point",
}


class CostTable:
    """GFLOPs of a model for images of any size, in several settings: its exits, or the tokens that go on."""

    key: str  # of the settings in a report
    column: str  # their heading in a table
    convention: Mapping[str, str]  # what is counted

    def details(self, padded_size: Sequence[int], output_size: Sequence[int] | None = None) -> dict:
        """{setting: {part: GFLOPs}} of an image; output_size: that of its results, by default the padded one."""
        raise NotImplementedError

    def mean(self, images: Iterable[tuple[Sequence[int], Sequence[int]]]) -> dict:
        """The mean of `details` over images, each of them (padded size, output size).

        Every distinct pair is worked out once, and the model measured once per distinct padded size.

        Raises:
            ValueError: there is no image, or a size is none.
        """
        counts = Counter((_checked_size(padded), _checked_size(output)) for padded, output in images)
        if not counts:
            raise ValueError("there are no images to take the mean of")
        sums = defaultdict(Counter)
        for (padded, output), count in counts.items():
            for setting, gflops in self.details(padded, output).items():
                sums[setting].update({name: count * value for name, value in gflops.items()})
        return {k: {name: value / counts.total() for name, value in total.items()} for k, total in sums.items()}


class ExitCosts(CostTable):
    """Costs per exit of a `Parent`, with or without early exits, for images of any size.

    Takes the architecture of the model as it is now and keeps no weights. Costs are remembered per size.
    """

    key, column, convention = "exits", "exit", CONVENTION

    def __init__(self, model: nn.Module, exits: Sequence[int] | None = None):
        """
        Args:
            model: has `backbone`, `head` (an `ExitHead`) and `postprocessor`, and says its `cost_parts`; may be
                wrapped for data-parallel training.
            exits: those to cost; default: `exits_of(model)`.

        Raises:
            ValueError: the model lacks a part, or an exit.
        """
        model = getattr(model, "module", model)
        missing = [n for n in ("backbone", "postprocessor") if not hasattr(model, n)]  # a `Parent` has a head besides
        if missing:
            raise ValueError(
                f"{type(model).__name__} has no {' and no '.join(missing)}, so no exits: costs are known for a "
                "MODEL.META_ARCHITECTURE of MaskFormer or EcoMaskFormer, Detr or EcoDetr"
            )
        self.exits = tuple(exits if exits is not None else exits_of(model))
        if not self.exits or not set(self.exits) <= set(model.head.exits):
            raise ValueError(f"exits {list(self.exits)} are not all offered: {list(model.head.exits)}")
        self._post = model.postprocessor
        self._backbone = _without_values(model.backbone)
        self._head = _without_values(model.head)
        self._head_name = model.head_name
        self._parts = {"backbone": "backbone", **model.cost_parts}
        self._encoder = next(iter(model.cost_parts))
        self._measured: dict[tuple[int, int], dict[int, Measurement]] = {}

    def __call__(
        self, padded_size: Sequence[int], output_size: Sequence[int] | None = None
    ) -> dict[int, dict[str, float]]:
        """GFLOPs of one image in the paper's convention.

        Args:
            padded_size: (height, width) of the padded batch.
            output_size: (height, width) that the results are resized to; default: the padded size.

        Returns:
            {exit: {"total", "encoder"}}; "encoder" is the paper's "Tx. Enc.".
        """
        details = self.details(padded_size, output_size)
        return {k: {"total": d["total"], "encoder": d[self._encoder]} for k, d in details.items()}

    def details(
        self, padded_size: Sequence[int], output_size: Sequence[int] | None = None
    ) -> dict[int, dict[str, float]]:
        """GFLOPs by part: {exit: {"total", "backbone", "pixel_decoder", "predictor", "postprocessing", ..}}.

        These are in the `paper` convention; "total_full" and "pixel_decoder_full" have the deformable core in them.
        The parts do not add up to the total by the resizing inside the pixel decoder. Arguments as in `__call__`.
        DETR's parts are "encoder" and "decoder"; its projection, classes and boxes are in the total alone.
        """
        padded = _checked_size(padded_size)
        output = padded if output_size is None else _checked_size(output_size)
        result = {}
        for k, cost in self.measure(padded).items():
            post = postprocessing_flops(self._post, cost.num_queries, padded, output)
            flops = {"total": cost.flops + post, **cost.parts, "postprocessing": post}
            flops["total_full"] = flops["total"] + cost.core
            flops[f"{self._encoder}_full"] = flops[self._encoder] + cost.core
            result[k] = {name: value / 1e9 for name, value in flops.items()}
        return result

    def measure(self, padded_size: Sequence[int]) -> dict[int, Measurement]:
        """{exit: what backbone and head cost}, in FLOPs, also by module."""
        size = _checked_size(padded_size)
        if size not in self._measured:
            self._measured[size] = self._run(size)
        return self._measured[size]

    def _run(self, size: tuple[int, int]) -> dict[int, Measurement]:
        """One pass for all exits; the decoder, which costs the same at each, runs on the last exit alone."""
        tape = OpTape()
        with _shapes_only(), tape.attributing(**{"backbone": self._backbone, self._head_name: self._head}), tape:
            features = self._backbone(torch.empty(1, 3, *size))
            shared, states = self._head.encode(features, self.exits)
            last = states[self.exits[-1]]
            prediction = self._head.decode(shared, last)
        live = tape.ancestors(t for t in prediction.values() if isinstance(t, Tensor))
        read = [i for i, t in enumerate(last) if tape.writer(t) in live]
        encoding = tape.ancestors(last)
        decoding = {op: None for op in live if op not in encoding}
        ops = {k: tape.ancestors(states[k][i] for i in read) | decoding for k in self.exits}
        queries = prediction["pred_logits"].shape[1]
        return {k: _measurement(list(ops[k]), queries, self._parts) for k in self.exits}

    def __deepcopy__(self, memo) -> ExitCosts:
        return self  # a copy of the model costs the same


def module_flops(module: nn.Module, *shapes: Sequence[int]) -> int:
    """FLOPs, in the paper's convention, of calling a module in eval mode on a tensor of each shape."""
    tape, bare = OpTape(), _without_values(module)
    with _shapes_only(), tape:
        out = bare(*(torch.empty(*shape) for shape in shapes))
    return sum(op.flops for op in tape.ancestors([out]))


def exits_of(model: nn.Module) -> tuple[int, ...]:
    """The exits of a model with early exits; of a parent, the depths from 2 that its encoder offers, or the last."""
    offered = model.head.exits
    return tuple(getattr(model, "exits", [k for k in offered if k >= 2])) or tuple(offered[-1:])


@dataclass(frozen=True)
class Measurement:
    """FLOPs up to a prediction: in all, of the parts, of every module with its children; and the deformable core's."""

    flops: int
    core: int
    parts: dict[str, int]
    by_module: dict[str, int]
    num_queries: int


def _measurement(ops: list[Op], num_queries: int, prefixes: Mapping[str, str]) -> Measurement:
    by_module = Counter()
    for op in ops:
        if op.flops:
            by_module.update(dict.fromkeys(op.modules, op.flops))
    parts = {
        part: sum(op.flops for op in ops if any(name.startswith(prefix) for name in op.modules))
        for part, prefix in prefixes.items()
    }
    return Measurement(sum(op.flops for op in ops), sum(op.core for op in ops), parts, dict(by_module), num_queries)


def postprocessing_flops(post, num_queries: int, padded: tuple[int, int], output: tuple[int, int]) -> int:
    """What a `PostProcessor` costs: masks to the padded size, then to the output size, and the semantic product.

    Resizing counts even where source and target are of one size, as in the traced reference. Boxes cost nothing.
    """
    if not post.resizes_masks:
        return 0
    at_padded, at_output = prod(padded), prod(output)
    flops = 4 * num_queries * at_padded
    if post.resize_first:
        flops += 4 * num_queries * at_output
    if post.semantic_on:
        flops += num_queries * post.num_classes * (at_output if post.resize_first else at_padded)
        flops += 0 if post.resize_first else 4 * post.num_classes * at_output
    return flops


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters of the parent's parts and their sum "total"; apart from it the weights of an "exit_policy".

    What is in no part is "other". Buffers do not count. A gate is no parameter of the parent; its policy tells its
    size.
    """
    model = getattr(model, "module", model)
    prefixes = {"backbone": "backbone.", **model.cost_parts}
    count = dict.fromkeys(prefixes, 0)
    for name, p in model.named_parameters():
        if not name.startswith("exit_policy."):
            part = next((part for part, prefix in prefixes.items() if name.startswith(prefix)), "other")
            count[part] = count.get(part, 0) + p.numel()
    count = {"total": sum(count.values()), **count}
    if hasattr(model, "exit_policy"):
        count["exit_policy"] = getattr(model.exit_policy, "num_weights", 0)
    return count


# --- a report on a model ---------------------------------------------------------------------------------------------


def analyze(
    model: nn.Module,
    size: Sequence[int] | None = None,
    images: Iterable[tuple[Sequence[int], Sequence[int]]] = (),
    costs: CostTable | None = None,
) -> dict:
    """Parameters and costs of a model, as JSON takes them.

    Args:
        model: a `Parent`, with or without early exits; with `costs` any that has `size_divisibility` and `cost_parts`.
        size: (height, width) of an image that is neither resized before the model nor after it.
        images: (size at which the model gets it, size of the result) of every image to take the mean over.
        costs: what to tell of it; default: its exits.

    Returns:
        "model", "params" (without a gate's), "params_by_part", "convention", and
        - of `size`: "size", "padded_size", "exits" {exit: `ExitCosts.details`};
        - of `images`: "mean" {"num_images", "padded_area" (pixels), "exits"}; without a `size` also as "exits".
        With `costs`, their `key` stands for "exits".

    Raises:
        ValueError: there is neither size nor image, a size is none, or the model is of another kind.
    """
    costs = ExitCosts(model) if costs is None else costs
    params = parameter_counts(model)
    report = {
        "model": type(model).__name__,
        "params": params.pop("total"),
        "params_by_part": params,
        "convention": dict(costs.convention),
    }
    if size is not None:
        padded = padded_size(size, model.size_divisibility)
        report |= {"size": list(size), "padded_size": list(padded), costs.key: costs.details(padded, size)}
    images = [(padded_size(given, model.size_divisibility), wanted) for given, wanted in images]
    if images or size is None:
        area = sum(prod(padded) for padded, _ in images) / max(1, len(images))
        report["mean"] = {"num_images": len(images), "padded_area": area, costs.key: costs.mean(images)}
        report.setdefault(costs.key, report["mean"][costs.key])
    return report


def padded_size(size: Sequence[int], divisibility: int) -> tuple[int, int]:
    """(height, width) after padding to multiples of `divisibility`. Raises ValueError for what is no size."""
    height, width = _checked_size(size)
    step = max(1, divisibility)
    return -(-height // step) * step, -(-width // step) * step


def at_test_size(size: Sequence[int], shortest: int, longest: int) -> tuple[int, int]:
    """(height, width) of an image after INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST; a MIN_SIZE_TEST of 0 leaves it."""
    height, width = _checked_size(size)
    return ResizeShortestEdge.get_output_shape(height, width, shortest, longest) if shortest else (height, width)


def read_image_sizes(path: str | os.PathLike) -> list[tuple[int, int]]:
    """(height, width) of every row of a CSV file, from its columns of these names.

    Raises:
        OSError: it cannot be opened. ValueError: no CSV, a column is missing, a value is no size, or there is no row.
    """
    sizes = []
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        try:
            rows = csv.DictReader(file)
            missing = [name for name in ("height", "width") if name not in (rows.fieldnames or [])]
            if missing:
                raise ValueError(f"{path} lacks the columns {missing}: its first line names {rows.fieldnames}")
            for row in rows:
                try:
                    sizes.append(_checked_size((row["height"], row["width"])))
                except (TypeError, ValueError) as error:
                    found = f"height {row['height']!r}, width {row['width']!r}"
                    raise ValueError(f"{path}, line {rows.line_num}: {found} is not a size in pixels") from error
        except csv.Error as error:
            raise ValueError(f"{path} is not a CSV file: {error}") from error
    if not sizes:
        raise ValueError(f"{path} has no rows: there must be one per image")
    return sizes


def format_report(report: dict, costs: CostTable | type[CostTable] = ExitCosts) -> str:
    """What `analyze` returned for such costs, as text for a terminal."""
    parts = ", ".join(f"{name.replace('_', ' ')} {n / 1e6:.3f}" for name, n in report["params_by_part"].items() if n)
    lines = [f"{report['model']}: {report['params'] / 1e6:.3f} M parameters ({parts})"]
    if "size" in report:
        size, padded = ("x".join(map(str, report[name])) for name in ("size", "padded_size"))
        lines += ["", f"GFLOPs of an image of {size}, padded to {padded}", *_table(report[costs.key], costs.column)]
    if "mean" in report:
        mean = report["mean"]
        lines += ["", f"Mean GFLOPs of {mean['num_images']} images, {mean['padded_area']:.0f} pixels with padding"]
        lines += _table(mean[costs.key], costs.column)
    return "\n".join([*lines, "", *(f"{name}: {text}" for name, text in report["convention"].items())])


def _table(settings: Mapping[object, Mapping[str, float]], heading: str) -> list[str]:
    columns = list(next(iter(settings.values())))
    first = max(len(heading), *(len(str(k)) for k in settings))
    rows = [
        "  ".join([f"{k:>{first}}", *(f"{gflops[c]:>{len(c)}.3f}" for c in columns)]) for k, gflops in settings.items()
    ]
    return ["  ".join([f"{heading:>{first}}", *columns]), *rows]


# --- the tape --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Op:
    """An operator that ran: its cost, the modules it ran in (outermost first), the operators it depends on."""

    flops: int
    core: int
    modules: tuple[str, ...]
    sources: tuple[Op, ...]


class OpTape(TorchDispatchMode):
    """Notes the operators that run inside it; use it under `torch.inference_mode()`.

    Autograd would break attention and other composite operators up before they are seen. Dependence is taken from
    memory: an operator depends on whatever wrote to the memory of its inputs.
    """

    def __init__(self):
        super().__init__()
        self._running: list[str] = []
        self._writer: dict[int, Op] = {}  # by memory
        self._memory: list[Tensor] = []  # kept, for the next tensor must not get the address of one that is gone

    @contextlib.contextmanager
    def attributing(self, **modules: nn.Module) -> Iterator[None]:
        """Attribute what runs meanwhile to these modules and their submodules, by their forward calls."""
        hooks = []
        for root, module in modules.items():
            for name, m in module.named_modules(prefix=root):
                hooks.append(m.register_forward_pre_hook(functools.partial(self._enter_module, name)))
                hooks.append(m.register_forward_hook(self._leave_module))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._running.clear()

    def writer(self, t: Tensor) -> Op | None:
        """The operator that last wrote to a tensor's memory; None for memory from before the tape."""
        return self._writer.get(_memory(t))

    def ancestors(self, tensors: Iterable[Tensor]) -> dict[Op, None]:
        """Every operator that the tensors depend on: an ordered set."""
        found: dict[Op, None] = {}
        todo = [op for t in tensors if (op := self.writer(t))]
        while todo:
            op = todo.pop()
            if op not in found:
                found[op] = None
                todo.extend(op.sources)
        return found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if name in _FLOPS or name == OP_NAME or not _is_composite(func):
            out = _SHAPES.get(name, func)(*args, **kwargs)
            core = multiply_adds(args[0].shape, args[2].shape) if name == OP_NAME else 0
            self._note(func, args, kwargs, out, _FLOPS[name](out, *args, **kwargs) if name in _FLOPS else 0, core)
            return out
        with self:
            return func.decompose(*args, **kwargs)

    def _note(self, func, args, kwargs, out, flops: int, core: int) -> None:
        read = {_memory(t) for t in _tensors((args, tuple(kwargs.values())))}
        written = [t for t in _tensors((out,)) if func._schema.is_mutable or _memory(t) not in read]
        if not written:
            return  # a view
        sources = tuple({op: None for m in read if (op := self._writer.get(m))})
        op = Op(flops, core, tuple(self._running), sources)
        self._writer.update((_memory(t), op) for t in written)
        self._memory.extend(written)

    def _enter_module(self, name: str, *_) -> None:
        self._running.append(name)

    def _leave_module(self, *_) -> None:
        self._running.pop()


def _memory(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _tensors(values) -> Iterator[Tensor]:
    for v in values:
        if isinstance(v, Tensor):
            yield v
        elif isinstance(v, (list, tuple)):
            yield from _tensors(v)


@functools.cache
def _is_composite(func) -> bool:
    """Whether PyTorch defines the operator by other operators, so that those are to be counted."""
    return func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), torch._C.DispatchKey.CompositeImplicitAutograd
    )


# --- what an operator costs: functions of its output and its arguments -----------------------------------------------


def _linear(out, x, weight, bias=None) -> int:
    return out.numel() * weight.shape[1]


def _mm(out, a, b, **_) -> int:
    return out.numel() * a.shape[-1]


def _addmm(out, bias, a, b, **_) -> int:
    return out.numel() * a.shape[-1]


def _conv(out, x, weight, *_, **__) -> int:
    return out.numel() * prod(weight.shape[1:])


def _conv_general(out, x, weight, bias, stride, padding, dilation, transposed, *_) -> int:
    return x.shape[0] * prod(weight.shape) * prod((x if transposed else out).shape[2:])


def _attention(out, q, k, v, attn_mask=None, *_, **__) -> int:
    """q.k where it is not masked, and attention times v; q [..., L, E], k [..., S, E], v [..., S, Ev].

    A bias is no mask: Swin adds it in an operation of its own.
    """
    weights = prod(q.shape[:-1]) * k.shape[-2]
    masked = attn_mask is not None and attn_mask.dtype == torch.bool
    return weights * v.shape[-1] + (0 if masked else weights * q.shape[-1])


def _batch_norm(out, x, weight, bias, mean, var, training, *_, **__) -> int:
    return x.numel() * ((5 if training else 2) if weight is not None else (4 if training else 1))


def _norm(affine: int) -> Callable:
    """5 per element of the input, 4 without an affine weight, which is argument number `affine` (if given at all)."""
    return lambda out, *args, **_: args[0].numel() * (4 if args[affine : affine + 1] in ((), (None,)) else 5)


def _per_input(scale: int) -> Callable:
    return lambda out, x, *_, **__: scale * x.numel()


def _per_output(scale: int) -> Callable:
    return lambda out, *_, **__: scale * out.numel()


_FLOPS = {
    "aten::linear": _linear,
    "aten::mm": _mm,
    "aten::bmm": _mm,
    "aten::addmm": _addmm,
    "aten::conv1d": _conv,
    "aten::conv2d": _conv,
    "aten::conv3d": _conv,
    "aten::convolution": _conv_general,
    "aten::scaled_dot_product_attention": _attention,
    "aten::layer_norm": _norm(affine=2),
    "aten::group_norm": _norm(affine=2),
    "aten::batch_norm": _batch_norm,
    "aten::upsample_bilinear2d": _per_output(4),
    "aten::upsample_nearest2d": _per_output(1),
    "aten::grid_sampler": _per_output(4),
    "aten::adaptive_avg_pool2d": _per_input(1),
}


def _resized(x, size, align_corners, scales=None, *_) -> Tensor:
    size = size if size is not None else [int(n * f) for n, f in zip(x.shape[2:], scales)]
    return x.new_empty(*x.shape[:2], *size)


# PyTorch works the shapes of these out in Python, slowly; on tensors without values they are obvious.
_SHAPES = {
    "aten::linear": lambda x, weight, bias=None: x.new_empty(*x.shape[:-1], weight.shape[0]),
    "aten::layer_norm": lambda x, *_, **__: torch.empty_like(x),
    "aten::group_norm": lambda x, *_, **__: torch.empty_like(x),
    "aten::batch_norm": lambda x, *_, **__: torch.empty_like(x),
    "aten::scaled_dot_product_attention": lambda q, k, v, *_, **__: q.new_empty(*q.shape[:-1], v.shape[-1]),
    "aten::upsample_bilinear2d": _resized,
}


# --- running a module without values ---------------------------------------------------------------------------------


def _without_values(module: nn.Module) -> nn.Module:
    """A copy for evaluation whose parameters and buffers have shapes and types only; hooks stay behind."""
    empty: dict[int, Tensor] = {}
    for p in module.parameters():
        empty[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    for b in module.buffers():
        empty[id(b)] = torch.empty_like(b, device="meta")
    bare = copy.deepcopy(module, empty)  # the second argument says what stands for what
    for m in bare.modules():
        m._forward_hooks.clear()
        m._forward_pre_hooks.clear()
    return bare.eval()


class _OnMeta(TorchFunctionMode):
    """Every tensor is made without values, on the device `meta`, and says that it is on the CPU.

    Code that asks for a tensor's device in order to choose a precision (torch.autocast) does not know `meta`.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:
            return torch.device("cpu")
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": "meta"}
        args = tuple(torch.device("meta") if isinstance(a, torch.device) else a for a in args)
        return func(*args, **kwargs)


@contextlib.contextmanager
def _shapes_only() -> Iterator[None]:
    """Inference without values, in full precision, and with attention in its plain form."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(), torch.autocast("cpu", enabled=False), torch.device("meta"), _OnMeta():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _checked_size(size: Sequence[int]) -> tuple[int, int]:
    height, width = (int(n) for n in size)
    if height < 1 or width < 1:
        raise ValueError(f"a size is a height and a width of at least 1 pixel, got {height} x {width}")
    return height, width
