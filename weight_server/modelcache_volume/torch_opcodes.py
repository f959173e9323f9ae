"""Cuts a pickle into its opcodes and their arguments. Pure; knows only the opcodes that torch.save writes.

pickletools.genops does so too, but first reads the argument of any opcode, at a quarter of the speed.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Iterator
from typing import Any

_Reader = Callable[[bytes, int], tuple[Any, int]]


class UnknownOpcodeError(Exception):
    """The pickle uses an opcode that is not known here; the message is its name."""


def read_opcodes(data: bytes, position: int) -> Iterator[tuple[str, Any, int]]:
    """Gives (opcode's name, argument, position after it) of each opcode; the caller stops at STOP.

    Raises:
        UnknownOpcodeError: See above.
        ValueError: The pickle is cut off, or an argument is malformed.
    """
    while position < len(data):
        code = data[position]
        if code not in _OPCODES:
            raise UnknownOpcodeError(_NAMES.get(chr(code), f"{code:#04x}"))
        name, reader = _OPCODES[code]
        argument, position = reader(data, position + 1)
        yield name, argument, position
    raise ValueError("it has no end")


def _nothing(_data: bytes, position: int) -> tuple[None, int]:
    return None, position


def _take(data: bytes, position: int, length: int) -> tuple[bytes, int]:
    end = position + length
    if end > len(data):
        raise ValueError("it is cut off")
    return data[position:end], end


def _number(layout: str) -> _Reader:
    form = struct.Struct(layout)

    def read(data: bytes, position: int) -> tuple[Any, int]:
        field, end = _take(data, position, form.size)
        return form.unpack(field)[0], end

    return read


def _counted(layout: str, decode: Callable[[bytes], Any]) -> _Reader:
    """An argument with its length before it."""
    count = _number(layout)

    def read(data: bytes, position: int) -> tuple[Any, int]:
        length, position = count(data, position)
        field, position = _take(data, position, length)
        return decode(field), position

    return read


def _long(field: bytes) -> int:
    return int.from_bytes(field, "little", signed=True)


def _module_and_name(data: bytes, position: int) -> tuple[str, int]:
    first = data.index(b"\n", position)
    second = data.index(b"\n", first + 1)
    return f"{data[position:first].decode()} {data[first + 1 : second].decode()}", second + 1


_READERS: dict[str, _Reader] = {
    "PROTO": _number("<B"),
    "FRAME": _number("<Q"),
    "BININT": _number("<i"),
    "BININT1": _number("<B"),
    "BININT2": _number("<H"),
    "LONG1": _counted("<B", _long),
    "BINFLOAT": _number(">d"),
    "SHORT_BINUNICODE": _counted("<B", bytes.decode),
    "BINUNICODE": _counted("<I", bytes.decode),
    "BINUNICODE8": _counted("<Q", bytes.decode),
    # Strings of Python 2, in which old checkpoints were written.
    "SHORT_BINSTRING": _counted("<B", bytes.decode),
    "BINSTRING": _counted("<I", bytes.decode),
    "SHORT_BINBYTES": _counted("<B", bytes),
    "BINBYTES": _counted("<I", bytes),
    "BINGET": _number("<B"),
    "LONG_BINGET": _number("<I"),
    "BINPUT": _number("<B"),
    "LONG_BINPUT": _number("<I"),
    "GLOBAL": _module_and_name,
}
_READERS |= dict.fromkeys(
    (
        "MARK",
        "STOP",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "EMPTY_DICT",
        "EMPTY_LIST",
        "EMPTY_TUPLE",
        "MEMOIZE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "APPEND",
        "APPENDS",
        "SETITEM",
        "SETITEMS",
        "BUILD",
        "STACK_GLOBAL",
        "REDUCE",
        "BINPERSID",
    ),
    _nothing,
)
_NAMES = {opcode.code: opcode.name for opcode in pickletools.opcodes}
_OPCODES = {ord(op.code): (op.name, _READERS[op.name]) for op in pickletools.opcodes if op.name in _READERS}
