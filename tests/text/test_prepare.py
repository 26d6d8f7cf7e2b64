"""Prepared data holds the text, all of it, in any circumstances; a killed run goes on and ends in the same bytes."""

import errno
import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from calm.errors import CalmError, UsageError
from calm.text import prepare as module
from calm.text.prepare import prepare
from calm.text.shard_writer import SplitWriter
from calm.text.shards import open_data
from calm.text.summary import show_summary, summarize

OPTIONS = dict(separator="<sep>", valid=0.1, test=0.1, shard_tokens=3000, quiet=True)

# Prepares with tiny batches and kills itself, for real, at one moment: the N-th write, sync or rename, or a file's rename.
VICTIM = """
import os, sys
from calm.text import prepare as module
from calm.text import shard_writer
moment, left = sys.argv[1], 0
def counted(function):
    def call(*arguments, **named):
        global left
        left += 1
        if str(left) == moment or str(arguments[-1]).endswith(moment):
            os.kill(os.getpid(), 9)
        return function(*arguments, **named)
    return call
module.BATCH, module.CHECKPOINT = 500, 2
os.fsync, os.replace = counted(os.fsync), counted(os.replace)
shard_writer.SplitWriter._put = counted(shard_writer.SplitWriter._put)
module.prepare(sys.argv[2], sys.argv[3], "bpe:300", separator="<sep>", valid=.1, test=.1, shard_tokens=3000, quiet=True)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """300 documents, some longer than a batch, and ids enough for several shards."""
    random = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma,", "naïve", "delta.\n", "one", "two", "three"]
    texts = [" ".join(random.choice(words, size=random.integers(3, 60))) for _ in range(300)]
    texts[150] = " ".join(random.choice(words, size=3000))
    path = tmp_path_factory.mktemp("source") / "corpus.txt"
    path.write_text("<sep>".join(texts))
    return path


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    prepare(source, folder, "bpe:300", **OPTIONS)
    return folder


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(module, "BATCH", 500)
    monkeypatch.setattr(module, "CHECKPOINT", 2)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def decoded(folder):
    """Every document of every split."""
    data = open_data(folder)
    found = {}
    for name in data.manifest.splits:
        split = data.split(name)
        ends = [*map(int, split.documents[1:]), split.num_tokens]
        rows = [split.read(int(start), end - int(start)) for start, end in zip(split.documents, ends, strict=True)]
        assert all(row[-1] == data.tokenizer.end_id for row in rows)
        found[name] = [data.tokenizer.decode(row) for row in rows]
    return found


def test_every_document_is_in_one_split_once(source, prepared):
    texts = [text.strip() for text in source.read_text().split("<sep>")]
    found = decoded(prepared)
    assert sorted(text for split in found.values() for text in split) == sorted(texts)
    assert [text for text in texts if text in set(found["train"])] == found["train"]  # in their order
    assert 10 < len(found["valid"]) < 60


def test_the_manifest_counts_what_is_there(source, prepared):
    manifest, found = open_data(prepared).manifest, decoded(prepared)
    assert manifest.source["sha256"] == __import__("hashlib").sha256(source.read_bytes()).hexdigest()
    assert manifest.dtype == "uint16" and len(manifest.splits["train"]["shards"]) > 3
    for name, texts in found.items():
        entry = manifest.splits[name]
        assert entry["documents"] == len(texts)
        assert entry["bytes"] == sum(len(text.encode()) for text in texts)
        assert entry["tokens"] == sum(entry["shards"].values()) == open_data(prepared).split(name).num_tokens
    assert str(source.parent) not in manifest.to_json()  # no local folder
    assert sorted(contents(prepared)) == sorted(
        ["manifest.json", "tokenizer.json", *(f"{name}.documents.npy" for name in found)]
        + [shard for name in found for shard in manifest.splits[name]["shards"]]
    )


def test_batches_and_checkpoints_do_not_show(source, prepared, tmp_path, small_batches):
    prepare(source, tmp_path / "again", "bpe:300", **OPTIONS)
    assert contents(tmp_path / "again") == contents(prepared)


@pytest.mark.parametrize(
    "moment", ["3", "40", "171", "334", "500", "tokenizer.json", "train-00002.bin", "valid.documents.npy", "manifest.json"]
)
def test_killed_for_real_and_run_again_ends_in_the_same_bytes(source, prepared, tmp_path, moment, small_batches):
    out = tmp_path / "out"
    line = [sys.executable, "-c", VICTIM, moment, str(source), str(out)]
    assert subprocess.run(line).returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    if moment != "3":
        with pytest.raises(UsageError, match="not finished; run the same"):
            open_data(out)
    prepare(source, out, "bpe:300", **OPTIONS)
    assert contents(out) == contents(prepared)


@pytest.mark.parametrize("calls", [0, 5, 260])
def test_a_full_disk_is_one_line_and_the_run_goes_on(source, prepared, tmp_path, monkeypatch, small_batches, calls):
    left, put = [calls], SplitWriter._put

    def full(self, ids):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, ids)

    with monkeypatch.context() as patch:
        patch.setattr(SplitWriter, "_put", full)
        with pytest.raises(CalmError, match="the disk is full; make room and run the same command again") as caught:
            prepare(source, tmp_path, "bpe:300", **OPTIONS)
    assert caught.value.exit_code == 1
    if calls > 100:
        assert json.loads((tmp_path / "prepare.journal.json").read_text())["cursor"]["document"] > 0
    prepare(source, tmp_path, "bpe:300", **OPTIONS)
    assert contents(tmp_path) == contents(prepared)


def test_one_long_document_goes_on_in_its_middle(tmp_path, monkeypatch, small_batches):
    source, left, append = tmp_path / "novel.txt", [7], SplitWriter.append
    source.write_text("".join(f"line {number} of a long novel\n" for number in range(10_000)))

    def stop(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        append(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SplitWriter, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, tmp_path / "parts", "bytes", quiet=True)
    cursor = json.loads((tmp_path / "parts" / "prepare.journal.json").read_text())["cursor"]
    assert cursor["document"] == 0 and cursor["piece"] > 3
    prepare(source, tmp_path / "parts", "bytes", quiet=True)
    prepare(source, tmp_path / "whole", "bytes", quiet=True)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_finished_data_is_left_alone_and_other_requests_are_refused(source, prepared, tmp_path):
    before = contents(prepared)
    prepare(source, prepared, "bpe:300", **OPTIONS)
    assert contents(prepared) == before
    with pytest.raises(UsageError, match="prepared with valid=0.1, now asked 0.2"):
        prepare(source, prepared, "bpe:300", **(OPTIONS | {"valid": 0.2}))
    changed = tmp_path / source.name
    changed.write_text(source.read_text() + " more")
    with pytest.raises(UsageError, match="other content"):
        prepare(changed, prepared, "bpe:300", **OPTIONS)


def test_overwrite_replaces_and_touches_nothing_else(source, prepared, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    prepare(source, tmp_path, "bytes", quiet=True)
    prepare(source, tmp_path, "bpe:300", overwrite=True, **OPTIONS)
    assert {name: value for name, value in contents(tmp_path).items() if name != "mine.txt"} == contents(prepared)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_request_that_failed_early_does_not_hold_the_folder(source, prepared, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_bpe", lambda texts, size: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(source, tmp_path, "bpe:400", **OPTIONS)
    assert (tmp_path / "prepare.journal.json").exists()
    prepare(source, tmp_path, "bpe:300", **OPTIONS)
    assert contents(tmp_path) == contents(prepared)


def test_a_source_that_changed_since_the_interruption_is_refused(source, tmp_path, monkeypatch, small_batches):
    copy, out, left, put = tmp_path / "copy.txt", tmp_path / "out", [200], SplitWriter._put
    copy.write_text(source.read_text())

    def full(self, ids):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, ids)

    with monkeypatch.context() as patch:
        patch.setattr(SplitWriter, "_put", full)
        with pytest.raises(CalmError):
            prepare(copy, out, "bytes", separator="<sep>", quiet=True)
    copy.write_text(source.read_text() + "!")
    with pytest.raises(UsageError, match="the source changed"):
        prepare(copy, out, "bytes", separator="<sep>", quiet=True)


def test_few_documents_are_held_out_by_their_end(tmp_path):
    text = "".join(f"line {number}\n" for number in range(1000))
    (tmp_path / "novel.txt").write_text(text)
    prepare(tmp_path / "novel.txt", tmp_path / "data", "bytes", quiet=True)
    found = decoded(tmp_path / "data")
    assert [len(found[name]) for name in ("train", "valid", "test")] == [1, 1, 1]
    assert found["train"][0] + found["valid"][0] + found["test"][0] == text
    assert all(part[0].endswith("\n") for part in found.values())
    assert len(found["valid"][0]) == pytest.approx(0.05 * len(text), abs=20)


def test_another_tokenizers_data_is_refused(prepared, tmp_path):
    for name, value in contents(prepared).items():
        (tmp_path / name).write_bytes(value)
    module.load_tokenizer("bytes").save(tmp_path / "tokenizer.json")
    with pytest.raises(UsageError, match="made with another tokenizer"):
        open_data(tmp_path)


def test_the_tokenizer_of_a_run_is_used_as_it_is(source, prepared, tmp_path):
    manifest = prepare(source, tmp_path, prepared / "tokenizer.json", **OPTIONS)
    assert manifest.tokenizer["fingerprint"] == open_data(prepared).manifest.tokenizer["fingerprint"]
    assert {k: v for k, v in contents(tmp_path).items() if k != "manifest.json"} == {
        k: v for k, v in contents(prepared).items() if k != "manifest.json"
    }
    with pytest.raises(UsageError, match="prepared with tokenizer="):
        prepare(source, tmp_path, "bytes", **OPTIONS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "train-00000.bin").write_bytes(b"xx"), "the manifest says"),
        (lambda folder: (folder / "train-00000.bin").unlink(), "0 bytes, the manifest says"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "format None"),
        (lambda folder: (folder / "manifest.json").write_text("no"), "not a manifest"),
        (lambda folder: (folder / "manifest.json").unlink(), "holds no manifest.json"),
    ],
)
def test_damaged_data_is_refused_in_one_line(prepared, tmp_path, damage, message):
    for name, value in contents(prepared).items():
        (tmp_path / name).write_bytes(value)
    damage(tmp_path)
    with pytest.raises(UsageError, match=message):
        open_data(tmp_path).split("train")


def test_the_summary_shows_counts_and_text(prepared):
    summary = summarize(prepared, examples=2, length=10)
    assert summary["splits"]["train"]["bytes_per_token"] > 1.2
    assert len(summary["splits"]["valid"]["examples"]) == 2
    shown = show_summary(summary)
    assert "fingerprint" in shown and summary["splits"]["test"]["examples"][0]["text"] in shown
    json.dumps(summary)
