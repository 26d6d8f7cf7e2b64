"""config.json, index files and .safetensors of others: read right or refused in one short line with the file's name."""

import json
import os
import pathlib
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from calm.errors import UsageError
from calm.interop.published_files import PublishedConfig, PublishedWeights, weight_names
from calm.runs.weight_files import LARGEST_JSON, read_json, read_safetensors, read_weights


def assert_refused(error: pytest.ExceptionInfo[UsageError], path: pathlib.Path) -> None:
    message = str(error.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < len(str(path)) + 400


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not valid JSON"),
        (b"\xff{}", "not valid JSON"),
        (b'{"a": ' + b"[" * 100_000, "nested too deep"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b" " * (LARGEST_JSON + 1), "too large"),
        (b"[]", "expected a JSON object"),
    ],
)
def test_json_of_any_kind_is_an_object_or_refused(tmp_path, data, words):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=words) as error:
        read_json(path)
    assert_refused(error, path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_folders_and_named_pipes_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UsageError, match="not a regular file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(UsageError, match="cannot be read"):
        read_json(tmp_path)


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**400), 10**400), st.floats(), st.text(max_size=300)),
    lambda inner: st.one_of(st.lists(inner, max_size=9), st.dictionaries(st.text(max_size=9), inner)),
    max_leaves=9,
)


@given(value=values)
def test_any_value_is_a_number_or_refused(tmp_path_factory, value):
    folder = tmp_path_factory.getbasetemp() / "values"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"size": value, "rope_scaling": None}))
    config = PublishedConfig(folder)
    for read in (config.number, config.integer):
        try:
            number = read("size")
        except UsageError as error:
            message = str(error)
            assert "config.json: size should be" in message and message.isprintable() and len(message) < 600
            continue
        assert isinstance(value, int | float) and not isinstance(value, bool)
        assert (number == float(value) and np.isfinite(number)) if read == config.number else (1 <= number == value < 2**31)
    (folder / "config.json").write_text(json.dumps({"mlp_bias": value}))
    if value is not False and value != 0:
        with pytest.raises(UsageError, match="mlp_bias is .*; only False is supported") as error:
            PublishedConfig(folder)
        assert_refused(error, folder / "config.json")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.bool_])
def test_arrays_of_safetensors_come_back_bit_for_bit(tmp_path, dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    save_file({"a": array, "scalar": np.asarray(array[1, 1])}, tmp_path / "model.safetensors")
    loaded = read_safetensors(tmp_path / "model.safetensors")
    assert loaded["a"].dtype == dtype and loaded["a"].tobytes() == array.tobytes() and loaded["scalar"].shape == ()


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("F8_E4M3", [2], 2), ("F4", [2], 1), ("Q", [1], 4), ("F32", [1] * 70, 4), ("F32", [2**62, 2**62, 0], 0), ("F32", [2], 4)],
)
def test_safetensors_of_types_and_shapes_that_numpy_lacks_are_refused(tmp_path, dtype, shape, size):
    header = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    with pytest.raises(UsageError, match="damaged or cut short|holds an array that cannot be read") as error:
        read_safetensors(path)
    assert_refused(error, path)


@pytest.mark.parametrize(
    "shard", [None, 1, [], {}, "", ".", "..", "../model.safetensors", "/etc/passwd", "a/b", "a\0b", "a\nb", "\ud800"]
)
def test_an_index_names_files_of_its_folder_only(tmp_path, shard):
    save_file({"a": np.ones(2)}, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for content in ({"weight_map": {"a": "one.safetensors", "b": shard}}, {"weight_map": shard}, {}):
        index.write_text(json.dumps(content))
        for read in (read_weights, weight_names):
            with pytest.raises(UsageError, match="weight_map should map names of weights to files of this folder") as error:
                read(tmp_path)
            assert_refused(error, index)


def test_shards_hold_what_their_index_says(tmp_path):
    one, two = np.ones(2), np.zeros(3)
    save_file({"a": one}, tmp_path / "one.safetensors")
    save_file({"b": two}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"

    def place(**files: str) -> None:
        index.write_text(json.dumps({"weight_map": files}))

    place(a="one.safetensors", b="two.safetensors")
    assert {name: array.tolist() for name, array in read_weights(tmp_path).items()} == {"a": [1, 1], "b": [0, 0, 0]}
    assert weight_names(tmp_path) == {"a", "b"}
    place(a="one.safetensors", b="two.safetensors", c="two.safetensors")
    with pytest.raises(UsageError, match="weight 'c' is not in two.safetensors, where weight_map has it"):
        read_weights(tmp_path)
    save_file({"b": two, "a": two}, tmp_path / "two.safetensors")
    place(a="one.safetensors", b="two.safetensors")
    with pytest.raises(UsageError, match="weight 'a' is in two.safetensors, which weight_map does not say"):
        read_weights(tmp_path)
    place(a="one.safetensors", b="three.safetensors")
    with pytest.raises(UsageError, match="three.safetensors: cannot be read"):
        read_weights(tmp_path)


def test_weights_that_are_left_over_are_named_in_one_line(tmp_path):
    weights = PublishedWeights(tmp_path, {"a\n" * 10_000: np.ones(1)})
    with pytest.raises(UsageError, match="1 weights that this model does not have") as error:
        weights.finish()
    assert_refused(error, tmp_path)
