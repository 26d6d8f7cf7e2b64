"""The study of memory: mixers that can, do; a mixer that cannot stays at chance; cells are done once."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
from calm import config
from calm.core.backbone import BackboneConfig
from calm.errors import UsageError
from calm.studies import catalogue as studies
from calm.studies import memory
from calm.studies.memory import BACKBONES, MemoryRun, MemoryStudy, asked_logits, questions, train
from calm.studies.memory_tasks import PRESETS, AssociativeRecall, DelayedCopy
from calm.studies.study import Request
from jaxpr_flops import matmul_flops

SMALL = BackboneConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=2, inner_dim=16)


@pytest.fixture
def small_tasks(monkeypatch):
    monkeypatch.setitem(PRESETS, "recall-2", AssociativeRecall(keys=3, values=3, pairs=2))
    monkeypatch.setitem(PRESETS, "copy-1", DelayedCopy(symbols=2, items=1, delay=1))


def test_questions_are_the_batch_where_it_counts():
    task = PRESETS["selective-16"]
    rows = questions(task, (3, 5), (7, 1))
    tokens, targets, counted = task.draw(15, seed=(7, 1))
    np.testing.assert_array_equal(rows.tokens, tokens.reshape(3, 5, -1))
    np.testing.assert_array_equal(rows.answers.reshape(-1), targets[counted])
    np.testing.assert_array_equal(rows.places.reshape(15, -1), np.nonzero(counted)[1].reshape(15, -1))


def test_the_answer_is_read_where_it_is_asked(small_tasks):
    run = MemoryRun(task="recall-2", backbone=SMALL)
    model = run.model.build(rngs=nnx.Rngs(0))
    rows = questions(run.rows, (4,), (0,))
    hidden, _ = model.hidden(jnp.asarray(rows.tokens)[..., None])
    every = np.asarray(model.logits(hidden))
    for row, (places, logits) in enumerate(zip(rows.places, np.asarray(asked_logits(model, rows)), strict=True)):
        np.testing.assert_allclose(logits, every[row, places], atol=1e-5)


def test_who_mixes_positions_copies_and_who_does_not_guesses(small_tasks):
    """The fast sibling of the slow test below: a symbol, a blank, and the symbol is asked for."""
    run = MemoryRun(task="copy-1", backbone=dataclasses.replace(SMALL, num_layers=1), steps=150, batch_size=16)
    able = train(run)
    assert able["accuracy"] == 1.0 and able["steps"] < 150 and able["nats_per_answer"] < 0.1
    slots = dataclasses.replace(SMALL, pattern="H", hopfield=dataclasses.replace(SMALL.hopfield, num_slots=4, num_heads=2))
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
    rows = questions(run.rows, (64,), (0,))
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
    monkeypatch.setitem(studies.STUDIES, "memory", MemoryStudy(backbones=("A", "H-slots"), tasks=("recall-2",), base=base))
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
