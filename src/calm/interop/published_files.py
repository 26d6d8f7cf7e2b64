"""A folder of a published checkpoint as values with types: config.json, and the arrays of its weight files by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from calm.errors import UsageError
from calm.interop.restricted_pickle import load_torch

_FIXED = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "mlp_bias": False, "attention_bias": False, "rope_scaling": None}


class PublishedConfig:
    """config.json of a folder, read with types; settings that our models cannot express are refused."""

    def __init__(self, folder: Path):
        self.path = folder / "config.json"
        self.values = read_json(self.path)
        for key, value in _FIXED.items():
            if self.values.get(key, value) != value:
                raise UsageError(f"{self.path}: {key} is {self.values[key]!r}; only {value!r} is supported")

    def number(self, key: str) -> float:
        return float(self._value(key, None))

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if not isinstance(value, int) or value < 1:
            raise UsageError(f"{self.path}: {key} should be a whole number of at least 1, got {value!r}")
        return value

    def _value(self, key: str, default: int | None) -> int | float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(f"{self.path}: {key} should be a number, {'is missing' if value is None else f'got {value!r}'}")
        return value


class PublishedWeights:
    """The arrays of a folder by published name. Each is taken once, with its shape; what is left over is an error."""

    def __init__(self, folder: Path, arrays: dict[str, np.ndarray] | None = None):
        self.folder, self.where = folder, str(folder)
        self.arrays = _read_weights(folder) if arrays is None else arrays

    def below(self, prefix: str) -> "PublishedWeights":
        return PublishedWeights(
            self.folder, {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}
        )

    def shape(self, name: str) -> tuple[int, int]:
        array = self.arrays.get(name)
        if array is None or array.ndim != 2:
            raise UsageError(f"{self.where}: weight {name!r} is {'missing' if array is None else 'not a matrix'}")
        return array.shape[0], array.shape[1]

    def count(self, prefix: str) -> int:
        """How many layers `prefix.0`, `prefix.1`, ... there are."""
        return len({name.removeprefix(f"{prefix}.").split(".")[0] for name in self.arrays if name.startswith(f"{prefix}.")})

    def take(self, name: str, *shape: int) -> np.ndarray:
        if name not in self.arrays:
            raise UsageError(f"{self.where}: weight {name!r} is missing")
        array = self.arrays.pop(name)
        if array.shape != shape:
            raise UsageError(f"{self.where}: weight {name!r} has shape {array.shape}, config.json needs {shape}")
        return array

    def kernel(self, name: str, in_dim: int, out_dim: int) -> np.ndarray:
        return self.take(f"{name}.weight", out_dim, in_dim).T

    def merge_aliases(self, alias: str, prefix: str) -> None:
        """`alias*` and `prefix*` are two names of the same weights; a file may hold either or both."""
        for name in [name for name in self.arrays if name.startswith(alias)]:
            array, twin = self.arrays.pop(name), prefix + name.removeprefix(alias)
            if not np.array_equal(self.arrays.setdefault(twin, array), array):
                raise UsageError(f"{self.where}: weights {name!r} and {twin!r} differ; they must be the same")

    def finish(self) -> None:
        if self.arrays:
            first = min(self.arrays)
            raise UsageError(f"{self.where}: {len(self.arrays)} weights that this model does not have, the first is {first!r}")


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; one that is missing or malformed is a `UsageError`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected a JSON object")
    return values


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors file; one that is missing or damaged is a `UsageError`."""
    import safetensors
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    except safetensors.SafetensorError as error:
        raise UsageError(f"{path}: damaged or cut short ({error})") from error


def weight_names(folder: Path) -> set[str]:
    """The names of a folder's weights; from the headers alone where the files have headers."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        import safetensors

        try:
            with safetensors.safe_open(whole, "numpy") as file:
                return set(file.keys())
        except safetensors.SafetensorError as error:
            raise UsageError(f"{whole}: damaged or cut short ({error})") from error
    if index.is_file():
        files = read_json(index).get("weight_map")
        return set(files) if isinstance(files, dict) else set()
    return set(_read_weights(folder))


def _read_weights(folder: Path) -> dict[str, np.ndarray]:
    """model.safetensors, else pytorch_model.bin, each whole or in the shards of its index file."""
    readers: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
        "model.safetensors": read_safetensors,
        "pytorch_model.bin": load_torch,
    }
    for name, read in readers.items():
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return read(folder / name)
        if index.is_file():
            files = read_json(index).get("weight_map", {})
            shards = sorted(set(files.values())) if isinstance(files, dict) else []
            if not all(isinstance(shard, str) and Path(shard).name == shard for shard in shards):
                raise UsageError(f"{index}: weight_map should map names of weights to files of this folder")
            return {key: array for shard in shards for key, array in read(folder / shard).items()}
    raise UsageError(f"{folder}: no weights here; expected {' or '.join(readers)}")
