"""The study of regularisers: its cells, what it calls a collapse, and that a run which diverges is a result."""

import dataclasses
import json

import jax
import pytest

from calm.core.backbone import BackboneConfig
from calm.runs.stages import LatentLMRun, TokenLMRun, load_run_config
from calm.studies import catalogue as studies
from calm.studies import regularisers
from calm.studies.regularisers import RegulariserStudy, cells, collapsed, summary_of, worst_rise
from calm.studies.runner import Cell
from calm.studies.scoring import LanguageModelScore
from calm.studies.study import Request, Study
from calm.token.model import TokenLMConfig
from calm.token.objective import TokenLossConfig, TokenObjective
from calm.train.run_folder import read_records

SOUND = dict(nats_per_token=5.0, unigram_nats=6.0, effective_rank=80.0, width=256, repeated_4=0.02)


def test_the_cells_differ_in_one_thing_each_and_in_all():
    every = {cell.name: cell.run for cell in cells("data", 1e13)}
    bare = every["none"]
    assert bare.loss == TokenLossConfig() and bare.train.ema_decay == 0
    changed = {
        name: {key for key, value in vars(run.loss).items() if value != getattr(bare.loss, key)}
        | ({"ema_decay"} if run.train.ema_decay else set())
        for name, run in every.items()
    }
    assert changed == {
        "none": set(),
        "smoothing": {"label_smoothing"},
        "z-loss": {"z_weight"},
        "flow": {"flow_weight"},
        "flow-both": {"flow_weight", "flow_gradient"},
        "ema": {"ema_decay"},
        "all": {"label_smoothing", "z_weight", "flow_weight", "ema_decay"},
    }
    assert len({dataclasses.replace(run.train, ema_decay=0.0) for run in every.values()}) == 1
    assert isinstance(RegulariserStudy(), Study) and studies.get("regularisers") == RegulariserStudy()
    for run in every.values():
        model = dataclasses.replace(run.model, vocab_size=100)
        objective = TokenObjective(model, run.loss, context=run.train.num_tokens)
        assert jax.eval_shape(objective.init, jax.random.key(0))


@pytest.mark.parametrize(
    ("change", "signs"),
    [
        ({}, []),
        ({"nats_per_token": 6.0}, ["marginal"]),
        ({"effective_rank": 5.0}, ["few"]),
        ({"repeated_4": 0.6, "effective_rank": 1.0}, ["few", "loops"]),
        ({"repeated_4": None}, []),  # it wrote no four tokens
    ],
)
def test_what_counts_as_collapsed(change, signs):
    assert collapsed(SOUND | change) == signs


def test_the_worst_rise_of_a_loss():
    assert worst_rise([5.0, 4.0, 3.0]) == 0
    assert worst_rise([5.0, 3.0, 4.5, 2.0, 3.0]) == 1.5


def result(name, seed=0, **values):
    common = dict(cell=name, seed=seed, tokens=1000, protocol="text", collapsed=[], repeated_4_of_text=0.1)
    return SOUND | common | {"distinct_2_of_text": 0.9} | values


def test_the_summary_holds_cells_against_their_own_rate_and_says_when_nothing_collapsed():
    results = [
        result("none-learning_rate=0.1", 0, nats_per_token=5.0),
        result("none-learning_rate=0.1", 1, nats_per_token=5.5),
        result("none-learning_rate=0.9", 0, nats_per_token=9.0, collapsed=["marginal"]),
        result("flow-both-learning_rate=0.1", 0, nats_per_token=5.25),
        result("flow-both-learning_rate=0.1", 1, nats_per_token=5.75),
        {"cell": "flow-both-learning_rate=0.9", "seed": 0, "tokens": 1, "diverged": "x", "collapsed": ["diverged"]},
    ]
    text = summary_of("study", results)
    rows = {line.split("  ")[0]: line for line in text.splitlines() if " of " in line}
    assert "0.250 ± 0.000" in rows["flow-both-learning_rate=0.1"] and "0 of 2" in rows["flow-both-learning_rate=0.1"]
    assert "1 of 1" in rows["none-learning_rate=0.9"] and "marginal" in rows["none-learning_rate=0.9"]
    assert "diverged" in rows["flow-both-learning_rate=0.9"]
    assert "nothing to prevent" not in text
    assert "nothing to prevent" in summary_of("study", results[:2])
    assert summary_of("study", []) == "study: no cell is done yet"


def test_a_study_of_tiny_runs_is_scored_goes_on_and_keeps_what_diverged(tiny_runs, tmp_path, monkeypatch):
    latent = load_run_config(tiny_runs / "lm")
    assert isinstance(latent, LatentLMRun)
    backbone = BackboneConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=2, inner_dim=16)
    train = dataclasses.replace(latent.train, best_metric="", log_every=1)
    sound = TokenLMRun(data=latent.data, model=TokenLMConfig(backbone=backbone), train=train)
    optimizer = dataclasses.replace(train.optimizer, learning_rate=1e30, warmup_steps=0)
    wild = dataclasses.replace(sound, train=dataclasses.replace(train, optimizer=optimizer))
    flow = dataclasses.replace(sound, loss=TokenLossConfig(flow_weight=0.1), train=dataclasses.replace(train, ema_decay=0.9))
    runs = {"none": sound, "all": flow, "flow": wild}
    monkeypatch.setattr(regularisers, "cells", lambda data, budget: [Cell(name=name, run=run) for name, run in runs.items()])
    monkeypatch.setattr(regularisers, "TEXTS", 2)
    score = LanguageModelScore(split="valid", max_tokens=384, precision="float32")
    request = Request(name="regularisers", out=tmp_path, data=latent.data, score=score, say=lambda line: None)
    first = RegulariserStudy().run(request)
    by_cell = {each["cell"]: each for each in first["results"]}
    assert by_cell["flow"]["collapsed"] == ["diverged"] and "not finite" in by_cell["flow"]["diverged"]
    assert by_cell["all"]["nats_per_token"] > 0 and 1 <= by_cell["all"]["effective_rank"] <= 16
    assert by_cell["none"]["unigram_nats"] > 1 and by_cell["none"]["worst_rise"] >= 0
    records = read_records(tmp_path / "all" / "seed-0" / "metrics.jsonl")
    assert all(each["train/loss"] > each["train/cross_entropy"] + 0.01 for each in records if "train/loss" in each)
    held_out = [each for each in records if "valid/objective" in each]
    assert held_out and all(each["valid/objective"] == each["valid/cross_entropy"] for each in held_out)
    assert held_out[-1]["valid/objective"] == pytest.approx(held_out[-1]["valid/nats_per_token"], rel=0.05)
    assert (tmp_path / "regularisers.md").read_text() == first["summary"] + "\n"
    again = RegulariserStudy().run(request)  # read back, the diverged one too
    assert json.dumps(again) == json.dumps(first)
