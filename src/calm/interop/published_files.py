"""Files of a published checkpoint: config.json as typed values, and the arrays of its weight files by name.

What a folder holds was written by others, so every fault in it, of whatever kind, is a `UsageError` in one short line.
"""

import json
import math
import reprlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from calm.errors import UsageError
from calm.interop.restricted_pickle import load_torch
from calm.interop.tensor_pickle import shown

LARGEST_SIZE = 2**31 - 1  # of any width, count or length in config.json
LARGEST_JSON = 16 << 20  # bytes; an index file has about 100 for each weight
_FIXED = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "mlp_bias": False, "attention_bias": False, "rope_scaling": None}


class PublishedConfig:
    """Typed reading of a folder's config.json. Settings that our models cannot express are a `UsageError`."""

    def __init__(self, folder: Path):
        self.path = folder / "config.json"
        self.values = read_json(self.path)
        for key, value in _FIXED.items():
            if self.values.get(key, value) != value:
                raise UsageError(f"{self.path}: {key} is {_brief(self.values[key])}; only {value!r} is supported")

    def number(self, key: str) -> float:
        """Value of `key` as a finite float."""
        value = self._value(key, None)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise UsageError(f"{self.path}: {key} should be a finite number, got {_brief(value)}")
        return number

    def integer(self, key: str, default: int | None = None) -> int:
        """Value of `key`, or `default` where it is missing, as a whole number from 1 to LARGEST_SIZE."""
        value = self._value(key, default)
        if not isinstance(value, int) or value < 1:
            raise UsageError(f"{self.path}: {key} should be a whole number of at least 1, got {_brief(value)}")
        if value > LARGEST_SIZE:
            raise UsageError(f"{self.path}: {key} should be a whole number of at most {LARGEST_SIZE}, got {_brief(value)}")
        return value

    def _value(self, key: str, default: int | None) -> int | float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            found = "is missing" if value is None else f"got {_brief(value)}"
            raise UsageError(f"{self.path}: {key} should be a number, {found}")
        return value


class PublishedWeights:
    """Arrays of a folder by published name. Each is taken once, with its shape; arrays left over at the end are an error."""

    def __init__(self, folder: Path, arrays: dict[str, np.ndarray] | None = None):
        self.folder, self.where = folder, str(folder)
        self.arrays = read_weights(folder) if arrays is None else arrays

    def below(self, prefix: str) -> "PublishedWeights":
        """Arrays whose names begin with `prefix`, under the rest of their names."""
        return PublishedWeights(
            self.folder, {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}
        )

    def shape(self, name: str) -> tuple[int, int]:
        """(rows, columns) of a matrix, which is not taken yet."""
        array = self.arrays.get(name)
        if array is None or array.ndim != 2:
            raise UsageError(f"{self.where}: weight {name!r} is {'missing' if array is None else 'not a matrix'}")
        return array.shape[0], array.shape[1]

    def count(self, prefix: str) -> int:
        """Number of layers `prefix.0`, `prefix.1`, ..."""
        return len({name.removeprefix(f"{prefix}.").split(".")[0] for name in self.arrays if name.startswith(f"{prefix}.")})

    def take(self, name: str, *shape: int) -> np.ndarray:
        """Removes and returns the array `name`, which must have this shape."""
        if name not in self.arrays:
            raise UsageError(f"{self.where}: weight {name!r} is missing")
        array = self.arrays.pop(name)
        if array.shape != shape:
            raise UsageError(f"{self.where}: weight {name!r} has shape {array.shape}, config.json needs {shape}")
        return array

    def kernel(self, name: str, in_dim: int, out_dim: int) -> np.ndarray:
        """Takes `name.weight` `[out in]` of a linear layer as our kernel `[in out]`."""
        return self.take(f"{name}.weight", out_dim, in_dim).T

    def merge_aliases(self, alias: str, prefix: str) -> None:
        """Renames `alias*` to `prefix*`: two names of the same weights, of which a file may hold either or both."""
        for name in [name for name in self.arrays if name.startswith(alias)]:
            array, twin = self.arrays.pop(name), prefix + name.removeprefix(alias)
            if not np.array_equal(self.arrays.setdefault(twin, array), array):
                raise UsageError(f"{self.where}: weights {shown(name)!r} and {shown(twin)!r} differ; they must be the same")

    def finish(self) -> None:
        """Raises `UsageError` if an array has not been taken."""
        if self.arrays:
            first = shown(min(self.arrays))
            raise UsageError(f"{self.where}: {len(self.arrays)} weights that this model does not have, the first is {first!r}")


def _brief(value: Any) -> str:
    return shown(reprlib.repr(value))


def read_json(path: Path) -> dict[str, Any]:
    """Object in a JSON file. A file that is missing, malformed or larger than LARGEST_JSON is a `UsageError`."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UsageError(f"{path}: cannot be read (not a regular file)")  # opening a named pipe would wait for its writer
        with path.open("rb") as file:
            data = file.read(LARGEST_JSON + 1)
        if len(data) > LARGEST_JSON:
            raise UsageError(f"{path}: too large; at most {LARGEST_JSON} bytes of JSON are read")
        values = json.loads(data.decode("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON ({shown(error)})") from error
    except RecursionError as error:
        raise UsageError(f"{path}: not valid JSON for a configuration (nested too deep)") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected a JSON object")
    return values


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Arrays of a .safetensors file by name. A file that is missing, damaged or of unknown types is a `UsageError`."""
    import ml_dtypes  # noqa: F401  (teaches numpy the type bfloat16)
    import safetensors
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    except safetensors.SafetensorError as error:
        raise UsageError(f"{path}: damaged or cut short ({shown(error)})") from error
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # a type or a shape that numpy does not have
        raise UsageError(f"{path}: holds an array that cannot be read ({shown(error)})") from error


def weight_names(folder: Path) -> set[str]:
    """Names of a folder's weights, from the headers alone where the files have headers."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        import safetensors

        try:
            with safetensors.safe_open(whole, "numpy") as file:
                return set(file.keys())
        except OSError as error:
            raise UsageError(f"{whole}: cannot be read ({error.strerror or error})") from error
        except safetensors.SafetensorError as error:
            raise UsageError(f"{whole}: damaged or cut short ({shown(error)})") from error
    return set(_shards(index)) if index.is_file() else set(read_weights(folder))


_READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    "model.safetensors": read_safetensors,
    "pytorch_model.bin": load_torch,
}


def read_weights(folder: Path, files: Iterable[str] = tuple(_READERS)) -> dict[str, np.ndarray]:
    """Arrays by name from the first of `files` that is in `folder`, whole or in the shards that its index file lists.

    Raises:
        UsageError: none of them is there, a file is damaged, or the shards hold other weights than the index says.
    """
    for name in files:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return _READERS[name](folder / name)
        if index.is_file():
            return _read_shards(index, _READERS[name])
    raise UsageError(f"{folder}: no weights here; expected {' or '.join(files)}")


def _read_shards(index: Path, read: Callable[[Path], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    shards, arrays = _shards(index), {}
    for shard in sorted(set(shards.values())):
        for name, array in read(index.parent / shard).items():
            if shards.get(name, shard) != shard:
                raise UsageError(f"{index}: weight {shown(name)!r} is in {shard}, which weight_map does not say")
            arrays[name] = array
    missing = shards.keys() - arrays.keys()
    if missing:
        raise UsageError(f"{index}: weight {shown(min(missing))!r} is not in {shards[min(missing)]}, where weight_map has it")
    return arrays


def _shards(index: Path) -> dict[str, str]:
    """File of each weight, by its name, from an index file."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(map(_is_plain_name, files.values())):
        raise UsageError(f"{index}: weight_map should map names of weights to files of this folder")
    return files


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name not in ("", "..") and name.isprintable()
