"""Sums merge to the whole, and intervals resample documents, or long enough blocks where documents are few."""

import numpy as np
import pytest

from calm.core.intervals import BlockSums, Interval, Mean, bootstrap, paired_bootstrap
from calm.errors import UsageError


def first(means):
    return means[..., 0]


def make(blocks: int, block_tokens: int, document=None, seed: int = 0) -> BlockSums:
    generator = np.random.default_rng(seed)
    count = generator.integers(1, 20, blocks).astype(float)
    document = np.arange(blocks) if document is None else document
    total = generator.normal(1, 1, (blocks, 2)) * count[:, None]
    return BlockSums(total=total, count=count, document=document, block_tokens=block_tokens)


def test_merged_sums_are_the_whole():
    values = np.random.default_rng(0).normal(size=11)
    parts = [Mean(values[a:b].sum(), b - a) for a, b in ((0, 3), (3, 4), (4, 11))]
    assert (parts[0] + parts[1] + parts[2]).value == pytest.approx(values.mean())
    assert np.isnan(Mean(0.0, 0).value)
    whole = make(9, 64)
    pieces = [
        BlockSums(total=whole.total[a:b], count=whole.count[a:b], document=whole.document[a:b], block_tokens=64)
        for a, b in ((0, 2), (2, 9))
    ]
    np.testing.assert_array_equal(BlockSums.concatenate(pieces).means, whole.means)


def test_thirty_documents_are_units_fewer_are_not():
    many = make(60, 64, document=np.arange(60) // 2 * 7)
    unit, name = many.units()
    assert name == "document" and len(np.unique(unit)) == 30 and (np.diff(unit)[::2] == 0).all()
    few = make(60, 300, document=np.zeros(60, int))
    unit, name = few.units()
    assert name == "block of 1200 tokens"
    assert min(np.bincount(unit)) * 300 >= 1024 and len(np.unique(unit)) == 15
    ragged = make(62, 300, document=np.zeros(62, int)).units()[0]
    assert min(np.bincount(ragged)) * 300 >= 1024


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered = 0
    for trial in range(200):
        interval = bootstrap(make(40, 1024, seed=trial), [first], draws=200)[0]
        covered += interval.low <= 1 <= interval.high
    assert 175 <= covered <= 199


def test_copies_of_a_document_do_not_narrow_its_interval():
    single = make(40, 1024)
    copied = BlockSums(
        total=np.repeat(single.total, 5, 0),
        count=np.repeat(single.count, 5),
        document=np.repeat(single.document, 5),
        block_tokens=1024,
    )
    one, five = (bootstrap(sums, [first])[0] for sums in (single, copied))
    assert (one.low, one.high) == (pytest.approx(five.low), pytest.approx(five.high))


def test_pairing_cancels_what_is_common():
    one = make(40, 1024)
    two = BlockSums(total=one.total - 0.1 * one.count[:, None], count=one.count, document=one.document, block_tokens=1024)
    interval = paired_bootstrap(one, two, [first])[0]
    assert interval.low == pytest.approx(0.1) and interval.high == pytest.approx(0.1) and interval.excludes_zero


def test_one_unit_has_no_interval_and_nothing_scored_is_an_error():
    interval = bootstrap(make(3, 64, document=np.zeros(3, int)), [first])[0]
    assert np.isnan(interval.low) and not interval.excludes_zero and interval.to_dict()["low"] is None
    assert np.isnan(Interval.from_dict(interval.to_dict()).high)
    with pytest.raises(UsageError, match="no scored positions"):
        bootstrap(make(0, 64), [first])
    with pytest.raises(UsageError, match="same blocks"):
        paired_bootstrap(make(4, 64), make(5, 64), [first])
