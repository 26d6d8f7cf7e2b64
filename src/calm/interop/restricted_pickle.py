"""Reads the weights that `torch.save` wrote, without torch and without running anything.

A `.bin` is a zip archive: `data.pkl`, a pickle that describes the tensors, and one file `data/<key>` for each storage. A pickle
is a program. This reader knows three words of it, tensor, storage and OrderedDict, and refuses the file at any other before it
is executed: first the opcodes are walked without effect, then the unpickler resolves names from a fixed table only.
"""

import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from calm.errors import UsageError

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
# Opcodes that build plain values, name a global, call one that the table allows, and set OrderedDict's metadata.
_OPCODES = """
PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT
UNICODE BINUNICODE SHORT_BINUNICODE BINSTRING SHORT_BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND
APPENDS EMPTY_DICT DICT SETITEM SETITEMS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID
"""


class _Storage(NamedTuple):
    """A flat array somewhere in the archive."""

    key: str
    dtype: np.dtype
    length: int


class _Tensor(NamedTuple):
    """A view of a storage, in elements. Immutable, so that a pickle can do nothing to it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Rebuild:
    """Stands for torch._utils._rebuild_tensor_v2."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
        numbers = (offset, *shape, *strides)
        whole = all(type(x) is int and x >= 0 for x in numbers)
        if not isinstance(storage, _Storage) or not whole or len(shape) != len(strides):
            raise pickle.UnpicklingError("a tensor is described wrongly")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _MakeDict:
    """Stands for collections.OrderedDict: a plain dict does, and keeps order."""

    __slots__ = ()

    def __call__(self, *items: Any) -> dict[Any, Any]:
        return _Dict(*items)


class _Dict(dict):
    """Takes the `_metadata` attribute that a state dict carries, and forgets it."""

    def __setstate__(self, _: Any) -> None:
        pass


_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(),
    ("collections", "OrderedDict"): _MakeDict(),
} | {("torch", name): name for name in STORAGE_TYPES}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", str(name), str(key), str(), int(length)) if name in STORAGE_TYPES:
                return _Storage(key, STORAGE_TYPES[name], length)
        raise pickle.UnpicklingError("a storage is described wrongly")


def load_torch(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a file that `torch.save(state_dict, path)` wrote (PyTorch 1.6 or newer), each in its own type.

    Anything but tensors, storages and OrderedDict in it, and a file that is cut short, is a `UsageError`; no code of the file
    is ever run.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (zipfile.BadZipFile, EOFError) as error:
        raise UsageError(
            f"{path}: cut short, or not the zip archive of torch.save; download it again, or save it with PyTorch 1.6 or newer"
        ) from error


def _read(archive: zipfile.ZipFile, path: Path) -> dict[str, np.ndarray]:
    pickles = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UsageError(f"{path}: expected the archive of torch.save with one data.pkl, found {len(pickles)}")
    prefix = pickles[0].removesuffix("data.pkl")
    state = _unpickle(archive.read(pickles[0]), path)
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, _Tensor) for k, v in state.items()):
        raise UsageError(f"{path}: expected a state dict, a mapping of names to tensors")
    order = ">" if f"{prefix}byteorder" in archive.namelist() and archive.read(f"{prefix}byteorder") == b"big" else "<"
    storages: dict[_Storage, np.ndarray] = {}  # tensors may share one
    return {name: _array(tensor, archive, prefix, order, storages, f"{path}: {name}") for name, tensor in state.items()}


def _unpickle(data: bytes, path: Path) -> Any:
    refused = f"{path}: refused, nothing was executed: this reader knows tensors, storages and OrderedDict only, and "
    try:
        known = frozenset(_OPCODES.split())
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in known:
                raise UsageError(f"{refused}the file uses pickle opcode {opcode.name}")
            if opcode.name == "GLOBAL" and tuple(str(argument).split(" ", 1)) not in _GLOBALS:
                raise UsageError(f"{refused}the file names {str(argument).replace(' ', '.')}")
            if opcode.name in ("PUT", "LONG_BINPUT") and int(str(argument)) > len(data):
                raise UsageError(f"{refused}the file asks for {argument} memo slots")
        return _Unpickler(io.BytesIO(data), encoding="utf-8").load()
    except UsageError:
        raise
    except Exception as error:  # a hostile pickle can raise anything, from any operation
        raise UsageError(f"{refused}its pickle cannot be read so: {error}") from error


def _array(
    tensor: _Tensor, archive: zipfile.ZipFile, prefix: str, order: str, storages: dict[_Storage, np.ndarray], where: str
) -> np.ndarray:
    storage = tensor.storage
    if storage not in storages:
        try:
            entry = archive.getinfo(f"{prefix}data/{storage.key}")
        except KeyError:
            raise UsageError(f"{where}: the archive has no storage data/{storage.key}") from None
        needed = storage.length * storage.dtype.itemsize
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != needed:
            raise UsageError(f"{where}: storage data/{storage.key} should hold {needed} plain bytes, has {entry.file_size}")
        flat = np.frombuffer(archive.read(entry), storage.dtype)
        storages[storage] = flat.byteswap() if order == ">" else flat
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, storage.dtype)
    if last >= storage.length:
        raise UsageError(f"{where}: a tensor of shape {tensor.shape} reaches beyond its storage of {storage.length} elements")
    strides = tuple(stride * storage.dtype.itemsize for stride in tensor.strides)
    return np.lib.stride_tricks.as_strided(storages[storage][tensor.offset :], tensor.shape, strides, writeable=False)
