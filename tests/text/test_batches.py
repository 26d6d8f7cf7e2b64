"""Batches: the same for the same seed, from any step, for any number of hosts; an epoch is every token once."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.errors import UsageError
from calm.text.batches import Batches, evaluation_blocks
from calm.text.prepare import prepare
from calm.text.shards import open_data

BEGIN = 256


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    lines = [f"document {number} says {number * number}\n" for number in range(300)]
    (folder / "text.txt").write_text("<sep>".join(lines))
    prepare(folder / "text.txt", folder / "data", "bytes", separator="<sep>", shard_tokens=1000, quiet=True)
    return open_data(folder / "data").split("train")


def batches(split, **changes):
    options = dict(batch_size=6, num_tokens=32, chunk_size=4, begin_id=BEGIN, seed=7)
    return Batches(split, **(options | changes))


def test_same_seed_same_batches_other_seed_others(split):
    first, again, other = batches(split), batches(split), batches(split, seed=8)
    assert all(np.array_equal(next(first), next(again)) for _ in range(20))
    assert not np.array_equal(first[0], other[0])
    assert first[0].dtype == np.int32 and first[0].shape == (6, 32)


def test_restored_batches_go_on_exactly(split):
    first = batches(split)
    for _ in range(5):
        next(first)
    state = dict(first.state)
    expected = [next(first) for _ in range(4)]
    second = batches(split)
    second.restore(state)
    np.testing.assert_array_equal([next(second) for _ in range(4)], expected)
    assert all(type(value) is int for value in state.values())  # the checkpoint refuses numpy's integers


def test_state_of_other_batches_is_refused(split):
    with pytest.raises(UsageError, match="batch_size=6, now it is 3"):
        batches(split, batch_size=3).restore(batches(split).state)


@pytest.mark.parametrize("hosts", [2, 3, 6])
def test_hosts_share_the_rows_of_one_batch(split, hosts):
    parts = [batches(split, host_index=index, host_count=hosts) for index in range(hosts)]
    for step in (0, 11):
        np.testing.assert_array_equal(np.concatenate([part[step] for part in parts]), batches(split)[step])


def test_an_epoch_reads_every_token_once_and_the_next_one_starts_elsewhere(split):
    whole = split.read(0, split.num_tokens)
    windows = split.num_tokens // 32
    epochs = batches(split, batch_size=windows, document_starts=0.0)
    seen = []
    for _ in range(2):
        rows = next(epochs)
        doubled = np.concatenate([whole, whole[:32]])
        places = {doubled[i : i + 32].tobytes(): i for i in range(len(whole))}
        starts = sorted(places[row.astype(doubled.dtype).tobytes()] for row in rows)
        gaps = np.diff(np.array([*starts, starts[0] + len(whole)]))
        assert (gaps >= 32).all() and gaps.sum() == len(whole)  # no overlap, at most a rest left over
        seen.append(starts)
    assert seen[0] != seen[1]
    assert epochs.epoch == pytest.approx(2.0)


def test_chunk_phase_is_random(split):
    """Over many epochs a window begins at each place modulo K about equally often."""
    some = batches(split, document_starts=0.0)
    phases = [some._phase(epoch) % 4 for epoch in range(400)]
    assert np.bincount(phases, minlength=4).min() > 60


def test_a_share_of_rows_starts_at_a_document_behind_one_to_k_begins(split):
    drawn = batches(split, document_starts=0.5)
    rows = np.concatenate([drawn[step] for step in range(200)])
    begins = (rows == BEGIN).sum(1)
    assert 0.45 < (begins > 0).mean() < 0.55
    assert set(begins) == {0, 1, 2, 3, 4}
    documents = {split.read(int(start), 9).tobytes() for start in split.documents}
    for row, count in zip(rows, begins, strict=True):
        if count:
            assert (row[:count] == BEGIN).all() and row[count : count + 9].tobytes() in documents
    assert not (np.concatenate([batches(split, document_starts=0.0)[step] for step in range(20)]) == BEGIN).any()


def test_one_long_document_is_not_begun_again_and_again(split, monkeypatch):
    monkeypatch.setitem(split.__dict__, "documents", np.zeros(1, np.uint64))
    drawn = batches(split, document_starts=0.5)
    rows = np.concatenate([drawn[step] for step in range(200)])
    windows = split.num_tokens // rows.shape[1]
    assert 0.3 / windows < ((rows == BEGIN).any(1)).mean() < 2 / windows


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_tokens": 10**6}, "fewer than one block"),
        ({"num_tokens": 30}, "num_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"host_count": 4}, "batch_size"),
        ({"host_index": 1}, "host_index"),
        ({"document_starts": 1.5}, "document_starts"),
        ({"seed": -1}, "seed"),
    ],
)
def test_nonsense_is_refused_in_one_line(split, changes, word):
    with pytest.raises(UsageError, match=word):
        batches(split, **changes)


def test_evaluation_blocks_are_the_split_in_order(split):
    blocks, document = evaluation_blocks(split, num_tokens=40)
    np.testing.assert_array_equal(blocks.ravel(), split.read(0, blocks.size))
    assert split.num_tokens - blocks.size < 40
    starts = np.asarray(split.documents).astype(int)
    for number, of in enumerate(document):
        assert starts[of] <= number * 40 and (of + 1 == len(starts) or number * 40 < starts[of + 1])
    few, _ = evaluation_blocks(split, num_tokens=40, max_blocks=3)
    np.testing.assert_array_equal(few, blocks[:3])
    with pytest.raises(UsageError, match="fewer than one block"):
        evaluation_blocks(split, num_tokens=split.num_tokens + 1)


@given(st.integers(0, 10**6), st.integers(0, 3000))
def test_reading_crosses_shards_and_the_ring(split, start, length):
    whole = split.read(0, split.num_tokens)
    row = np.empty(length, np.int32)
    split.read_into(row, start)
    np.testing.assert_array_equal(row, np.take(whole, np.arange(start, start + length), mode="wrap"))


def test_text_imports_no_jax():
    """Everything but the shuffling of batches, whose library brings jax along."""
    code = (
        "import sys, importlib, pkgutil, calm.text\n"
        "for module in pkgutil.iter_modules(calm.text.__path__): importlib.import_module('calm.text.' + module.name)\n"
        "assert not {'jax', 'grain', 'datasets', 'pyarrow', 'tiktoken', 'rich'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
