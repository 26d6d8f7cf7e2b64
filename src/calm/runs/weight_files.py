"""JSON and safetensors files as values, with every damage a `UsageError` that names the file; weights whole or in shards."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calm.errors import UsageError

LARGEST_JSON = 16 << 20  # bytes; an index file has about 100 for each weight
Reader = Callable[[Path], dict[str, np.ndarray]]


def shown(text: object) -> str:
    """Beginning of `text` for a message: at most 200 characters of one line, all printable."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(text)[:80])[:200]


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


SAFETENSORS: dict[str, Reader] = {"model.safetensors": read_safetensors}


def read_weights(folder: Path, readers: Mapping[str, Reader] = SAFETENSORS) -> dict[str, np.ndarray]:
    """Arrays by name from the first file of `readers` that is in `folder`, whole or in the shards that its index file lists.

    Raises:
        UsageError: none of them is there, a file is damaged, or the shards hold other weights than the index says.
    """
    for name, read in readers.items():
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return read(folder / name)
        if index.is_file():
            return _read_shards(index, read)
    raise UsageError(f"{folder}: no weights here; expected {' or '.join(readers)}")


def _read_shards(index: Path, read: Reader) -> dict[str, np.ndarray]:
    shards, arrays = shards_of(index), {}
    for shard in sorted(set(shards.values())):
        for name, array in read(index.parent / shard).items():
            if shards.get(name, shard) != shard:
                raise UsageError(f"{index}: weight {shown(name)!r} is in {shard}, which weight_map does not say")
            arrays[name] = array
    missing = shards.keys() - arrays.keys()
    if missing:
        raise UsageError(f"{index}: weight {shown(min(missing))!r} is not in {shards[min(missing)]}, where weight_map has it")
    return arrays


def shards_of(index: Path) -> dict[str, str]:
    """File of each weight, by its name, from an index file."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(map(_is_plain_name, files.values())):
        raise UsageError(f"{index}: weight_map should map names of weights to files of this folder")
    return files


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name not in ("", "..") and name.isprintable()
