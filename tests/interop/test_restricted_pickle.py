"""Weights come out of a pickle; code does not."""

import collections
import io
import pathlib
import pickle
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from calm.errors import UsageError
from calm.interop.restricted_pickle import load_torch
from calm.interop.tensor_pickle import STORAGE_TYPES

VALUES = np.arange(12, dtype=np.float32)


class Storage:
    """What torch pickles by its place in the archive."""

    def __init__(self, array: np.ndarray, kind: str = "FloatStorage"):
        self.array, self.kind = array, kind


class Tensor:
    """What torch pickles as a view of a storage."""

    def __init__(self, storage: Storage, shape: tuple = (12,), strides: tuple = (1,), offset: int = 0):
        self.arguments = (storage, offset, shape, strides, False, collections.OrderedDict())

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.arguments


@pytest.fixture
def save(tmp_path, monkeypatch):
    """Writes what torch.save would write, with torch's names from modules that exist for the length of a test."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGE_TYPES:
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    exec("def _rebuild_tensor_v2(*arguments): ...", utils.__dict__)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)

    def save(
        state: object, byteorder: str = "little", compression: int = zipfile.ZIP_STORED, protocol: int = 2
    ) -> pathlib.Path:
        storages: list[Storage] = []

        class Pickler(pickle.Pickler):
            def persistent_id(self, obj):
                if not isinstance(obj, Storage):
                    return None
                if obj not in storages:
                    storages.append(obj)
                return "storage", getattr(torch, obj.kind), str(storages.index(obj)), "cpu", obj.array.size

        data = io.BytesIO()
        Pickler(data, protocol=protocol).dump(state)
        path = tmp_path / "model.bin"
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("model/data.pkl", data.getvalue())
            archive.writestr("model/byteorder", byteorder)
            for index, storage in enumerate(storages):
                big = byteorder == "big"
                archive.writestr(f"model/data/{index}", (storage.array.byteswap() if big else storage.array).tobytes())
        return path

    return save


@pytest.mark.parametrize("byteorder", ["little", "big"])
@pytest.mark.parametrize("kind", sorted(STORAGE_TYPES))
def test_every_type_comes_back_bit_for_bit(save, kind, byteorder):
    array = VALUES.astype(STORAGE_TYPES[kind])
    loaded = load_torch(save({"x": Tensor(Storage(array, kind))}, byteorder))["x"]
    assert loaded.dtype == array.dtype and loaded.tobytes() == array.tobytes()
    assert STORAGE_TYPES["BFloat16Storage"] == ml_dtypes.bfloat16


@pytest.mark.parametrize("protocol", [2, 4])
def test_views_of_one_storage_metadata_scalars_and_empty_tensors(save, protocol):
    storage, state = Storage(VALUES), collections.OrderedDict()
    state["matrix"] = Tensor(storage, (3, 4), (4, 1))
    state["transpose"] = Tensor(storage, (4, 3), (1, 4))
    state["column"] = Tensor(storage, (3,), (4,), offset=1)
    state["broadcast"] = Tensor(storage, (2, 2), (0, 1), offset=10)
    state["scalar"] = Tensor(storage, (), (), offset=5)
    state["empty"] = Tensor(storage, (0, 4), (4, 1))
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    loaded = load_torch(save(state, protocol=protocol))
    assert list(loaded) == list(state)
    np.testing.assert_array_equal(loaded["matrix"], VALUES.reshape(3, 4))
    np.testing.assert_array_equal(loaded["transpose"], VALUES.reshape(3, 4).T)
    np.testing.assert_array_equal(loaded["column"], [1, 5, 9])
    np.testing.assert_array_equal(loaded["broadcast"], [[10, 11], [10, 11]])
    assert loaded["scalar"] == 5 and loaded["empty"].shape == (0, 4)


class Touch:
    """Unpickled by the ordinary pickle, it writes a file."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"a": Tensor(Storage(VALUES)), "b": x}, lambda x: [{"c": (x,)}]])
def test_code_in_a_file_is_refused_and_never_runs(save, tmp_path, wrap, protocol):
    victim = tmp_path / "victim"
    path = save(wrap(Touch(victim)), protocol=protocol)
    with pytest.raises(UsageError, match=r"model.bin: refused, nothing was executed.*names"):
        load_torch(path)
    assert not victim.exists()
    pickle.loads(pickle.dumps(Touch(victim)))
    assert victim.exists()  # the ordinary pickle does run it


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "names os.system"),
        (b"(K\x01ios\nsystem\n.", "opcode INST"),
        (b"\x80\x02}\x8c\x02os\x94\x8c\x06system\x94\x93.", "names os.system"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "it calls something other"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}(X\x01\x00\x00\x00aK\x01ub.", "it sets the state"),
        (b"\x80\x02}\x82\x01.", "opcode EXT1"),
        (b"\x80\x02K\x01Q.", "a storage is described wrongly"),
        (b"\x80\x02}", "cannot be read so"),
        (b"\x80\x02K\x05.", "expected a state dict"),
        (b"\x80\x02}X\x01\x00\x00\x00aK\x01s.", "expected a state dict"),
    ],
)
def test_other_words_of_the_pickle_language_are_refused(tmp_path, data, words):
    path = tmp_path / "model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", data)
    with pytest.raises(UsageError, match=words):
        load_torch(path)


@pytest.mark.parametrize("stage", ["autoencoder", "energy"])
def test_a_file_of_torch_equals_its_twin_in_safetensors(stage):
    folder = pathlib.Path(__file__).parents[1] / "golden" / "published" / "k2_gqa" / stage
    ours, theirs = load_torch(folder / "pytorch_model.bin"), load_file(folder / "model.safetensors")
    assert theirs and theirs.keys() <= ours.keys()  # safetensors leaves out the second name of a shared weight
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype and ours[name].shape == array.shape and ours[name].tobytes() == array.tobytes()


def test_tensors_cannot_reach_beyond_their_storage(save):
    for tensor in (Tensor(Storage(VALUES), (13,)), Tensor(Storage(VALUES), (3, 4), (5, 1)), Tensor(Storage(VALUES), offset=1)):
        with pytest.raises(UsageError, match="x: a tensor of shape .* reaches beyond its storage of 12 elements"):
            load_torch(save({"x": tensor}))
    for tensor in (Tensor(Storage(VALUES), (-1,)), Tensor(Storage(VALUES), (2,), (-1,)), Tensor(Storage(VALUES), (2, 2), (1,))):
        with pytest.raises(UsageError, match="a tensor is described wrongly"):
            load_torch(save({"x": tensor}))


def test_files_that_are_cut_short_missing_compressed_or_not_archives(save, tmp_path):
    path = save({"x": Tensor(Storage(VALUES))}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UsageError, match="model/data.pkl is compressed"):
        load_torch(path)
    path = save({"x": Tensor(Storage(VALUES))})
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match="model.bin: cut short"):
            load_torch(path)
    with pytest.raises(UsageError, match="none.bin: cannot be read"):
        load_torch(tmp_path / "none.bin")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/other", b"")
    with pytest.raises(UsageError, match="one data.pkl, found 0"):
        load_torch(path)
