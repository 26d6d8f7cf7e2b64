"""Files that would starve a reader of time, memory or stack are refused in one line."""

import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from pickle_programs import DICT, REBUILD, VALUES, archive, refused, state, storage, tensor, text

from calm.errors import UsageError
from calm.interop.restricted_pickle import LARGEST_PICKLE, LARGEST_READ, load_torch
from calm.interop.tensor_pickle import MOST_INSTRUCTIONS

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
