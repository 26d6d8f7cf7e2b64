"""A file of any content is read right or refused in one line, in bounded time and memory."""

import io
import os
import pathlib
import pickle
import struct
import time
import tracemalloc
import zipfile
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calm.errors import UsageError
from calm.interop.restricted_pickle import LARGEST_PICKLE, LARGEST_READ, load_torch
from calm.interop.tensor_pickle import MOST_INSTRUCTIONS

VALUES = np.arange(12, dtype=np.float32)
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "published" / "k4" / "autoencoder" / "pytorch_model.bin"
MOST_SECONDS, MOST_BYTES = 30, 400e6

# -- instructions -----------------------------------------------------------------------------------------------------

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


# -- programs that would starve a reader ------------------------------------------------------------------------------

NESTED = b")" + b"\x85" * 200_000  # ((((...),),),); a recursive hash overflows the C stack well before that
DOUBLED = b")q\x00" + b"h\x00\x86q\x00" * 60  # 2^60 leaves, in 60 pairs
WIDE = b"(" + b"K\x01" * 200_000 + b"t" + b"q\x07"  # a tuple of 200,000 numbers, kept in slot 7
OF_SLOT = b"h\x06" + b"h\x05" + b"h\x07" * 2 + b"\x89\x89"

BOMBS = {
    "a megabyte of nested tuple as key": (state(b")" + b"\x85" * 1_000_000 + b"N"), "a key that is not text"),
    "nested tuple as value": (state(text("a") + NESTED), "expected a state dict"),
    "nested tuple as storage": (b"\x80\x02" + NESTED + b"Q.", "a storage is described wrongly"),
    "nested tuple in a storage": (b"\x80\x02(" + NESTED + b"h\x00" * 4 + b"tQ.", "cannot be read so"),
    "nested tuple as shape": (state(text("a") + REBUILD + b"(" + storage() + b"K\x00" + NESTED + b")tR"), "described wrongly"),
    "nested tuple as arguments": (b"\x80\x02" + REBUILD + NESTED + b"R.", "it calls something other"),
    "nested tuple as function": (b"\x80\x02" + NESTED + b")R.", "it calls something other"),
    "nested lists": (b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b".", "expected a state dict"),
    "doubled tuple as key": (state(DOUBLED + b"N"), "a key that is not text"),
    "doubled tuple as key, by DUP": (b"\x80\x02}" + b")" + b"2\x86" * 60 + b"Ns.", "opcode DUP"),
    "doubled tuple as storage": (b"\x80\x02" + DOUBLED + b"Q.", "a storage is described wrongly"),
    "doubled tuple as value": (state(text("a") + DOUBLED), "expected a state dict"),
    "list of itself": (b"\x80\x02]q\x00h\x00a.", "expected a state dict"),
    "mapping of itself": (b"\x80\x02}q\x00" + text("a") + b"h\x00s.", "expected a state dict"),
    "copies of a large mapping": (b"\x80\x02" + WIDE + (DICT + b"h\x07\x85R") * 10_000 + b".", "it calls something other"),
    "tensors of a wide shape": (
        b"\x80\x02" + storage() + b"q\x06" + b"K\x00q\x05" + WIDE + (REBUILD + b"(" + OF_SLOT + b"tR") * 10_000 + b".",
        "a tensor is described wrongly",
    ),
    "many marks": (b"\x80\x02" + b"(" * 500_000 + b".", "cannot be read so"),
    "many instructions": (b"\x80\x02" + b"N" * (MOST_INSTRUCTIONS + 1) + b".", "more than 2000000 pickle instructions"),
    "items on a deep stack": (b"\x80\x02" + b"N" * 900_000 + b"}" + (text("a") + b"Ns") * 300_000 + b".", "a state dict"),
    "single appends on a deep stack": (b"\x80\x02" + b"N" * 900_000 + b"]" + b"Na" * 500_000 + b".", "a state dict"),
    "a pickle that is too long": (b"\x80\x02" + text("a" * LARGEST_PICKLE) + b".", "at most 16777216 are read"),
    "a far memo slot": (b"\x80\x02]r\xff\xff\xff\xff.", "expected a state dict"),
    "text of 4 GB": (b"\x80\x02X\xff\xff\xff\xffa.", "cannot be read so"),
    "text of 2^63 bytes": (b"\x80\x02\x8d" + b"\xff" * 7 + b"\x7fa.", "cannot be read so"),
    "a number of 2^31 bytes": (b"\x80\x02\x8b\xff\xff\xff\x7fa.", "cannot be read so"),
    "a number of 4 million digits": (b"\x80\x02I" + b"9" * 4_000_000 + b"\n.", "cannot be read so"),
    "a number of strange digits": (b"\x80\x02I\x1b[31m\x00" + b"9" * 4_000_000 + b"\n.", "cannot be read so"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_programs_that_would_starve_a_reader_are_refused(tmp_path, name):
    program, words = BOMBS[name]
    archive(tmp_path / "model.bin", program)
    refused(tmp_path / "model.bin", words, trace=name in ("many marks", "a pickle that is too long"))


SHAPES = {
    "shape": (tensor((2**70,), (1,)), "described wrongly"),
    "shape of negative size": (tensor((-1,), (1,)), "described wrongly"),
    "stride": (tensor((1,), (2**70,)), "described wrongly"),
    "offset": (tensor((1,), (1,), offset=2**70), "described wrongly"),
    "storage": (tensor((1,), (1,), of=storage(length=2**70)), "a storage is described wrongly"),
    "storage of negative length": (tensor((1,), (1,), of=storage(length=-1)), "a storage is described wrongly"),
    "empty": (tensor((0, 2**47, 2**47), (1, 1, 1)), "described wrongly"),
    "axes": (tensor((1,) * 33, (1,) * 33), "described wrongly"),
    "repeated": (tensor((2**40,), (0,)), "repeats the 12 elements of its storage"),
    "repeated along two axes": (tensor((13, 1), (0, 2**40)), "repeats the 12 elements of its storage"),
    "reach": (tensor((2, 2), (11, 1)), "reaches beyond its storage of 12 elements"),
    "storage larger than the file": (tensor((1,), (1,), of=storage(length=2**40)), "should hold 4398046511104 plain bytes"),
    "two types of a storage": (
        text("b") + tensor((1,), (1,), of=storage("IntStorage")) + text("a") + tensor((1,), (1,)),
        "a: storage data/0 is described in two ways",
    ),
    "storage elsewhere": (tensor((1,), (1,), of=storage(key="../../secret")), "the archive has no storage"),
    "storage of an odd name": (tensor((1,), (1,), of=storage(key="\n\x1b[2J\ud800" * 1000)), "the archive has no storage"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_impossible_tensors_are_refused(tmp_path, name):
    program, words = SHAPES[name]
    archive(tmp_path / "model.bin", state((b"" if name.startswith("two") else text("a")) + program))
    refused(tmp_path / "model.bin", words)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "\ud800", "a" * 100_000])
def test_names_that_would_break_a_line_are_refused(tmp_path, name):
    archive(tmp_path / "model.bin", state(text(name) + tensor((12,), (1,))))
    refused(tmp_path / "model.bin", "a tensor has an impossible name")
    archive(tmp_path / "model.bin", b"\x80\x04" + text(name) + text(name) + b"\x93.")
    refused(tmp_path / "model.bin", "the file names")


def test_booleans_are_zero_or_one(tmp_path):
    program = state(text("a") + tensor((48,), (1,), of=storage("BoolStorage", length=48)))
    archive(tmp_path / "model.bin", program, values=np.full(48, 2, np.uint8))
    refused(tmp_path / "model.bin", "bytes that are not booleans")


# -- archives that would starve a reader ------------------------------------------------------------------------------

GOOD = state(text("a") + tensor((3, 4), (4, 1)))


def test_compressed_and_encrypted_members_are_refused_unread(tmp_path):
    path = tmp_path / "model.bin"
    archive(path, b"\x00" * 100_000_000, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 200_000
    tracemalloc.start()
    with pytest.raises(UsageError, match="model/data.pkl is compressed"):
        load_torch(path)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    for member, name in enumerate(("data.pkl", "data/0")):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("model/data.pkl", GOOD)
            file.writestr("model/data/0", VALUES.tobytes())
            file.filelist[member].flag_bits |= 1  # in the directory, which a reader believes
        refused(path, f"model/{name} is encrypted")


def test_members_that_lie_are_refused(tmp_path):
    path, large = tmp_path / "model.bin", 2**40
    program = state(text("a") + tensor((1,), (1,), of=storage(length=large // 4)))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", program)
        file.writestr("model/data/0", VALUES.tobytes())
        file.filelist[1].file_size = file.filelist[1].compress_size = large
    refused(path, "lies beyond the file or within another storage")
    tensors = b"".join(text(str(n)) + tensor((250_000,), (1,), of=storage(key=str(n), length=250_000)) for n in range(100))
    with zipfile.ZipFile(path, "w") as file:  # a hundred members in the bytes of one
        file.writestr("model/data.pkl", state(tensors))
        for n in range(100):
            file.writestr(f"model/data/{n}", bytes(1_000_000) if n == 0 else b"")
        first = file.filelist[1]
        for info in file.filelist[2:]:
            info.header_offset, info.CRC = first.header_offset, first.CRC
            info.file_size = info.compress_size = first.file_size
    refused(path)


def test_a_large_directory_is_not_read(tmp_path):
    path, size = tmp_path / "model.bin", LARGEST_READ + 1
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, size, 0, 0))
    refused(path, "not the zip archive of torch.save", most=1e6)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.bin")
    refused(tmp_path / "model.bin", "not a regular file")
    refused(tmp_path, "cannot be read")


@pytest.mark.parametrize("large_to_small", [False, True])
def test_a_storage_larger_than_one_read_comes_back(tmp_path, large_to_small):
    values = np.arange(LARGEST_READ // 4 + 100_003, dtype=np.uint32).view(np.float32)
    program = state(text("a") + tensor((values.size,), (1,), of=storage(length=values.size)))
    path = tmp_path / "model.bin"
    archive(path, program, values=values.byteswap() if large_to_small else values)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("model/byteorder", b"big" if large_to_small else b"little")
    tracemalloc.start()
    loaded = load_torch(path)["a"]
    assert loaded.tobytes() == values.tobytes()
    assert tracemalloc.get_traced_memory()[1] < 4 * values.nbytes  # the array, its bytes for the line above, two reads
    tracemalloc.stop()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(path, "damaged")


# -- any program and any archive --------------------------------------------------------------------------------------


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
