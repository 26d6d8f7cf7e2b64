"""Reads the weights that `torch.save` wrote, without torch and without running anything from the file.

A `.bin` is a zip archive: `data.pkl`, a pickle that describes the tensors, and one member `data/<key>` for each storage. The
pickle goes through `calm.interop.tensor_pickle`, which executes nothing and bounds its own time and memory. For the rest the
size of the file is the bound: members are stored, not compressed, each byte of the file is read at most once, and a tensor has
no more elements than its storage.
"""

import io
import math
import os
import stat
import struct
import zipfile
from pathlib import Path

import numpy as np

from calm.errors import CalmError, UsageError
from calm.interop.tensor_pickle import Refused, Storage, Tensor, interpret
from calm.runs.weight_files import shown

LARGEST_PICKLE = 16 << 20  # bytes of data.pkl; a model of 10,000 tensors has about 2 MB
LARGEST_READ = 16 << 20  # bytes taken from the file at once, and so of the archive's directory; a storage takes about 70 there
LONGEST_NAME = 1000  # characters of a tensor's name


def load_torch(path: str | Path) -> dict[str, np.ndarray]:
    """Tensors by name from a file that `torch.save(state_dict, path)` wrote (PyTorch 1.6 or newer), each in its own type.

    Tensors that share a storage share memory here. No code of the file is ever run.

    Raises:
        UsageError: the file holds anything but tensors, storages and OrderedDict, is damaged, cut short, encrypted or
            compressed, or describes more than a file of its size can hold. The message is one line that names the file.
    """
    path = Path(path)
    try:
        with open(path, "rb", buffering=0, opener=_open_without_waiting) as raw:
            status = os.fstat(raw.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"{path}: cannot be read (not a regular file)")
            with _BoundedReader(raw, status.st_size) as file, zipfile.ZipFile(file) as archive:
                return _read(archive, status.st_size, path)
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    except MemoryError as error:
        raise CalmError(f"{path}: its tensors do not fit into memory") from error
    # What zipfile raises for damaged archives; RuntimeError and its NotImplementedError for kinds that it does not know.
    except (zipfile.BadZipFile, EOFError, ValueError, LookupError, OverflowError, RuntimeError, struct.error) as error:
        raise UsageError(
            f"{path}: cut short, damaged or not the zip archive of torch.save; download it again, or save it with PyTorch 1.6 "
            "or newer"
        ) from error


def _open_without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # or else opening a named pipe waits for its writer


class _BoundedReader(io.BufferedReader):
    """A file of `size` bytes of which no single read takes more than LARGEST_READ, whatever the archive's directory says."""

    def __init__(self, raw: io.FileIO, size: int):
        super().__init__(raw)
        self._size = size

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = self._size - self.tell() if size is None or size < 0 else size
        if wanted > LARGEST_READ:
            raise zipfile.BadZipFile(f"a read of {wanted} bytes at once")
        return super().read(wanted)


def _read(archive: zipfile.ZipFile, file_size: int, path: Path) -> dict[str, np.ndarray]:
    pickles = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UsageError(f"{path}: expected the archive of torch.save with one data.pkl, found {len(pickles)}")
    prefix = pickles[0].removesuffix("data.pkl")
    try:
        state = interpret(_small_member(archive, pickles[0], LARGEST_PICKLE, path))
    except Refused as reason:
        raise UsageError(
            f"{path}: refused, nothing was executed: this reader knows tensors, storages and OrderedDict only, and {reason}"
        ) from reason
    if type(state) is not dict or not all(isinstance(value, Tensor) for value in state.values()):
        raise UsageError(f"{path}: expected a state dict, a mapping of names to tensors")
    for name in state:
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise UsageError(f"{path}: a tensor has an impossible name, which begins {shown(name)!r}")
    order = f"{prefix}byteorder"
    swap = order in archive.namelist() and _small_member(archive, order, 16, path) == b"big"
    storages = _Storages(archive, prefix, swap, file_size)
    return {name: _view(tensor, storages, f"{path}: {name}") for name, tensor in state.items()}


def _small_member(archive: zipfile.ZipFile, name: str, limit: int, path: Path) -> bytes:
    entry = archive.getinfo(name)
    _require_plain(entry, path)
    if entry.file_size > limit:
        raise UsageError(f"{path}: {shown(name)} has {entry.file_size} bytes, at most {limit} are read")
    return archive.read(entry)


def _require_plain(entry: zipfile.ZipInfo, where: object) -> None:
    if entry.flag_bits & 1:
        raise UsageError(f"{where}: {shown(entry.filename)} is encrypted; torch.save writes plain bytes")
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise UsageError(f"{where}: {shown(entry.filename)} is compressed; torch.save writes plain bytes")


class _Storages:
    """The storages of an archive as flat arrays, each read once and checked against its CRC."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str, swap: bool, file_size: int):
        self._archive, self._prefix, self._swap, self._left = archive, prefix, swap, file_size
        self._read: dict[str, np.ndarray] = {}

    def get(self, storage: Storage, where: str) -> np.ndarray:
        """The elements `[N]` of `storage`; tensors may share it."""
        if storage.key not in self._read:
            self._read[storage.key] = self._load(storage, where)
        flat = self._read[storage.key]
        if (flat.dtype, flat.size) != (storage.dtype, storage.length):
            raise UsageError(f"{where}: storage data/{shown(storage.key)} is described in two ways")
        return flat

    def _load(self, storage: Storage, where: str) -> np.ndarray:
        name = f"data/{shown(storage.key)}"
        try:
            entry = self._archive.getinfo(f"{self._prefix}data/{storage.key}")
        except KeyError:
            raise UsageError(f"{where}: the archive has no storage {name}") from None
        needed = storage.length * storage.dtype.itemsize
        if entry.file_size != needed:
            raise UsageError(f"{where}: storage {name} should hold {needed} plain bytes, has {entry.file_size}")
        _require_plain(entry, where)
        self._left -= needed
        if self._left < 0:
            raise UsageError(f"{where}: storage {name} lies beyond the file or within another storage")
        data = np.empty(needed, np.uint8)
        with self._archive.open(entry) as member:
            for start in range(0, needed, LARGEST_READ):
                piece = member.read(min(LARGEST_READ, needed - start))
                if len(piece) < min(LARGEST_READ, needed - start):
                    raise EOFError
                data[start : start + len(piece)] = np.frombuffer(piece, np.uint8)
        if storage.dtype == np.bool_ and data.max(initial=0) > 1:
            raise UsageError(f"{where}: storage {name} holds bytes that are not booleans")
        flat = data.view(storage.dtype)
        return flat.byteswap(inplace=True) if self._swap else flat


def _view(tensor: Tensor, storages: _Storages, where: str) -> np.ndarray:
    storage, shape = tensor.storage, tensor.shape
    flat = storages.get(storage, where)
    if 0 in shape:
        return np.zeros(shape, storage.dtype)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(shape, tensor.strides, strict=True))
    if last >= storage.length:
        raise UsageError(f"{where}: a tensor of shape {shape} reaches beyond its storage of {storage.length} elements")
    if math.prod(shape) > storage.length:
        raise UsageError(f"{where}: a tensor of shape {shape} repeats the {storage.length} elements of its storage")
    strides = tuple(stride * storage.dtype.itemsize for stride in tensor.strides)
    return np.lib.stride_tricks.as_strided(flat[tensor.offset :], shape, strides, writeable=False)
