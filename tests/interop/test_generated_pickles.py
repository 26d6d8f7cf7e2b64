"""Any program and any archive, generated: read right or refused in one line."""

import io
import pathlib
import pickle
import time
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pickle_programs import DICT, MOST_SECONDS, REBUILD, VALUES, archive, assert_one_line, number, state, storage, tensor, text

from calm.errors import UsageError
from calm.interop.restricted_pickle import load_torch

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "published" / "k4" / "autoencoder" / "pytorch_model.bin"


class Twin(pickle.Unpickler):
    """The standard unpickler with the same names: a second opinion on what a program means."""

    class Storage(NamedTuple):
        kind: str
        length: int

    def find_class(self, module_name: str, global_name: str) -> Any:
        return {
            "_rebuild_tensor_v2": lambda storage, offset, shape, strides, *_: (storage, offset, shape, strides),
            "OrderedDict": type("Dict", (dict,), {"__setstate__": lambda self, _: None}),
        }.get(global_name, global_name)

    def persistent_load(self, pid: Any) -> Any:
        return Twin.Storage(pid[1], pid[4])


KINDS = ["FloatStorage", "IntStorage", "HalfStorage", "LongStorage", "BFloat16Storage", "BoolStorage"]
WORDS = [
    "",
    "a",
    "0",
    "cpu",
    "storage",
    "torch",
    "FloatStorage",
    "collections",
    "OrderedDict",
    "os",
    "system",
    "\n\x1b",
    "\ud800",
]
NAMES = [b"ctorch\nFloatStorage\n", REBUILD, DICT, b"cos\nsystem\n", b"cbuiltins\neval\n", b"c\n\n", b"c\xff\n\n"]
BARE = b"(012NQRabdelostu}])\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94\x97\x98."
sizes = st.one_of(st.integers(0, 14), st.integers(-2, 2**80), st.sampled_from([2**31, 2**48, 2**62, 2**63, 2**64]))
lengths = st.one_of(st.just(12), st.just(12), sizes)
shapes = st.lists(st.one_of(st.integers(0, 4), sizes), max_size=3).map(tuple)
small_shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
storages = st.builds(storage, st.sampled_from(KINDS), st.sampled_from(["0", "1", "../0"]), lengths)
tensors = st.builds(tensor, shapes, shapes, sizes, storages)
plausible = small_shapes.flatmap(
    lambda shape: st.builds(
        tensor,
        st.just(shape),
        st.tuples(*[st.integers(0, 5)] * len(shape)),
        st.integers(0, 12),
        st.builds(storage, st.sampled_from(["FloatStorage", "IntStorage"])),
    )
)
kept = st.builds(
    lambda part, slot: part + slot, plausible, st.sampled_from([b"\x94", b"q\x00", b"q\x01", b"r\x02\x00\x00\x00"])
)
again = st.sampled_from([b"h\x00", b"h\x01", b"j\x02\x00\x00\x00"])
bare = st.sampled_from(BARE).map(lambda code: bytes([code]))
repeated = st.builds(
    lambda code, times: code * times,
    st.sampled_from([b"2\x86", b"\x85", b"\x86", b"(", b"0", b"]", b"}", b"N", b"t", b"R", b"s", b"h\x00\x86q\x00"]),
    st.integers(1, 300),
)
slots = st.builds(lambda code, slot: bytes([code, slot]), st.sampled_from(b"qh"), st.integers(0, 5))
text_lines = st.builds(
    lambda code, line: code + line + b"\n",
    st.sampled_from([b"I", b"L", b"F", b"V", b"S", b"p", b"g", b"P"]),
    st.binary(max_size=8),
)
instructions = st.one_of(
    bare,
    bare,
    slots,
    sizes.map(number),
    st.sampled_from(WORDS).map(text),
    st.sampled_from(NAMES),
    storages,
    tensors,
    repeated,
    text_lines,
    st.binary(min_size=1, max_size=6),
)
programs = st.one_of(
    st.lists(instructions, max_size=30).map(lambda parts: b"\x80\x02" + b"".join(parts) + b"."),
    st.lists(instructions, max_size=12).map(lambda parts: state(b"".join(parts))),
    st.lists(st.one_of(plausible, kept, again, plausible, tensors, instructions), max_size=5).map(
        lambda parts: state(b"".join(text(f"x{index}") + part for index, part in enumerate(parts)))
    ),
)


def read_right_or_refused(path: pathlib.Path, program: bytes) -> bool:
    """Whether the program was read; if so, as the standard unpickler and the definition of strides say."""
    archive(path, program)
    began = time.perf_counter()
    try:
        loaded = load_torch(path)
    except UsageError as error:
        assert_one_line(error, path)
        return False
    finally:
        assert time.perf_counter() - began < MOST_SECONDS
    expected = Twin(io.BytesIO(program), encoding="utf-8").load()
    assert list(loaded) == list(expected)
    for name, (of, offset, shape, strides) in expected.items():
        flat = VALUES.view({"IntStorage": np.int32}.get(of.kind, np.float32))
        places = offset + sum(np.indices(shape)[axis] * stride for axis, stride in enumerate(strides)) if 0 not in shape else []
        np.testing.assert_array_equal(loaded[name], flat[np.asarray(places, int)].reshape(shape), strict=True)
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("hostile")


def test_text_of_a_refused_kind_gives_no_warning_beside_the_line(folder):
    archive(folder / "model.bin", b"\x80\x02S'\\d'\n.")
    with warnings.catch_warnings(), pytest.raises(UsageError, match="opcode STRING"):
        warnings.simplefilter("error")
        load_torch(folder / "model.bin")


@settings(max_examples=400)
@given(programs)
def test_any_program_is_read_right_or_refused(folder, program):
    read_right_or_refused(folder / "model.bin", program)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_programs_are_read_right_or_refused(folder):
    outcomes = []

    @settings(max_examples=10_000)
    @given(programs)
    def every(program: bytes) -> None:
        outcomes.append(read_right_or_refused(folder / "model.bin", program))

    every()
    assert len(outcomes) >= 10_000 and 0.02 < sum(outcomes) / len(outcomes) < 0.9  # both happen


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file with a few bytes changed, cut out or put in; most of them in the directory, where they do most."""
    data = bytearray(whole)
    directory = whole.index(b"PK\x01\x02")
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.sampled_from([0, 0, directory, directory, len(data) - 60]))
        place = draw(st.integers(min(begin, len(data)), len(data)))
        piece = draw(
            st.one_of(st.binary(max_size=8), st.sampled_from([b"\xff" * 8, b"\x00" * 8, b"PK\x01\x02", b"PK\x05\x06"]))
        )
        data[place : place + draw(st.sampled_from([len(piece), len(piece), 0, 100]))] = piece
    return bytes(data)


def damaged_archive_is_equal_or_refused(path: pathlib.Path, data: bytes, whole: dict[str, np.ndarray]) -> None:
    path.write_bytes(data)
    try:
        loaded = load_torch(path)
    except UsageError as error:
        assert_one_line(error, path)
        return
    assert loaded.keys() == whole.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(loaded[name], array, strict=True)


@settings(max_examples=300)
@given(damaged(GOLDEN.read_bytes()))
def test_a_damaged_archive_is_equal_or_refused(folder, data):
    damaged_archive_is_equal_or_refused(folder / "damaged.bin", data, load_torch(GOLDEN))


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=5000)
@given(damaged(GOLDEN.read_bytes()))
def test_five_thousand_damaged_archives_are_equal_or_refused(folder, data):
    damaged_archive_is_equal_or_refused(folder / "damaged.bin", data, load_torch(GOLDEN))
