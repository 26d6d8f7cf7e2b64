"""Interprets the pickle of a PyTorch state dict and executes nothing.

A pickle is a program for a stack machine. This machine has only the instructions that a state dict needs. It resolves names
from a fixed table, calls nothing that the file chooses, and never hashes, compares, copies or prints a nested value, so that
neither deep nor much shared values cost more than the instructions that built them. Their number is limited.
"""

import math
import pickletools
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from calm.runs.weight_files import shown

STORAGE_TYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_GLOBALS = {("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict"), *(("torch", n) for n in STORAGE_TYPES)}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset("INT BININT BININT1 BININT2 LONG LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE".split())

MOST_INSTRUCTIONS = 2_000_000  # of the pickle; a tensor takes about 35
LARGEST_NUMBER = 1 << 48  # of elements, strides and offsets
MOST_AXES = 32


class Refused(Exception):
    """Why a pickle is not taken for a description of tensors."""


class _Global(NamedTuple):
    """A name that the file may use; it stands for itself, nothing is imported."""

    module: str
    name: str


class Storage(NamedTuple):
    """A flat array somewhere in the archive; `length` in elements."""

    key: str
    dtype: np.dtype
    length: int


class Tensor(NamedTuple):
    """A view of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def interpret(data: bytes) -> Any:
    """The value that a pickle describes, of None, numbers, text, tuples, lists, dicts with text keys, and our named tuples."""
    try:
        with warnings.catch_warnings(action="ignore"):  # pickletools warns of escapes in text of kinds that are refused anyway
            return _run(data)
    except (ValueError, LookupError) as error:  # of pickletools, of an empty stack, of a memo that was never written
        raise Refused(f"its pickle cannot be read so: {shown(error)}") from error


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    below: list[list[Any]] = []  # for each open MARK, the stack under it
    memo: dict[int, Any] = {}
    instructions: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]] = pickletools.genops(data)
    for count, (opcode, argument, _) in enumerate(instructions, 1):
        if count > MOST_INSTRUCTIONS:
            raise Refused(f"the file has more than {MOST_INSTRUCTIONS} pickle instructions")
        name = opcode.name
        if name in _LITERALS:
            stack.append(argument)
            continue
        match name:
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "MARK":
                below.append(stack)
                stack = []
            case "TUPLE":
                items, stack = stack, below.pop()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(name[-1])
                if len(stack) < size:
                    raise IndexError("pop from an empty stack")
                stack[-size:] = [tuple(stack[-size:])]
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "APPEND" | "APPENDS":
                items = [stack.pop()]
                if name == "APPENDS":
                    items, stack = stack, below.pop()
                if type(stack[-1]) is not list:
                    raise Refused("it appends to something that is not a list")
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                if name == "SETITEMS":
                    items, stack = stack, below.pop()
                else:
                    value, key = stack.pop(), stack.pop()
                    items = [key, value]
                _set_items(stack[-1], items)
            case "GLOBAL":
                stack.append(_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_global(module, attribute))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case "BUILD":  # the `_metadata` attribute of a state dict; not needed
                stack.pop()
                if type(stack[-1]) is not dict:
                    raise Refused("it sets the state of something that is not an OrderedDict")
            case "STOP":
                return stack.pop()
            case "PROTO" | "FRAME":
                pass
            case _:
                if name not in _CONSTANTS:
                    raise Refused(f"the file uses pickle opcode {name}")
                stack.append(_CONSTANTS[name])
    raise ValueError("it has no end")


def _set_items(target: Any, items: list[Any]) -> None:
    if type(target) is not dict or len(items) % 2:
        raise Refused("it sets items of something that is not a mapping")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:  # hashing a nested tuple can take forever, or overflow the stack
            raise Refused("it has a key that is not text")
        target[key] = value


def _global(module: Any, name: Any) -> _Global:
    if type(module) is not str or type(name) is not str:
        raise Refused("it names something by other than text")
    if (module, name) not in _GLOBALS:
        raise Refused(f"the file names {shown(module)}.{shown(name)}")
    return _Global(module, name)


def _storage(identifier: Any) -> Storage:
    match identifier:
        case ("storage", _Global("torch", name), str(key), str(), int(length)) if 0 <= length <= LARGEST_NUMBER:
            return Storage(key, STORAGE_TYPES[name], length)
    raise Refused("a storage is described wrongly")


def _call(function: Any, arguments: Any) -> Tensor | dict[str, Any]:
    match function, arguments:
        case _Global("collections"), ():
            return {}
        case _Global("torch._utils"), (Storage() as storage, int(offset), tuple(shape), tuple(strides), *_):
            plain = len(shape) == len(strides) <= MOST_AXES and all(map(_is_size, (offset, *shape, *strides)))
            if plain and math.prod(size for size in shape if size) <= LARGEST_NUMBER:
                return Tensor(storage, offset, shape, strides)
            raise Refused("a tensor is described wrongly")
    raise Refused("it calls something other than a tensor or an empty OrderedDict")


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number <= LARGEST_NUMBER
