"""What changed on the disk is noticed, and nothing a folder says can make it be read as anything but ids."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.errors import UsageError
from calm.text import shards
from calm.text.manifest import Manifest, read_manifest
from calm.text.prepare import prepare
from calm.text.shards import checksum, open_data


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    rows = [{"q": f"question {number}?", "text": f"the answer is {number * number}"} for number in range(300)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(folder / "a.jsonl", folder / "data", "bytes", prompt_field="q", shard_tokens=3000, quiet=True)
    return folder / "data"


@pytest.fixture
def data(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "data")
    return tmp_path / "data"


def rewrite(folder, change):
    """Changes the manifest's entries in place."""
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def without_checksums(folder):
    rewrite(folder, lambda fields: fields.update(checksums={}))


def test_every_file_has_its_checksum(prepared):
    manifest = read_manifest(prepared)
    files = {path.name for path in prepared.iterdir()} - {"manifest.json"}
    assert set(manifest.checksums) == files and len(files) > 8
    assert all(checksum(prepared / name) == digest for name, digest in manifest.checksums.items())


@given(draw=st.data())
def test_a_flipped_bit_is_an_error_that_names_the_file(prepared, draw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flipped") / "data"
    shutil.copytree(prepared, folder)
    name = draw.draw(st.sampled_from(sorted(read_manifest(prepared).checksums)))
    content = bytearray((folder / name).read_bytes())
    bit = draw.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match=name.replace(".", r"\.")) as caught:
        open_data(folder)
    assert "\n" not in str(caught.value)


def test_large_data_is_verified_when_asked(data, monkeypatch):
    monkeypatch.setattr(shards, "SMALL", 0)
    open_data(data, verify=True)
    content = bytearray((data / "train-00001.bin").read_bytes())
    content[1000] ^= 2
    (data / "train-00001.bin").write_bytes(content)
    open_data(data)
    with pytest.raises(UsageError, match=r"train-00001\.bin: damaged"):
        open_data(data, verify=True)
    (data / "test.prompts.npy").unlink()
    with pytest.raises(UsageError, match="missing|damaged"):
        open_data(data, verify=True)


def test_data_without_checksums_opens_as_before(data):
    before = open_data(data)
    rewrite(data, lambda fields: [fields.pop(key) for key in ("checksums", "notes")])
    after = open_data(data)
    assert after.manifest.checksums == {} and after.manifest.splits == before.manifest.splits
    np.testing.assert_array_equal(after.split("train").read(0, 100), before.split("train").read(0, 100))
    assert len(after.manifest.fingerprint) == 16


def test_the_fingerprint_follows_the_tokens_and_not_the_folder(prepared, data, tmp_path):
    manifest = read_manifest(prepared)
    assert read_manifest(data).fingerprint == manifest.fingerprint
    other = dataclasses.replace(manifest, checksums=manifest.checksums | {"train-00000.bin": "0" * 64})
    assert other.fingerprint != manifest.fingerprint
    named = dataclasses.replace(manifest, source=manifest.source | {"name": "b"}, notes={"a": 1}, license="CC0-1.0")
    assert named.fingerprint == manifest.fingerprint
    old = dataclasses.replace(manifest, checksums={})
    assert old.fingerprint != dataclasses.replace(old, source=manifest.source | {"sha256": "other"}).fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(dtype="O"), "dtype 'O'"),
        (lambda f: f.update(dtype="float16"), "dtype 'float16'"),
        (lambda f: f.update(dtype=["uint16"]), "dtype is no str"),
        (lambda f: f["splits"]["train"]["shards"].update({"../secret.txt": 1}), "'../secret.txt' is no shard"),
        (lambda f: f["splits"]["train"]["shards"].update({"/etc/passwd": 1}), "is no shard"),
        (lambda f: f["splits"]["train"]["shards"].update({"a\\b.bin": 1}), "is no shard"),
        (lambda f: f["splits"].update({"../train": f["splits"]["train"]}), "is no split"),
        (lambda f: f["splits"]["train"].update(tokens=1e15), "is no count"),
        (lambda f: f["splits"]["train"].update(tokens=10**15), "in its shards"),
        (lambda f: f["splits"]["train"].update(documents=-1), "is no count"),
        (lambda f: f["splits"]["train"].update(documents=True), "is no count"),
        (lambda f: f["splits"]["train"].update(documents=10**9), "more documents"),
        (lambda f: f["splits"]["train"].update(prompt_tokens=10**9), "prompt tokens"),
        (lambda f: f["splits"]["train"].update(shards=[]), "is no split"),
        (lambda f: f["splits"]["train"]["shards"].update({"train-00000.bin": 1e400}), "is no count"),
        (lambda f: f.update(splits={}), "there is no split"),
        (lambda f: f["tokenizer"].update(vocab_size=0), "no number of ids"),
        (lambda f: f["tokenizer"].update(vocab_size=260), "says 260 ids, its tokenizer has 259"),
        (lambda f: f["tokenizer"].pop("fingerprint"), "tokenizer.fingerprint is no text"),
        (lambda f: f["source"].pop("sha256"), "source.sha256 is no text"),
        (lambda f: f["checksums"].update({"../x.bin": "0"}), "is no file of this folder"),
        (lambda f: f["checksums"].pop("train-00000.bin"), "there is none of train-00000.bin"),
        (lambda f: f.update(extra=1), "unknown entry 'extra'"),
        (lambda f: f.pop("splits"), "there is no splits"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused_in_one_line(data, change, message):
    rewrite(data, change)
    with pytest.raises(UsageError) as caught:
        open_data(data)
    assert message in str(caught.value) and "\n" not in str(caught.value) and str(data) in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["O", "../x", "uint16"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(draw=st.data())
def test_any_other_value_anywhere_is_refused_or_harmless(prepared, draw, tmp_path_factory):
    """Whatever a manifest says, reading either works within the vocabulary or ends in one line."""
    folder = tmp_path_factory.mktemp("values") / "data"
    shutil.copytree(prepared, folder)

    def change(fields):
        table = fields
        while True:
            key = draw.draw(st.sampled_from(sorted(table)))
            if not isinstance(table[key], dict) or not table[key] or draw.draw(st.booleans()):
                break
            table = table[key]
        table[key] = draw.draw(VALUES)

    rewrite(folder, change)
    try:
        opened = open_data(folder)
        for name in opened.manifest.splits:
            split = opened.split(name)
            assert 0 <= split.read(0, split.num_tokens).min() <= split.read(0, split.num_tokens).max() < 259
    except UsageError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "3", "null", '{"format": 1}', "\x00", '{"format": NaN}'])
def test_what_is_no_manifest_is_one_line(data, content):
    (data / "manifest.json").write_text(content)
    with pytest.raises(UsageError, match="manifest.json") as caught:
        open_data(data)
    assert "\n" not in str(caught.value)


def test_ids_beyond_the_vocabulary_are_refused_where_they_are_read(data, monkeypatch):
    without_checksums(data)
    path = data / "train-00000.bin"
    ids = np.fromfile(path, "<u2")
    ids[500] = 259
    ids.tofile(path)
    with pytest.raises(UsageError, match="holds the id 259"):
        open_data(data)
    monkeypatch.setattr(shards, "SMALL", 0)
    split = open_data(data).split("train")
    split.read(0, 500)
    with pytest.raises(UsageError, match="the vocabulary has 259"):
        split.read(400, 200)


def test_an_id_that_would_read_as_a_negative_number_is_refused(tmp_path):
    np.array([1, 2, 2**32 - 1], "<u4").tofile(tmp_path / "train-00000.bin")
    entry = {"documents": 1, "tokens": 3, "bytes": 2, "shards": {"train-00000.bin": 3}}
    with pytest.raises(UsageError, match="4294967295"):
        shards.Split(tmp_path, "train", entry, "uint32", 70_000).read(0, 3)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (np.zeros(3, "<u8"), "need uint64"),
        (np.zeros(1, "<f8"), "float64"),
        (np.array([None]), "missing or damaged"),
        (b"nonsense", "missing or damaged"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': [(((((", "missing or damaged"),
        ("shifted", "start outside"),
        ("reversed", "out of order"),
    ],
)
def test_damaged_document_starts_are_one_line(data, numbers, message):
    without_checksums(data)
    path = data / "train.documents.npy"
    if isinstance(numbers, bytes):
        path.write_bytes(numbers)
    else:
        starts = np.load(path)
        changed = {"shifted": lambda: starts + np.uint64(1), "reversed": lambda: np.append(starts[:1], starts[:0:-1])}
        np.save(path, changed[numbers]() if isinstance(numbers, str) else numbers)
    with pytest.raises(UsageError, match=message) as caught:
        open_data(data)
    assert "\n" not in str(caught.value) and "train.documents.npy" in str(caught.value)


def test_a_prompt_longer_than_its_document_is_refused(data):
    without_checksums(data)
    np.save(data / "train.prompts.npy", np.load(data / "train.prompts.npy") + np.uint64(1000))
    with pytest.raises(UsageError, match="a prompt longer than its document"):
        open_data(data)


def test_the_manifest_keeps_its_fields():
    """Data that exists must open: fields may be added with a default, none may go."""
    fields = {field.name for field in dataclasses.fields(Manifest) if field.default_factory is dataclasses.MISSING}
    assert fields == {"format", "source", "license", "tokenizer", "dtype", "held_out", "splits", "request"}
