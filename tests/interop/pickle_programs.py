"""Pickle programs and archives for tests of the reader: instructions by their bytes, and what a refusal must look like."""

import pathlib
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from calm.errors import UsageError
from calm.interop.restricted_pickle import load_torch

VALUES = np.arange(12, dtype=np.float32)
MOST_SECONDS, MOST_BYTES = 30, 400e6
REBUILD, DICT = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    return b"\x8a" + bytes([len(data := value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))]) + data


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(kind: str = "FloatStorage", key: str = "0", length: int = 12) -> bytes:
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(length) + b"tQ"


def tensor(shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0, of: bytes | None = None) -> bytes:
    arguments = (storage() if of is None else of) + number(offset) + numbers(shape) + numbers(strides) + b"\x89"
    return REBUILD + b"(" + arguments + DICT + b")RtR"


def state(items: bytes) -> bytes:
    return b"\x80\x02}(" + items + b"u."


def archive(path: pathlib.Path, program: bytes, compression: int = zipfile.ZIP_STORED, values: np.ndarray = VALUES) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("model/data.pkl", program)
        file.writestr("model/data/0", values.tobytes())


def refused(path: pathlib.Path, words: str = ".", trace: bool = True, most: float = MOST_BYTES) -> None:
    """Asserts that the file is refused in one short line with its name, soon, and (if traced) without much memory."""
    if trace:
        tracemalloc.start()
    began = time.perf_counter()
    try:
        with pytest.raises(UsageError, match=words) as error:
            load_torch(path)
        assert not trace or tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - began < MOST_SECONDS
    assert_one_line(error.value, path)


def assert_one_line(error: UsageError, path: pathlib.Path) -> None:
    message = str(error)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < len(str(path)) + 400
