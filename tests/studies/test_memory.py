"""Memory: every answer was shown once and only memory gives it; mixers that can, do; one that cannot stays at chance."""

import dataclasses
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
from calm import config
from calm.core.transformer import TransformerConfig
from calm.errors import UsageError
from calm.hybrid.backbone import of_pattern
from calm.hybrid.hopfield import HopfieldConfig
from calm.studies import catalogue, memory
from calm.studies.catalogue import Listing
from calm.studies.memory import (
    BACKBONES,
    TASKS,
    AssociativeRecall,
    DelayedCopy,
    Induction,
    MemoryRun,
    MemoryStudy,
    SelectiveCopy,
    asked_logits,
    most_frequent,
    questions,
    train,
)
from calm.studies.study import Request
from jaxpr_flops import matmul_flops

SMALL_TASKS = (
    DelayedCopy(symbols=3, items=2, delay=2),
    SelectiveCopy(symbols=3, items=2, spread=5),
    Induction(symbols=3, spread=6),
    AssociativeRecall(keys=4, values=3, pairs=2, spread=4),
)
EACH = pytest.mark.parametrize("task", SMALL_TASKS, ids=lambda task: task.name)


def solved(task, row):
    """Answers of one row, given all of it."""
    blank = task.symbols if hasattr(task, "symbols") else task.values + task.keys
    if isinstance(task, DelayedCopy):
        return row[: task.items]
    if isinstance(task, SelectiveCopy):
        return row[row < blank]
    if isinstance(task, Induction):
        return row[[np.flatnonzero(row == task.symbols)[0] + 1]]
    pairs = dict(zip(row[0 : 2 * task.pairs : 2], row[1 : 2 * task.pairs : 2], strict=True))
    return [pairs[token] for token in row[2 * task.pairs :] if token != blank]


@pytest.mark.parametrize("task", [*SMALL_TASKS, *TASKS.values()], ids=repr)
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
    """For every token and every set of other answers, the answer has the same distribution, uniform over the answers."""
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
    selective, recall, induction = (
        SMALL_TASKS[1].draw(500, seed=0),
        SMALL_TASKS[3].draw(500, seed=0),
        SMALL_TASKS[2].draw(500, seed=0),
    )
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
        (SMALL_TASKS[0], {"symbols": 1}, "delayed copy: symbols must be at least 2, got 1"),
        (SMALL_TASKS[0], {"delay": -1}, "delay must be at least 0"),
        (SMALL_TASKS[0], {"items": 0}, "items must be at least 1"),
        (SMALL_TASKS[1], {"items": 6}, "items=6 must not be more than spread=5"),
        (SMALL_TASKS[2], {"spread": 1}, "induction: spread must be at least 2"),
        (SMALL_TASKS[3], {"pairs": 5}, "pairs=5 must not be more than keys=4"),
        (SMALL_TASKS[3], {"spread": 1}, "spread=1 must be 0 or at least pairs=2"),
        (SMALL_TASKS[3], {"values": 1}, "values must be at least 2"),
    ],
)
def test_settings_without_a_task_are_refused(task, changes, words):
    with pytest.raises(UsageError, match=words):
        dataclasses.replace(task, **changes)


def test_a_delay_of_nothing_is_a_delay():
    task = DelayedCopy(items=3, delay=0)
    assert task.length == 6 and (task.draw(4, seed=0).counted == [[False] * 3 + [True] * 3] * 4).all()


# -- training ---------------------------------------------------------------------------------------------------------

SMALL = TransformerConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=2, inner_dim=16)


@pytest.fixture
def small_tasks(monkeypatch):
    monkeypatch.setitem(TASKS, "recall-2", AssociativeRecall(keys=3, values=3, pairs=2))
    monkeypatch.setitem(TASKS, "copy-1", DelayedCopy(symbols=2, items=1, delay=1))


def test_questions_are_the_batch_where_it_counts():
    task = TASKS["selective-16"]
    rows = questions(task, (3, 5), (7, 1))
    tokens, targets, counted = task.draw(15, seed=(7, 1))
    np.testing.assert_array_equal(rows.tokens, tokens.reshape(3, 5, -1))
    np.testing.assert_array_equal(rows.answers.reshape(-1), targets[counted])
    np.testing.assert_array_equal(rows.places.reshape(15, -1), np.nonzero(counted)[1].reshape(15, -1))


def test_the_answer_is_read_where_it_is_asked(small_tasks):
    run = MemoryRun(task="recall-2", backbone=SMALL)
    model = run.model.build(rngs=nnx.Rngs(0))
    rows = questions(run.memory_task, (4,), (0,))
    hidden, _ = model.hidden(jnp.asarray(rows.tokens)[..., None])
    every = np.asarray(model.logits(hidden))
    for row, (places, logits) in enumerate(zip(rows.places, np.asarray(asked_logits(model, rows)), strict=True)):
        np.testing.assert_allclose(logits, every[row, places], atol=1e-5)


def test_who_mixes_positions_copies_and_who_does_not_guesses(small_tasks):
    """The fast sibling of the slow test below: a symbol, a blank, and the symbol is asked for."""
    run = MemoryRun(task="copy-1", backbone=dataclasses.replace(SMALL, num_layers=1), steps=150, batch_size=16)
    able = train(run)
    assert able["accuracy"] == 1.0 and able["steps"] < 150 and able["nats_per_answer"] < 0.1
    slots = of_pattern(SMALL, "H", mixers={"H": HopfieldConfig(num_slots=4, num_heads=2)})
    unable = train(dataclasses.replace(run, backbone=slots))
    assert abs(unable["accuracy"] - unable["chance"]) < 0.08 and unable["chance"] == 0.5
    assert unable["steps"] == 150 and len(unable["curve"]) == 3


@pytest.mark.slow
def test_a_convolution_before_a_memory_of_the_context_recalls_and_slots_alone_do_not():
    able = train(MemoryRun(task="recall-4", backbone=BACKBONES["C,H-context"], steps=600))
    assert able["accuracy"] > 0.99
    unable = train(MemoryRun(task="recall-4", backbone=BACKBONES["H-slots"], steps=300))
    assert abs(unable["accuracy"] - unable["chance"]) < 0.02


def test_costs_are_those_of_the_model():
    run = MemoryRun(task="copy-16")
    model = nnx.eval_shape(lambda: run.model.build(rngs=nnx.Rngs(0)))
    rows = questions(run.memory_task, (64,), (0,))
    assert run.flops() == 3 * matmul_flops(lambda model: asked_logits(model, rows), model)
    assert run.within(10.5 * run.flops()).steps == 10 and run.within(None) is run
    with pytest.raises(UsageError, match="is too little, a step of copy-16 costs"):
        run.within(0.5 * run.flops())


@pytest.mark.parametrize("name", BACKBONES)
def test_every_cell_can_be_written_and_read(name, tmp_path):
    run = MemoryRun(backbone=BACKBONES[name])
    (tmp_path / "config.toml").write_text(config.to_toml(run))
    assert config.load(MemoryRun, [tmp_path / "config.toml"]) == run


def test_the_study_runs_each_cell_once_for_each_seed(small_tasks, tmp_path, monkeypatch):
    monkeypatch.setitem(BACKBONES, "A", SMALL)
    base = MemoryRun(steps=3, batch_size=2)
    study = MemoryStudy(backbones=("A", "H-slots"), tasks=("recall-2",), base=base)
    monkeypatch.setitem(catalogue.STUDIES, "memory", Listing("", lambda: study))
    words = ["experiment", "memory", "--out", str(tmp_path), "--seeds", "0", "1", "--only", "recall-2-A*"]
    result = tiny.run(*words)
    assert [(found["cell"], found["seed"], found["steps"]) for found in result["results"]] == [
        ("recall-2-A", s, 3) for s in (0, 1)
    ]
    assert result["results"][0]["accuracy"] != result["results"][1]["accuracy"]
    assert "| A " in result["summary"] and "0.333" in result["summary"]
    monkeypatch.setattr(memory, "train", lambda run: pytest.fail("a cell was run twice"))
    assert json.dumps(tiny.run(*words)["results"]) == json.dumps(result["results"])
    code, answer, _ = tiny.calm(*words, "--budget", "1e12")
    assert code == 2 and "was run with other settings" in answer["error"]
    code, answer, _ = tiny.calm(*words, "--data", "x")
    assert code == 2 and "memory: has no use for --data" in answer["error"]


def test_a_grid_varies_any_setting(small_tasks, tmp_path):
    study = MemoryStudy(backbones=("A",), tasks=("recall-2",))
    request = Request(name="memory", out=tmp_path, axes={"backbone.num_layers": ["1", "2"], "steps": ["7"]})
    cells = study.cells(request)
    assert list(cells) == ["recall-2-A-num_layers=1-steps=7", "recall-2-A-num_layers=2-steps=7"]
    assert [(run.backbone.num_layers, run.steps) for run in cells.values()] == [(1, 7), (2, 7)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "recal-4"}, "unknown task 'recal-4' .did you mean 'recall-4'"),
        ({"steps": 0}, "steps and batch_size must be at least 1"),
    ],
)
def test_runs_that_cannot_be_are_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        MemoryRun(**changes)
