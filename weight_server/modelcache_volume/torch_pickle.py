"""Reads the pickles inside torch's checkpoints without executing anything. Pure.

A pickle is a program for a stack machine; `pickle.load` lets it call any function. This reader interprets the opcodes
itself (https://docs.python.org/3/library/pickletools.html), knows only the few that `torch.save` writes for a state
dict, and gives each name on its allow-list a fixed meaning of its own: nothing is imported, nothing is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelcache_volume.torch_opcodes import UnknownOpcodeError, read_opcodes

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_PICKLE_BYTES = 32 * 2**20
MAX_OPCODES = 2_000_000  # some 50,000 tensors; more of them would take more memory than a fetch has
_MAX_DIMENSIONS = 64  # torch's own limit
_KEYS = (str, int, float, bool, type(None))


class RefusedPickleError(Exception):
    """The pickle is malformed, or asks for something that no state dict needs; the message says what."""


@dataclass(frozen=True)
class Storage:
    """A run of elements in the checkpoint.

    Attributes:
        kind: Class of the storage, such as "FloatStorage"; it says the elements' type, except for "UntypedStorage".
        key: Names the run in its checkpoint.
        count: Elements; bytes for "UntypedStorage".
    """

    kind: str
    key: str
    count: int


@dataclass(frozen=True)
class TensorView:
    """A tensor: a view of a storage.

    Attributes:
        storage: Where its elements are.
        dtype: As torch spells it ("float8_e5m2") where the storage is untyped; else "".
        offset: Of its first element, in elements.
        shape: Elements along each dimension.
        strides: In elements.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Pickle:
    """What one pickle holds.

    Attributes:
        value: Made of None, bool, int, float, str, bytes, list, tuple, dict, `Storage` and `TensorView`.
        storages: All storages that it refers to, by key.
        end: Where it ends.
    """

    value: Any
    storages: dict[str, Storage]
    end: int


@dataclass(frozen=True)
class _Global:
    name: str


_STORAGES = frozenset(
    f"torch {kind}Storage"
    for kind in (
        "Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool", "ComplexFloat",
    )
) | {"torch.storage UntypedStorage"}  # fmt: skip
_DTYPES = frozenset(
    f"torch {dtype}"
    for dtype in (
        "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
        "uint16", "uint32", "uint64",
    )
)  # fmt: skip


def read_pickle(data: bytes, start: int = 0) -> Pickle:
    """Reads the pickle that begins at `start`.

    Raises:
        RefusedPickleError: It is malformed, too long, or uses an opcode or global that is not allowed (it is named).
    """
    machine = _Machine()
    try:
        for count, (name, argument, end) in enumerate(read_opcodes(data, start)):
            if count > MAX_OPCODES:
                raise RefusedPickleError(f"it has more than {MAX_OPCODES} opcodes")
            if name == "STOP":
                return Pickle(machine.stack.pop(), machine.storages, end)
            machine.step(name, argument)
    except UnknownOpcodeError as error:
        raise RefusedPickleError(f"it uses the opcode {error}, which no state dict needs") from error
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise RefusedPickleError(f"it is malformed ({type(error).__name__}: {str(error)[:100]})") from error
    raise AssertionError("read_opcodes ends with STOP or an error")


class _Machine:
    """The stack machine; what it cannot do raises an ordinary exception, which `read_pickle` translates."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.storages: dict[str, Storage] = {}
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        if name in _PUSH_ARGUMENT:
            self.stack.append(argument)
        elif name in _PUSH:
            self.stack.append(_PUSH[name]())
        elif name not in _NOTHING:
            _ACTIONS[name](self, argument)

    def mark(self, _: Any) -> None:
        self._marks.append(len(self.stack))

    def pop_mark(self) -> list[Any]:
        start = self._marks.pop()
        if start > len(self.stack):
            raise IndexError("mark above the stack")
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def get(self, argument: int) -> None:
        self.stack.append(self._memo[argument])

    def put(self, argument: int) -> None:
        self._memo[argument] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self.stack[-1]

    def make_tuple(self, count: int) -> None:
        items = tuple(self.stack[len(self.stack) - count :])
        if len(items) != count:
            raise IndexError("stack is too short")
        del self.stack[len(self.stack) - count :]
        self.stack.append(items)

    def mark_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.pop_mark()))

    def append(self, _: Any) -> None:
        item = self.stack.pop()
        self._top(list).append(item)

    def appends(self, _: Any) -> None:
        items = self.pop_mark()
        self._top(list).extend(items)

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._top(dict)[_key(key)] = value

    def set_items(self, _: Any) -> None:
        items = self.pop_mark()
        if len(items) % 2:
            raise IndexError("a key without a value")
        self._top(dict).update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def build(self, _: Any) -> None:
        # The state of an OrderedDict is its _metadata, which says nothing about tensors.
        self.stack.pop()
        self._top(dict)

    def named(self, argument: str) -> None:
        self.stack.append(_allowed(argument))

    def stack_named(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError("a global's name is no text")
        self.stack.append(_allowed(f"{module} {name}"))

    def reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Global) or function.name not in _CALLS or not isinstance(arguments, tuple):
            raise RefusedPickleError(f"it calls {_spell(function)}")
        self.stack.append(_CALLS[function.name](*arguments))

    def persistent(self, _: Any) -> None:
        kind, storage, key, _location, count, *view = self.stack.pop()
        if kind != "storage" or not isinstance(storage, _Global) or storage.name not in _STORAGES:
            raise RefusedPickleError(f"it refers to something that is no storage ({_spell(storage)})")
        if view not in ([], [None]):
            raise RefusedPickleError("it has views of storages, as torch before 0.4 wrote them")
        if not isinstance(key, str):
            raise TypeError("a storage's key is no text")
        found = Storage(storage.name.rpartition(" ")[2], key, _size(count))
        if self.storages.setdefault(key, found) != found:
            raise ValueError("two storages have one name")
        self.stack.append(found)

    def _top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise TypeError(f"a {kind.__name__} is expected")
        return self.stack[-1]


def _spell(value: Any) -> str:
    return value.name.replace(" ", ".") if isinstance(value, _Global) else f"a {type(value).__name__}"


def _allowed(name: str) -> _Global:
    if name not in _CALLS and name not in _STORAGES and name not in _DTYPES:
        raise RefusedPickleError(
            f"it asks for {name.replace(' ', '.')[:200]}, which no state dict needs and is never run"
        )
    return _Global(name)


def _key(value: Any) -> Any:
    # A deeply nested tuple as a key would overflow the interpreter's own stack when it is hashed.
    if not isinstance(value, _KEYS):
        raise TypeError("a key is neither text nor a number")
    return value


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("a size or offset is not a non-negative integer")
    return value


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list):
        raise TypeError("a shape is no tuple")
    return tuple(_size(value) for value in values)


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any = None, _hooks: Any = None, metadata: Any = None
) -> TensorView:
    _refuse_bits(metadata)
    if not isinstance(storage, Storage) or storage.kind == "UntypedStorage":
        raise TypeError("a tensor has no typed storage")
    return _view(storage, "", offset, shape, strides)


def _untyped_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
) -> TensorView:
    _refuse_bits(metadata)
    if not isinstance(storage, Storage) or storage.kind != "UntypedStorage":
        raise TypeError("a tensor has no untyped storage")
    if not isinstance(dtype, _Global) or dtype.name not in _DTYPES:
        raise TypeError("a tensor has no dtype")
    return _view(storage, dtype.name.rpartition(" ")[2], offset, shape, strides)


def _refuse_bits(metadata: Any) -> None:
    """The stored bytes of a conjugated or negated view are not its numbers (torch._utils.set_tensor_metadata)."""
    if metadata:
        raise ValueError("a tensor is a conjugated or negated view; save it after resolve_conj() and resolve_neg()")


def _view(storage: Storage, dtype: str, offset: Any, shape: Any, strides: Any) -> TensorView:
    view = TensorView(storage, dtype, _size(offset), _sizes(shape), _sizes(strides))
    if len(view.shape) != len(view.strides) or len(view.shape) > _MAX_DIMENSIONS:
        raise ValueError("shape and strides differ in length, or are too many")
    return view


def _parameter(data: Any, *_flags: Any) -> TensorView:
    if not isinstance(data, TensorView):
        raise TypeError("a parameter is no tensor")
    return data


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    if not isinstance(pairs, list | tuple):
        raise TypeError("an OrderedDict is made from something else than pairs")
    return {_key(key): value for key, value in pairs}


# What each name on the allow-list means here.
_CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _ordered_dict,
    "torch Size": _sizes,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _untyped_tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_parameter_with_state": _parameter,
}

_PUSH_ARGUMENT = frozenset(
    (
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "LONG4",
        "BINFLOAT",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "SHORT_BINBYTES",
    )
)
_PUSH: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_NOTHING = frozenset(("PROTO", "FRAME"))
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "TUPLE": _Machine.mark_tuple,
    "TUPLE1": lambda machine, _: machine.make_tuple(1),
    "TUPLE2": lambda machine, _: machine.make_tuple(2),
    "TUPLE3": lambda machine, _: machine.make_tuple(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "BUILD": _Machine.build,
    "GLOBAL": _Machine.named,
    "STACK_GLOBAL": _Machine.stack_named,
    "REDUCE": _Machine.reduce,
    "BINPERSID": _Machine.persistent,
}
