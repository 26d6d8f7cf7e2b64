"""Hub data sets, tried on a local folder that the package `datasets` reads like one."""

import json
import sys
import types

import pytest

from calm.errors import MissingExtraError, UsageError
from calm.text.prepare import prepare
from calm.text.shards import open_data

OPTIONS = dict(quiet=True, shard_tokens=1000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    for name, count in (("train", 400), ("validation", 20)):
        lines = [json.dumps({"text": f"{name} story {number}", "n": number}) for number in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"calm-lm\[data\]"):
        prepare("hf:roneneldan/TinyStories", tmp_path)


def test_a_data_set_is_streamed_into_its_splits(folder, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    manifest = prepare(f"hf:{folder}", tmp_path / "data", "bytes", **OPTIONS)
    assert {name: entry["documents"] for name, entry in manifest.splits.items()} == {"train": 400, "valid": 20}
    assert str(folder.parent) not in manifest.to_json()
    data = open_data(tmp_path / "data")
    start = int(data.split("valid").documents[3])
    assert data.tokenizer.decode(data.split("valid").read(start, 18)) == "validation story 3"
    with pytest.raises(UsageError, match=r"no text in field 'body' \(there is: text, n\)"):
        prepare(f"hf:{folder}", tmp_path / "other", "bytes", field="body", **OPTIONS)


def test_null_and_empty_texts_are_left_out_and_counted(tmp_path, monkeypatch):
    """With a stand-in for the package, which answers as it does."""

    class Stream(list):
        def skip(self, count):
            return self[count:]

    rows = Stream({"text": text} for text in ["one", None, "", "two", None])
    package = types.ModuleType("datasets")
    monkeypatch.setattr(package, "get_dataset_split_names", lambda name, subset: ["train"], raising=False)
    monkeypatch.setattr(package, "load_dataset", lambda *arguments, **options: rows, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", package)
    (tmp_path / "set").mkdir()
    manifest = prepare(f"hf:{tmp_path / 'set'}", tmp_path / "data", "bytes", valid=0.0, test=0.0, **OPTIONS)
    assert manifest.notes == {"records_without_text": 3} and manifest.splits["train"]["documents"] == 2
    data = open_data(tmp_path / "data")
    assert data.tokenizer.decode(data.split("train").read(0, 8)) == "onetwo"


def test_an_interrupted_stream_goes_on(folder, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    from calm.text import prepare as module

    monkeypatch.setattr(module, "BATCH", 200)
    monkeypatch.setattr(module, "CHECKPOINT", 2)
    prepare(f"hf:{folder}", tmp_path / "whole", "bytes", **OPTIONS)
    calls, put = [0], module.SplitWriter.append

    def stop(self, *arguments):
        calls[0] += 1
        if calls[0] > 250:
            raise KeyboardInterrupt
        put(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module.SplitWriter, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(f"hf:{folder}", tmp_path / "parts", "bytes", **OPTIONS)
    prepare(f"hf:{folder}", tmp_path / "parts", "bytes", **OPTIONS)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes(), path.name
