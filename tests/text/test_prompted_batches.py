"""Prompts and responses on disk and in batches: laid out as generation lays them out, responses alone counted."""

import json

import numpy as np
import pytest

from calm.errors import UsageError
from calm.text.batches import Batches
from calm.text.chunking import chunk_prompt
from calm.text.prepare import prepare
from calm.text.prompted_batches import PromptedBatches
from calm.text.shards import open_data
from calm.text.tokenizer import ByteTokenizer

T, K = 32, 4
TOKENIZER = ByteTokenizer()
PAIRS = [("Q" * (number % 7) + "?", "A" * (1 + number % 5) + ".") for number in range(230)]
OPTIONS = dict(field="response", prompt_field="prompt", valid=0.1, test=0.0, quiet=True)
SIZES = dict(batch_size=3, num_tokens=T, chunk_size=K, begin_id=TOKENIZER.begin_id, seed=5)


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    source = write(folder / "pairs.jsonl", [{"prompt": prompt, "response": response} for prompt, response in PAIRS])
    prepare(source, folder / "data", "bytes", **OPTIONS)
    return open_data(folder / "data")


def test_every_document_is_its_prompt_and_its_response(data):
    found = []
    for name in ("train", "valid"):
        split = data.split(name)
        ends = [*split.documents[1:], split.num_tokens]
        for start, end, length in zip(split.documents, ends, split.prompts, strict=True):
            ids = split.read(int(start), int(end - start))
            assert ids[-1] == TOKENIZER.end_id
            found.append((TOKENIZER.decode(ids[:length]), TOKENIZER.decode(ids[length:])))
        assert data.manifest.splits[name]["prompt_tokens"] == split.prompts.sum()
    assert sorted(found) == sorted(PAIRS)


def starts_of(row):
    """Chunks with which a document begins: one of a prompt, behind none of a prompt."""
    of_prompt = np.append(False, row.reshape(-1, K)[:, 0] < 0)
    return np.flatnonzero(of_prompt[1:] & ~of_prompt[:-1]).tolist()


def test_responses_begin_on_a_boundary_behind_what_generation_would_put_there(data):
    documents = {}
    for row in PromptedBatches(data.split("train"), **SIZES)[0]:
        chunks = row.reshape(-1, K)
        starts = starts_of(row)
        assert starts[0] == 0
        for begin, end in zip(starts, [*starts[1:], len(chunks)], strict=True):
            documents[begin] = chunks[begin:end]
            ids = chunks[begin:end].reshape(-1)
            prompt, response = ~ids[ids < 0], ids[ids >= 0]
            text = TOKENIZER.decode(prompt)
            np.testing.assert_array_equal(prompt.reshape(-1, K), chunk_prompt(TOKENIZER.encode(text), K, TOKENIZER.begin_id))
            assert (ids[: len(prompt)] < 0).all() and len(response) % K == 0
            if end < len(chunks):  # the row's last document may be cut
                assert (text, TOKENIZER.decode(response)) in PAIRS
                assert TOKENIZER.end_id in response[-K:]


def test_a_batch_is_a_function_of_its_number_and_every_document_begins_a_row(data):
    split = data.split("train")
    batches = PromptedBatches(split, **SIZES)
    some = [next(batches) for _ in range(3)]
    again = PromptedBatches(split, **SIZES)
    again.restore(batches.state | {"step": 2})
    np.testing.assert_array_equal(next(again), some[2])
    rows = -(-len(split.documents) // 3)
    order = [int(batches._order[number]) for number in range(3 * rows)][: len(split.documents)]
    assert sorted(order) == list(range(len(split.documents)))
    halves = [PromptedBatches(split, **(SIZES | {"batch_size": 4}), host_index=i, host_count=2)[1] for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves), PromptedBatches(split, **(SIZES | {"batch_size": 4}))[1])


def test_rows_in_order_go_through_the_documents_once(data):
    split = data.split("valid")
    rows = PromptedBatches(split, **SIZES).in_order(1000)
    begun = [len(starts_of(row)) for row in rows]
    assert len(split.documents) <= sum(begun)
    # a cut one begins the next row again; the last row is filled up from the first document on
    assert sum(begun[:-1]) + 1 <= len(split.documents) + len(rows) - 1
    assert len(PromptedBatches(split, **SIZES).in_order(2)) == 2


def test_a_prompt_longer_than_half_a_row_keeps_its_end(tmp_path):
    source = write(tmp_path / "long.jsonl", [{"prompt": "x" * 90 + f"{number:02}", "response": "yes"} for number in range(20)])
    prepare(source, tmp_path / "data", "bytes", **(OPTIONS | {"valid": 0.0}))
    for row in PromptedBatches(open_data(tmp_path / "data").split("train"), **SIZES)[0]:
        assert TOKENIZER.decode(~row[row < 0]).startswith("x" * 14) and TOKENIZER.decode(row[row >= 0]).startswith("yes")


def test_long_prompts_survive_an_interruption(tmp_path, monkeypatch):
    """A prompt of several pieces, with the journal written behind each: its length is that of all of them."""
    monkeypatch.setattr("calm.text.prepare.CHECKPOINT", 1)
    monkeypatch.setattr("calm.text.prepare.BATCH", 1000)
    records = [{"prompt": "word " * 8000, "response": "short"}, {"prompt": "", "response": "alone"}] * 3
    source = write(tmp_path / "pairs.jsonl", records)
    prepare(source, tmp_path / "whole", "bytes", **(OPTIONS | {"valid": 0.0}))
    from calm.text import prepare as module

    written = module.SplitWriter.append
    calls = iter(range(1000))

    def stop(self, *args, **kwargs):
        if next(calls) == 7:
            raise KeyboardInterrupt
        written(self, *args, **kwargs)

    monkeypatch.setattr(module.SplitWriter, "append", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "parts", "bytes", **(OPTIONS | {"valid": 0.0}))
    monkeypatch.setattr(module.SplitWriter, "append", written)
    prepare(source, tmp_path / "parts", "bytes", **(OPTIONS | {"valid": 0.0}))
    for name in ("train-00000.bin", "train.documents.npy", "train.prompts.npy"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    prompts = open_data(tmp_path / "parts").split("train").prompts
    np.testing.assert_array_equal(prompts, [40_000, 0] * 3)


def test_what_has_no_prompts_is_refused(tmp_path, data):
    text = tmp_path / "plain.txt"
    text.write_text("words " * 200)
    with pytest.raises(UsageError, match=r"plain\.txt: prompts .* are read from \.jsonl"):
        prepare(text, tmp_path / "data", "bytes", **OPTIONS)
    with pytest.raises(UsageError, match="pydoc: prompts"):
        prepare("pydoc", tmp_path / "data", "bytes", **OPTIONS)
    source = write(tmp_path / "half.jsonl", [{"response": "yes"}])
    with pytest.raises(UsageError, match="line 1 has no text in field 'prompt'"):
        prepare(source, tmp_path / "data", "bytes", **OPTIONS)
    prepare(text, tmp_path / "other", "bytes", valid=0.0, test=0.0, quiet=True)
    split = open_data(tmp_path / "other").split("train")
    assert split.prompts is None and Batches(split, **SIZES)[0].min() >= 0
    with pytest.raises(UsageError, match="has no prompts; prepare the data with --prompt-field"):
        PromptedBatches(split, **SIZES)
