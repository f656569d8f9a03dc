"""GFLOPs of a model at each of its exits, in the convention of the paper, without running it.

The model's backbone and head run once on tensors that have a shape but no values, and a tape notes what each operator
costs and which operators its inputs came from. The cost of exit k is that of the operators its prediction depends on;
post-processing, which depends on values, is counted by its formula. Neither weights nor random state are touched. A run
takes a fraction of a second; from the third size on costs are known in closed form, exactly (`closed_form.py`).

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

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod

import torch
from torch import Tensor, nn

from .closed_form import SizeCounts, SizeFunctions
from .sizes import checked_size
from .table import CONVENTION, CostTable
from .tape import Op, OpTape, shapes_only, without_values


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
        self.size_divisibility = max(1, getattr(model, "size_divisibility", 1))
        self._post = model.postprocessor
        self._backbone = without_values(model.backbone)
        self._head = without_values(model.head)
        self._head_name = model.head_name
        self._parts = {"backbone": "backbone", **model.cost_parts}
        self._encoder = next(iter(model.cost_parts))
        self._counts = SizeCounts(self._count, functions_of(self._backbone, self._head), self.size_divisibility)

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
        padded = checked_size(padded_size)
        output = padded if output_size is None else checked_size(output_size)
        counts, result = iter(self._counts(padded)), {}
        post = postprocessing_flops(self._post, next(counts), padded, output)
        for k in self.exits:
            total, core = next(counts) + post, next(counts)
            flops = {"total": total, **{part: next(counts) for part in self._parts}, "postprocessing": post}
            flops["total_full"] = total + core
            flops[f"{self._encoder}_full"] = flops[self._encoder] + core
            result[k] = {name: value / 1e9 for name, value in flops.items()}
        return result

    def _count(self, size: tuple[int, int]) -> tuple[int, ...]:
        """What a run tells in integers: the number of queries; then of every exit the total, the core and the parts."""
        found = self.measure(size)
        numbers = ((cost.flops, cost.core, *cost.parts.values()) for cost in found.values())
        return (found[self.exits[0]].num_queries, *chain.from_iterable(numbers))

    def measure(self, padded_size: Sequence[int]) -> dict[int, Measurement]:
        """{exit: what backbone and head cost}, in FLOPs, also by module, from a run without values.

        One pass for all exits; the decoder, which costs the same at each, runs on the last exit alone.
        """
        size = checked_size(padded_size)
        tape = OpTape()
        with shapes_only(), tape.attributing(**{"backbone": self._backbone, self._head_name: self._head}), tape:
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
        return {k: _measurement(ops[k], queries, self._parts) for k in self.exits}


def functions_of(backbone: nn.Module, head: nn.Module) -> SizeFunctions:
    """What counts of these may depend on: maps of every stride, attention on the coarsest, the backbone's windows."""
    coarsest = backbone.output_shape()[head.coarsest].stride
    windows = {getattr(m, "window_size", None) for m in backbone.modules()}
    return SizeFunctions([2, 4, 8, 16, 32], [coarsest], sorted(w for w in windows if isinstance(w, int)))


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


def _measurement(ops: Iterable[Op], num_queries: int, prefixes: Mapping[str, str]) -> Measurement:
    core, at = 0, Counter()  # FLOPs by the modules that an operator ran in
    for op in ops:
        core += op.core
        at[op.modules] += op.flops
    by_module, parts = Counter(), dict.fromkeys(prefixes, 0)
    for modules, flops in at.items():
        if flops:
            by_module.update(dict.fromkeys(modules, flops))
        for part, prefix in prefixes.items():
            if any(name.startswith(prefix) for name in modules):
                parts[part] += flops
    return Measurement(at.total(), core, parts, dict(by_module), num_queries)


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
