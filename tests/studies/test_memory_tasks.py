"""Tasks of memory: what is asked was shown, only once, and nothing but memory tells it."""

import dataclasses
import itertools

import numpy as np
import pytest

from calm.errors import UsageError
from calm.studies.memory_tasks import PRESETS, AssociativeRecall, DelayedCopy, Induction, SelectiveCopy, most_frequent

SMALL = (
    DelayedCopy(symbols=3, items=2, delay=2),
    SelectiveCopy(symbols=3, items=2, spread=5),
    Induction(symbols=3, spread=6),
    AssociativeRecall(keys=4, values=3, pairs=2, spread=4),
)
EACH = pytest.mark.parametrize("task", SMALL, ids=lambda task: task.name)


def solved(task, row):
    """The answers of one row, by somebody who remembers all of it."""
    blank = task.symbols if hasattr(task, "symbols") else task.values + task.keys
    if isinstance(task, DelayedCopy):
        return row[: task.items]
    if isinstance(task, SelectiveCopy):
        return row[row < blank]
    if isinstance(task, Induction):
        return row[[np.flatnonzero(row == task.symbols)[0] + 1]]
    pairs = dict(zip(row[0 : 2 * task.pairs : 2], row[1 : 2 * task.pairs : 2], strict=True))
    return [pairs[token] for token in row[2 * task.pairs :] if token != blank]


@pytest.mark.parametrize("task", [*SMALL, *PRESETS.values()], ids=repr)
def test_whoever_remembers_all_of_it_knows_the_answers(task):
    batch = task.draw(50, seed=1)
    assert batch.tokens.shape == (50, task.length) and batch.tokens.min() >= 0 and batch.tokens.max() < task.vocab_size
    for tokens, targets, counted in zip(*batch, strict=True):
        np.testing.assert_array_equal(targets[counted], solved(task, tokens))
        assert (targets[~counted] == 0).all()
    assert (batch.counted.sum(-1) == batch.counted[0].sum()).all() and (batch.targets < task.answers).all()


@EACH
def test_a_seed_is_a_batch(task):
    first, again, other = (task.draw(20, seed=seed).tokens for seed in ((1, 2), (1, 2), (1, 3)))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@EACH
def test_chance_is_what_the_present_token_and_the_other_answers_leave(task):
    """For every token and every set of other answers, the answer has the same law: uniform over the answers."""
    tokens, targets, counted = task.draw(40_000, seed=3)
    asked = counted.sum(-1)[0]
    tokens, targets = tokens[counted].reshape(-1, asked), targets[counted].reshape(-1, asked)
    for column in range(asked):
        others = [targets[:, other] for other in range(asked) if other != column]
        known = np.stack([tokens[:, column], *others], -1)
        for value in np.unique(known, axis=0):
            answers = targets[(known == value).all(-1), column]
            shares = np.bincount(answers, minlength=task.answers) / len(answers)
            assert len(shares) == task.answers
            np.testing.assert_allclose(shares, task.chance, atol=6 * (task.chance / len(answers)) ** 0.5)


@EACH
def test_who_kept_what_was_shown_but_not_where_has_the_unordered_level(task):
    tokens, targets, counted = task.draw(20_000, seed=5)
    before = np.where(tokens[:, : task.length - 1] < task.answers, tokens[:, : task.length - 1], task.answers)
    counts = np.stack([(before == symbol).sum(-1) for symbol in range(task.answers)], -1)
    assert (counts.sum(-1) == task.shown).all()
    right = (targets == counts.argmax(-1)[:, None])[counted].reshape(len(tokens), -1).mean(-1)
    assert abs(right.mean() - task.unordered) < 4 * right.std() / len(right) ** 0.5
    assert task.chance < task.unordered < 1


@pytest.mark.parametrize(("draws", "symbols"), [(1, 5), (3, 2), (4, 3), (5, 3)])
def test_the_most_frequent_symbol_by_counting(draws, symbols):
    every = itertools.product(range(symbols), repeat=draws)
    expected = np.mean([np.bincount(row).max() for row in every])
    np.testing.assert_allclose(most_frequent(draws, symbols), expected, rtol=1e-12)


def test_items_and_queries_stand_everywhere():
    selective, recall, induction = SMALL[1].draw(500, seed=0), SMALL[3].draw(500, seed=0), SMALL[2].draw(500, seed=0)
    assert ((selective.tokens[:, :5] < 3).mean(0) > 0.2).all()
    assert (recall.counted[:, 4:].mean(0) > 0.3).all() and not recall.counted[:, :4].any()
    signs = (induction.tokens == 3)[:, :-1]
    assert (signs.sum(-1) == 1).all() and (signs[:, :5].mean(0) > 0.1).all() and not signs[:, 5].any()


def test_no_key_is_asked_twice():
    tokens, _, counted = AssociativeRecall(keys=6, values=3, pairs=4).draw(200, seed=0)
    assert (tokens[:, 8:] < 9).all()  # no room for blanks
    for row, asked in zip(tokens, counted, strict=True):
        assert sorted(row[asked]) == sorted(row[0:8:2]) and len(set(row[asked])) == 4


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        (SMALL[0], {"symbols": 1}, "delayed copy: symbols must be at least 2, got 1"),
        (SMALL[0], {"delay": -1}, "delay must be at least 0"),
        (SMALL[0], {"items": 0}, "items must be at least 1"),
        (SMALL[1], {"items": 6}, "items=6 must not be more than spread=5"),
        (SMALL[2], {"spread": 1}, "induction: spread must be at least 2"),
        (SMALL[3], {"pairs": 5}, "pairs=5 must not be more than keys=4"),
        (SMALL[3], {"spread": 1}, "spread=1 must be 0 or at least pairs=2"),
        (SMALL[3], {"values": 1}, "values must be at least 2"),
    ],
)
def test_settings_without_a_task_are_refused(task, changes, words):
    with pytest.raises(UsageError, match=words):
        dataclasses.replace(task, **changes)


def test_a_delay_of_nothing_is_a_delay():
    task = DelayedCopy(items=3, delay=0)
    assert task.length == 6 and (task.draw(4, seed=0).counted == [[False] * 3 + [True] * 3] * 4).all()
