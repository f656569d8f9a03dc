"""Reads a pickle as plain data: numbers, strings, containers, arrays and tensors. It calls nothing that the file names.

Python's unpickler imports and calls what a file names. This one runs the opcodes itself. A name in the file chooses one
of the makers in `plain_values.py`; every other name is refused. The file's size limits memory and time, because a few
bytes can ask for gigabytes, or for a key whose hash never ends.
"""

import pickletools
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

MAX_OPCODES = 2**20  # a training checkpoint with a thousand tensors has about 10^5
MAX_DEPTH = 64  # of nested containers
MAX_BITS = 256  # of an integer
MAX_KEY_BITS = 60  # of an integer key; with more, hashes can be made to collide
ITEM_BYTES = 64  # counted for an item of a container
KEY_TYPES = (str, bytes, int, float, bool, type(None))
DICTS = (dict, OrderedDict, Counter)


class RefusedName(ValueError):
    """A pickle names something that is not plain data. `name` is fit for a message."""

    def __init__(self, name: str):
        self.name = ascii(name)[1:-1][:100]
        super().__init__(f"it names {self.name}")


class Budget:
    """The number of bytes that a file may make: a multiple of its size, because several arrays may use one string."""

    FACTOR, MINIMUM = 16, 2**20

    def __init__(self, size: int):
        self.left = self.FACTOR * size + self.MINIMUM

    def spend(self, size: int) -> None:
        """Raises ValueError if the budget is exceeded."""
        self.left -= size
        if self.left < 0:
            raise ValueError("it asks for far more memory than its own size")

    def spend_on(self, value: object) -> None:
        """Counts a copy of a value: its bytes or items. For a tuple, the members' bytes or items count too."""
        if isinstance(value, str | bytes | bytearray):
            self.spend(len(value))
        elif isinstance(value, list | tuple | dict | set | frozenset):
            self.spend(ITEM_BYTES * len(value))
        if isinstance(value, tuple):
            for item in value:
                if not isinstance(item, tuple):  # one level: no maker copies more
                    self.spend_on(item)


class Maker:
    """A function of this package that makes plain data from plain data, in place of a name in the file."""

    def __init__(self, make: Callable[..., object]):
        self.make = make


class Unbuilt:
    """A value whose content comes later, by BUILD. The value then replaces it at its places in the memo."""

    def __init__(self, build: Callable[[Any], object]):
        self.build = build
        self.places: list[int] = []


class PlainUnpickler:
    """Reads one pickle of a stream, and leaves the stream at the pickle's end.

    Args:
        stream: a buffer in memory or a mapped file. There a declared length beyond the end costs nothing.
        names: (module, name) -> a Maker or a constant.
        persistent_load: makes the value of a persistent id. Without it such ids are refused.
    """

    def __init__(
        self,
        stream: Any,
        budget: Budget,
        names: Mapping[tuple[str, str], object],
        persistent_load: Callable[[object], object] | None = None,
    ):
        self.stream, self.budget, self.names, self.persistent_load = stream, budget, names, persistent_load
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> object:
        """The value. Raises RefusedName; for a malformed pickle, ValueError, LookupError or TypeError."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self.stream)):
            if opcode.name == "STOP":
                break
            if count >= MAX_OPCODES:
                raise ValueError(f"it has more than {MAX_OPCODES} pickle opcodes")
            if opcode.name not in OPERATIONS:
                raise ValueError(f"the pickle opcode {opcode.name} is not allowed")
            OPERATIONS[opcode.name](self, argument)
        value = self.stack.pop()
        check_tree(value)
        return value

    def push(self, value: object) -> None:
        self.stack.append(value)

    def literal(self, value: object) -> None:
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise ValueError(f"it holds an integer of {value.bit_length()} bits")
        self.push(value)

    def mark(self, _: object) -> None:
        self.marks.append(len(self.stack))

    def pop_mark(self) -> list:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def pop(self, _: object) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def make_tuple(self, size: int) -> None:
        items = [self.stack.pop() for _ in range(size)]
        self.push(tuple(reversed(items)))

    def append(self, items: list) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("it appends to something that is no list")
        self.stack[-1].extend(items)

    def set_items(self, items: list) -> None:
        if type(self.stack[-1]) not in DICTS:
            raise ValueError("it sets items of something that is no dict")
        for key, value in pairs(items):
            self.stack[-1][key] = value

    def add_items(self, _: object) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise ValueError("it adds items to something that is no set")
        self.stack[-1].update(map(check_key, items))

    def put(self, place: int) -> None:
        if place < 0:
            raise ValueError(f"its memo has the index {place}")
        self.memo[place] = value = self.stack[-1]
        if isinstance(value, Unbuilt):
            value.places.append(place)

    def find(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name in it is no string")
        if (module, name) not in self.names:
            raise RefusedName(f"{module}.{name}")
        self.push(self.names[module, name])

    def call(self, _: object) -> None:
        arguments, maker = self.stack.pop(), self.stack.pop()
        if not isinstance(maker, Maker) or type(arguments) is not tuple:
            raise ValueError("it calls something that is no function")
        self.budget.spend_on(arguments)
        value = maker.make(*arguments)
        self.budget.spend(getattr(value, "nbytes", 0))  # views count too, because they may be copied later
        self.push(value)

    def build(self, _: object) -> None:
        state, target = self.stack.pop(), self.stack.pop()
        if isinstance(target, Unbuilt):
            self.budget.spend_on(state)
            value = target.build(state)
            for place in target.places:
                if self.memo[place] is target:
                    self.memo[place] = value
            target = value
        elif type(target) is not OrderedDict:  # an OrderedDict's attributes, such as _metadata, are ignored
            raise ValueError(f"it changes the state of a {type(target).__name__}")
        self.push(target)

    def persistent(self, key: object) -> None:
        if self.persistent_load is None:
            raise ValueError("it has a persistent id, which only files of torch.save have")
        self.push(self.persistent_load(key))


def pairs(items: list) -> list[tuple]:
    """[key, value, key, value, ...] -> pairs. Raises ValueError for a key that is not allowed."""
    if len(items) % 2:
        raise ValueError("a dict in it has a key without a value")
    return [(check_key(key), value) for key, value in zip(items[::2], items[1::2])]


def check_key(key: Any) -> Any:
    """Returns the key. Raises ValueError unless its hash is fast and cannot be made to collide."""
    if type(key) not in KEY_TYPES:
        raise ValueError(f"a dict or set in it has a {type(key).__name__} as key")
    if type(key) is int and key.bit_length() > MAX_KEY_BITS:
        raise ValueError(f"a dict or set in it has a key of {key.bit_length()} bits")
    return key


def check_tree(value: object) -> None:
    """Raises ValueError if a value is deeper or larger than a checkpoint can be, so that it can be copied and printed.

    Each use of a shared part counts.
    """
    remaining, rest = MAX_OPCODES, [(value, 0)]
    while rest:
        item, depth = rest.pop()
        if isinstance(item, Unbuilt | Maker):
            raise ValueError("it holds a value that is not complete")
        if isinstance(item, list | tuple | set | frozenset | dict):
            remaining -= len(item)
            if depth >= MAX_DEPTH or remaining < 0:
                raise ValueError("its containers are nested too deeply, or in themselves")
            rest.extend((child, depth + 1) for child in (item.values() if isinstance(item, dict) else item))


Operation = Callable[[PlainUnpickler, Any], object]
_LITERALS = """INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE
BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8"""
OPERATIONS: dict[str, Operation] = {
    **dict.fromkeys(["PROTO", "FRAME"], lambda machine, _: None),
    **dict.fromkeys(_LITERALS.split(), PlainUnpickler.literal),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_SET": lambda machine, _: machine.push(set()),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "MARK": PlainUnpickler.mark,
    "POP": PlainUnpickler.pop,
    "POP_MARK": lambda machine, _: machine.pop_mark(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_mark())),
    "TUPLE1": lambda machine, _: machine.make_tuple(1),
    "TUPLE2": lambda machine, _: machine.make_tuple(2),
    "TUPLE3": lambda machine, _: machine.make_tuple(3),
    "LIST": lambda machine, _: machine.push(machine.pop_mark()),
    "DICT": lambda machine, _: machine.push(dict(pairs(machine.pop_mark()))),
    "FROZENSET": lambda machine, _: machine.push(frozenset(map(check_key, machine.pop_mark()))),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    "ADDITEMS": PlainUnpickler.add_items,
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    **dict.fromkeys(["PUT", "BINPUT", "LONG_BINPUT"], PlainUnpickler.put),
    **dict.fromkeys(["GET", "BINGET", "LONG_BINGET"], lambda machine, place: machine.push(machine.memo[place])),
    "GLOBAL": lambda machine, name: machine.find(*name.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.find(machine.stack.pop(-2), machine.stack.pop()),
    **dict.fromkeys(["REDUCE", "NEWOBJ"], PlainUnpickler.call),
    "BUILD": PlainUnpickler.build,
    "BINPERSID": lambda machine, _: machine.persistent(machine.stack.pop()),
}
