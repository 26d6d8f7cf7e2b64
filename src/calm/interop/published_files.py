"""Files of a published checkpoint: config.json as typed values, and the arrays of its weight files by name.

What a folder holds was written by others, so every fault in it, of whatever kind, is a `UsageError` in one short line.
"""

import math
import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from calm.errors import UsageError
from calm.interop.restricted_pickle import load_torch
from calm.runs.weight_files import SAFETENSORS, Reader, read_json, read_weights, shards_of, shown

LARGEST_SIZE = 2**31 - 1  # of any width, count or length in config.json
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
        self.arrays = read_published_weights(folder) if arrays is None else arrays

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
    return set(shards_of(index)) if index.is_file() else set(read_published_weights(folder))


_READERS: dict[str, Reader] = {**SAFETENSORS, "pytorch_model.bin": load_torch}


def read_published_weights(folder: Path) -> dict[str, np.ndarray]:
    """Arrays by name from model.safetensors or pytorch_model.bin, whole or in shards."""
    return read_weights(folder, _READERS)
