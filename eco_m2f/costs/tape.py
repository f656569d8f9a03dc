"""Runs a module on tensors without values, and records the cost and the dependences of each operator."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops.flops import OP_NAME, multiply_adds
from .rules import FLOPS, SHAPES


@dataclass(frozen=True, eq=False)
class Op:
    """An operator that ran: its cost, the modules around it (outermost first), and the operators it depends on."""

    flops: int
    core: int
    modules: tuple[str, ...]
    sources: tuple[Op, ...]


class OpTape(TorchDispatchMode):
    """Records the operators that run inside it. Use it under `torch.inference_mode()`.

    Autograd would split attention and other composite operators before the tape sees them. Dependence follows memory:
    an operator depends on those that wrote to the memory of its inputs.
    """

    def __init__(self):
        super().__init__()
        self._running: list[str] = []
        self._writer: dict[int, Op] = {}  # by memory
        self._memory: list[Tensor] = []  # kept alive, because a new tensor could get the address of a freed one

    @contextlib.contextmanager
    def attributing(self, **modules: nn.Module) -> Iterator[None]:
        """Attributes the operators that run meanwhile to these modules and their submodules, by their forward calls."""
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
        """The operator that last wrote to a tensor's memory; None for memory older than the tape."""
        return self._writer.get(_memory(t))

    def ancestors(self, tensors: Iterable[Tensor]) -> dict[Op, None]:
        """All operators that the tensors depend on, as an ordered set."""
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
        if name in FLOPS or name == OP_NAME or not _is_composite(func):
            out = SHAPES[name](*args, **kwargs) if name in SHAPES else NotImplemented
            out = func(*args, **kwargs) if out is NotImplemented else out
            core = multiply_adds(args[0].shape, args[2].shape) if name == OP_NAME else 0
            self._note(func, args, kwargs, out, FLOPS[name](out, *args, **kwargs) if name in FLOPS else 0, core)
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
    """Whether PyTorch defines the operator by other operators. Then those are counted."""
    return func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), torch._C.DispatchKey.CompositeImplicitAutograd
    )


def without_values(module: nn.Module) -> nn.Module:
    """A copy for evaluation. Its parameters and buffers have shapes and types but no values; it has no hooks."""
    empty: dict[int, Tensor] = {}
    for p in module.parameters():
        empty[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    for b in module.buffers():
        empty[id(b)] = torch.empty_like(b, device="meta")
    bare = copy.deepcopy(module, empty)  # `empty` replaces tensors by their copies
    for m in bare.modules():
        m._forward_hooks.clear()
        m._forward_pre_hooks.clear()
    return bare.eval()


class _OnMeta(TorchFunctionMode):
    """Makes all tensors on the device `meta`, without values. They report the CPU as their device.

    Code that chooses a precision by the device (torch.autocast) does not know `meta`.
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
def shapes_only() -> Iterator[None]:
    """Inference without values, in full precision, with plain attention."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(), torch.autocast("cpu", enabled=False), torch.device("meta"), _OnMeta():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def module_flops(module: nn.Module, *shapes: Sequence[int]) -> int:
    """The FLOPs, in the paper's convention, of a module in eval mode on tensors of these shapes."""
    tape, bare = OpTape(), without_values(module)
    with shapes_only(), tape:
        out = bare(*(torch.empty(*shape) for shape in shapes))
    return sum(op.flops for op in tape.ancestors([out]))
