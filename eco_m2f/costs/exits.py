"""GFLOPs of a model at each exit, in the paper's convention, without running the model.

Backbone and head run once on tensors without values. A tape records the cost of each operator and the operators that
its inputs came from. The cost of exit k is that of all operators that its prediction depends on. Post-processing
depends on values and is counted by a formula. Weights and random state stay as they are. A run takes a fraction of a
second. From the third size on, costs are computed in closed form, exactly (`closed_form.py`).

The `paper` convention is that of detectron2's `FlopCountAnalysis` on a traced Mask2Former with its CUDA op:
- A multiply-add is one FLOP. Convolutions and matrix products count. Layer and group norm cost 5 per element, batch
  norm 2, bilinear resizing 4 per element of the output. Softmax, element-wise operations and embeddings cost nothing.
- The core of deformable attention costs nothing, because the tool cannot look into a CUDA op.
- In attention, weights times values counts. Queries times keys counts only without a mask, because the tool does not
  know `baddbmm`. Attention is one operator here, so a rule does this.
- A trace has no unused results. The class logits of auxiliary predictions do not count. Their masks count at full size,
  since attention uses them. Inference here makes smaller masks; that is not counted.
- "Tx. Enc.", here `pixel_decoder`, counts the submodules of the pixel decoder, without the resizing between them. In
  DETR it is the layers of the transformer encoder, where all products of queries and keys are masked.

The `full` convention adds the deformable core by its own formula. Neither convention has a gate's few thousand
multiply-adds. For its means over COCO, the paper resizes each result to the image's own size; `mean` takes that size
too.
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
    """The costs per exit of a `Parent`, with or without early exits, for images of any size.

    It copies the model's present architecture without weights, and keeps the costs of each size.
    """

    key, column, convention = "exits", "exit", CONVENTION

    def __init__(self, model: nn.Module, exits: Sequence[int] | None = None):
        """
        Args:
            model: has `backbone`, `head` (an `ExitHead`), `postprocessor` and `cost_parts`; may be wrapped for
                data-parallel training.
            exits: default: `exits_of(model)`.

        Raises:
            ValueError: the model lacks a part or an exit.
        """
        model = getattr(model, "module", model)
        missing = [n for n in ("backbone", "postprocessor") if not hasattr(model, n)]  # a `Parent` also has a head
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
            output_size: (height, width) of the results; default: the padded size.

        Returns:
            {exit: {"total", "encoder"}}; "encoder" is the paper's "Tx. Enc.".
        """
        details = self.details(padded_size, output_size)
        return {k: {"total": d["total"], "encoder": d[self._encoder]} for k, d in details.items()}

    def details(
        self, padded_size: Sequence[int], output_size: Sequence[int] | None = None
    ) -> dict[int, dict[str, float]]:
        """GFLOPs by part: {exit: {"total", "backbone", "pixel_decoder", "predictor", "postprocessing", ..}}.

        They are in the `paper` convention; "total_full" and "pixel_decoder_full" include the deformable core. The total
        also includes resizing inside the pixel decoder, which is in no part. DETR's parts are "encoder" and "decoder";
        its projection, classes and boxes are only in the total. Arguments as in `__call__`.
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
        """A run's numbers as integers: the number of queries, then for each exit the total, the core and the parts."""
        found = self.measure(size)
        numbers = ((cost.flops, cost.core, *cost.parts.values()) for cost in found.values())
        return (found[self.exits[0]].num_queries, *chain.from_iterable(numbers))

    def measure(self, padded_size: Sequence[int]) -> dict[int, Measurement]:
        """{exit: FLOPs of backbone and head, also by module}, by one run without values for all exits.

        The decoder costs the same at all exits and runs only on the last.
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
    """The functions that counts depend on: maps of each stride, attention on the coarsest, the backbone's windows."""
    coarsest = backbone.output_shape()[head.coarsest].stride
    windows = {getattr(m, "window_size", None) for m in backbone.modules()}
    return SizeFunctions([2, 4, 8, 16, 32], [coarsest], sorted(w for w in windows if isinstance(w, int)))


def exits_of(model: nn.Module) -> tuple[int, ...]:
    """The exits of a model with early exits. For a parent: its encoder's exits from 2 on, or else the last."""
    offered = model.head.exits
    return tuple(getattr(model, "exits", [k for k in offered if k >= 2])) or tuple(offered[-1:])


@dataclass(frozen=True)
class Measurement:
    """FLOPs of a prediction: total, of the deformable core, by part, and by module with its children."""

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
    """The FLOPs of a `PostProcessor`: resizing masks to the padded and to the output size, and the semantic product.

    Resizing to the same size counts too, as in the traced reference. Boxes cost nothing.
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
