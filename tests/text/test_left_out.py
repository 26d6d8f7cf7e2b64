"""Silence is a fault: what a corpus holds is read, or named; what a tokenizer loses is said."""

import bz2
import gzip
import hashlib
import json
import lzma

import pytest
import tokenizer_kinds as kinds
from hypothesis import given
from hypothesis import strategies as st

from calm.errors import UsageError
from calm.text.compressed import kind_of, open_bytes
from calm.text.prepare import prepare
from calm.text.round_trip import RoundTrip
from calm.text.shards import open_data
from calm.text.sources import open_source
from calm.text.summary import show_summary, summarize

OPTIONS = dict(valid=0.0, test=0.0, quiet=True)


def zst(content):
    pyarrow = pytest.importorskip("pyarrow")
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}


def texts(folder):
    """Text of every document of the train split."""
    data = open_data(folder)
    split = data.split("train")
    ends = [*map(int, split.documents[1:]), split.num_tokens]
    return [data.tokenizer.decode(split.read(int(a), b - int(a))) for a, b in zip(split.documents, ends, strict=True)]


# -- compressed files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", PACKED)
@given(parts=st.lists(st.binary(max_size=50), min_size=1, max_size=4))
def test_a_compressed_file_is_its_content_and_its_checksum_that_of_the_file(suffix, parts, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / f"a.txt{suffix}"
    packed = b"".join(PACKED[suffix](part) for part in parts)  # several frames, as parallel tools write them
    path.write_bytes(packed)
    fed = []
    with open_bytes(path, fed.append) as file:
        assert file.read() == b"".join(parts)
    assert b"".join(fed) == packed


@pytest.mark.parametrize("suffix", PACKED)
def test_a_damaged_compressed_file_is_one_line(suffix, tmp_path):
    packed = PACKED[suffix](b'{"text": "some text that is long enough"}\n' * 50)
    for damaged in (packed[: len(packed) // 2], b"no such format, whatever it is called", packed[:20] + b"\xff" * 30):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="damaged, or no") as caught:
            list(open_source(path).pieces(0))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_of_compressed_files_is_the_same_corpus(tmp_path):
    rows = "".join(json.dumps({"text": f"story {number}"}) + "\n" for number in range(40)).encode()
    for name, pack in (("plain", bytes), ("packed", gzip.compress)):
        (tmp_path / name).mkdir()
        end = ".gz" if name == "packed" else ""
        (tmp_path / name / f"a.txt{end}").write_bytes(pack(b"one long text\n" * 20))
        (tmp_path / name / f"b.jsonl{end}").write_bytes(pack(rows))
        prepare(tmp_path / name, tmp_path / f"{name}-data", "bytes", **OPTIONS)
    assert texts(tmp_path / "packed-data") == texts(tmp_path / "plain-data")
    manifest = open_data(tmp_path / "packed-data").manifest
    content = b"".join(path.read_bytes() for path in sorted((tmp_path / "packed").iterdir()))
    assert manifest.source["sha256"] == hashlib.sha256(content).hexdigest()
    assert prepare(tmp_path / "packed", tmp_path / "packed-data", "bytes", **OPTIONS) == manifest


@pytest.mark.parametrize(("name", "kind"), [("a.jsonl.gz", ".jsonl"), ("A.TXT.ZST", ".txt"), ("a.gz", ""), ("a.b.md", ".md")])
def test_the_kind_of_a_file_is_that_of_its_content(name, kind, tmp_path):
    assert kind_of(tmp_path / name) == kind


# -- what is left out -------------------------------------------------------------------------------------------------


def test_files_that_are_not_read_are_counted_and_named(tmp_path, capsys):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / ".git").mkdir()
    for name in ("a.txt", "d.md", "sub/picture.png", "README.txt", ".git/config", "b.parquet.gz"):
        (source / name).write_text("some text\n" * 30)
    manifest = prepare(source, tmp_path / "data", "bytes", valid=0.0, test=0.0)
    assert manifest.source["left_out"] == ["README.txt", "b.parquet.gz", "d.md", "sub/picture.png"]
    assert "4 files left out: README.txt, b.parquet.gz, d.md, sub/picture.png" in capsys.readouterr().err
    assert "4 files left out" in show_summary(summarize(tmp_path / "data"))


def test_a_folder_without_text_says_what_it_has(tmp_path):
    (tmp_path / "a.md").write_text("x")
    (tmp_path / "b.md").write_text("x")
    with pytest.raises(UsageError, match=r"it has: 2 \.md"):
        open_source(tmp_path)


def test_null_and_empty_texts_have_one_rule(tmp_path):
    rows = [{"text": "one"}, {"text": None}, {"text": ""}, {"text": "two"}, {"text": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = ["a.jsonl"]
    if pyarrow := pytest.importorskip("pyarrow"):
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": [row["text"] for row in rows]}), tmp_path / "b.parquet")
        sources.append("b.parquet")
    for name in sources:
        manifest = prepare(tmp_path / name, tmp_path / f"{name}-data", "bytes", **OPTIONS)
        assert texts(tmp_path / f"{name}-data") == ["one", "two"]
        assert manifest.notes == {"records_without_text": 3}
        assert "3 records without text" in show_summary(summarize(tmp_path / f"{name}-data"))
    (tmp_path / "c.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(UsageError, match="line 1: field 'text' is of type int, text is needed"):
        prepare(tmp_path / "c.jsonl", tmp_path / "c", "bytes", **OPTIONS)


@pytest.mark.parametrize("column", ["numbers", "lists", "binary"])
def test_a_column_of_another_type_is_one_line(column, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    values = {"numbers": pyarrow.array([1, 2]), "lists": pyarrow.array([["a"]] * 2), "binary": pyarrow.array([b"a", b"b"])}
    parquet.write_table(pyarrow.table({"text": values[column]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"column 'text' is of type .*, text is needed"):
        list(open_source(tmp_path / "a.parquet").pieces(0))


def test_a_column_of_repeated_texts_is_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": pyarrow.array(["a", "b", "a"]).dictionary_encode()}), tmp_path / "a.parquet")
    assert [piece.text for piece in open_source(tmp_path / "a.parquet").pieces(0)] == ["a", "b", "a"]


def test_records_without_end_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(UsageError, match="line 1 is nested too deeply"):
        list(open_source(tmp_path / "deep.jsonl").pieces(0))
    monkeypatch.setattr("calm.text.files._LONGEST_LINE", 30)
    (tmp_path / "long.jsonl").write_text('{"text": "short"}\n' + '{"text": "' + "x" * 40 + '"}\n')
    with pytest.raises(UsageError, match="line 2 has"):
        list(open_source(tmp_path / "long.jsonl").pieces(0))


def test_a_separator_that_never_occurs_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("one\n---\ntwo\n" * 10)
    unused = prepare(tmp_path / "a.txt", tmp_path / "unused", "bytes", separator="<sep>", **OPTIONS)
    assert unused.notes == {"unused_separator": "<sep>"} and unused.splits["train"]["documents"] == 1
    assert "the separator '<sep>' occurs nowhere" in show_summary(summarize(tmp_path / "unused"))
    used = prepare(tmp_path / "a.txt", tmp_path / "used", "bytes", separator="---", **OPTIONS)
    assert used.notes == {} and used.splits["train"]["documents"] == 11


# -- what a tokenizer loses -------------------------------------------------------------------------------------------

EVERY = kinds.every_kind()


@pytest.mark.parametrize("kind", EVERY)
@given(text=st.text())
def test_lossless_tokenizers_give_back_every_text_and_others_are_measured(kind, text):
    tokenizer, found = EVERY[kind], RoundTrip()
    ids = tokenizer.encode(text)
    found.add(tokenizer, text, ids)
    if tokenizer.lossless:
        assert tokenizer.decode(ids) == text and found.measured == 0
    else:
        assert found.measured == len("".join(text.split())) and 0 <= found.lost <= found.measured
    assert tokenizer.lossless == (kind in ("bytes", "bpe", "tiktoken"))


def test_characters_that_do_not_come_back_are_counted():
    found = RoundTrip()
    tokenizer = EVERY["suffix_bpe"]
    for text in ("the cat", "the ЖЖЖ cat"):
        found.add(tokenizer, text, tokenizer.encode(text))
    assert (found.measured, found.lost, found.share) == (15, 3, 0.2)
    found = RoundTrip()
    found.add(EVERY["words"], "the kangaroo", EVERY["words"].encode("the kangaroo"))
    assert (found.measured, found.lost) == (11, 8)


def test_a_tokenizer_that_loses_much_is_refused_and_a_little_is_said(tmp_path):
    path = kinds.save(kinds.suffix_bpe(), tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text("the cat and the Ж\n" * 500)
    (tmp_path / "b.txt").write_text("кот и река\n" * 500)
    manifest = prepare(tmp_path / "a.txt", tmp_path / "data", path, **OPTIONS)
    assert manifest.notes["lost_characters"] == pytest.approx(1 / 13)
    assert "7.69% of the characters do not come back" in show_summary(summarize(tmp_path / "data"))
    with pytest.raises(UsageError, match=r"100% of the characters of b\.txt do not come back from it"):
        prepare(tmp_path / "b.txt", tmp_path / "other", path, **OPTIONS)
    assert not (tmp_path / "other" / "manifest.json").exists()
    prepare(tmp_path / "b.txt", tmp_path / "other", "bytes", **OPTIONS)  # the folder is not held by what was refused
    assert open_data(tmp_path / "other").manifest.notes == {}


# -- output as input, and paths ---------------------------------------------------------------------------------------


def test_prepared_data_inside_its_source_is_no_part_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    first = prepare(".", "data", "bytes", **OPTIONS)
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    for source, out in ((".", "data"), (tmp_path, "data/"), ("../" + tmp_path.name, tmp_path / "data")):
        assert prepare(source, out, "bytes", **OPTIONS) == first
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before
    assert prepare(".", "more/data", "bytes", **OPTIONS).source == first.source  # nor is that of another run
    into_itself = prepare(".", ".", "bytes", **OPTIONS)
    assert into_itself.splits == first.splits and prepare(".", ".", "bytes", **OPTIONS) == into_itself
    with pytest.raises(UsageError, match="holds no"):
        open_source("data")


def test_a_path_means_what_the_user_wrote(tmp_path, monkeypatch):
    home = tmp_path / "home of naïve"
    (home / "text").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    (home / "text" / "a.txt").write_text("some text\n" * 100)
    prepared = prepare("~/text/a.txt", "~/data", "bytes", **OPTIONS)
    assert (home / "data" / "manifest.json").is_file() and open_data("~/data").manifest == prepared
    for source in ("text/a.txt", "./text/../text/a.txt", home / "text" / "a.txt"):
        assert prepare(source, home / "data", "bytes", **OPTIONS) == prepared
    words = prepare("~/text/a.txt", "words", "words", **OPTIONS)
    for number, spec in enumerate(("~/words", "words/tokenizer.json", home / "words")):
        made = prepare("text", "more", spec, **OPTIONS)
        assert made.tokenizer["fingerprint"] == words.tokenizer["fingerprint"], number
