"""The ablation: what each masking is, that both kinds of table say which they are, and that the study goes on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.backbone import BackboneConfig
from calm.errors import UsageError
from calm.hybrid.taps import tapped
from calm.runs.stages import LatentLMRun, TokenLMRun, load_run_config
from calm.studies import catalogue as studies
from calm.studies import path_ablation
from calm.studies.ablation_report import ablation_csv, draw_ablation
from calm.studies.path_ablation import FULL, RETRAINED, AblationStudy, cells, first_segments, maskings, summary_of
from calm.studies.runner import Cell
from calm.studies.scoring import LanguageModelScore
from calm.studies.study import Request, Study
from calm.token.likelihood import token_likelihood
from calm.token.model import TokenLM, TokenLMConfig

LENGTH = 8
BACKBONE = BackboneConfig(dim=16, num_layers=1, pattern="SHA", num_heads=2, num_kv_heads=2, inner_dim=16, num_segments=3)


@pytest.fixture(scope="module")
def lm() -> TokenLM:
    model = build()
    out = model.backbone.controller.out  # a new controller gives no bias
    out.kernel[...] = 3.0 * jax.random.normal(jax.random.key(1), out.kernel[...].shape)
    return model


@pytest.fixture(scope="module")
def blocks() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 20, (3, LENGTH + 1)).astype(np.int32)


def nats(lm: TokenLM, blocks: np.ndarray) -> float:
    return float(token_likelihood(lm, blocks, np.arange(len(blocks))).means[0])


def build(**settings) -> TokenLM:
    return TokenLMConfig(vocab_size=20, backbone=dataclasses.replace(BACKBONE, **settings)).build(rngs=nnx.Rngs(0))


def test_a_masked_model_is_one_whose_gate_is_forced(blocks):
    lm = build(num_segments=1)
    masked = maskings(lm, LENGTH)
    forced = tapped(lm, lambda name, layer, value: value * 0 + jnp.eye(3)[1] if name == "gate" else value)
    found = nats(masked["only H, shares scaled to 1"], blocks)
    assert found == pytest.approx(nats(forced, blocks), abs=1e-5) and abs(found - nats(lm, blocks)) > 1e-3
    thinned = tapped(lm, lambda name, layer, value: value * jnp.array([1, 0, 1]) if name == "gate" else value)
    assert nats(masked["only SA"], blocks) == pytest.approx(nats(thinned, blocks), abs=1e-5)


def test_a_controller_that_says_nothing_leaves_the_first_segment(lm, blocks):
    masked = maskings(lm, LENGTH)
    first = nats(masked["segment 1"], blocks)
    assert nats(masked["controller none"], blocks) == pytest.approx(first, abs=1e-5)
    assert nats(masked["segment 3"], blocks) == nats(lm, blocks) and abs(nats(lm, blocks) - first) > 1e-3
    assert nats(build(num_segments=1), blocks) == pytest.approx(first, abs=1e-5)  # of the same seed, so of the same weights
    for number in (0, 4):
        with pytest.raises(UsageError, match=f"the model has 3, asked for the first {number}"):
            first_segments(lm, number)


def test_the_maskings_are_those_of_the_description(lm, blocks):
    masked = maskings(lm, LENGTH)
    assert {name for name in masked if "scaled" not in name} == set(path_ablation.DESCRIBED)
    assert lm.backbone.tap is None and lm.backbone.config.num_segments == 3  # copies
    assert not [name for name in maskings(build(num_segments=1), LENGTH) if name.startswith(("segment", "controller"))]
    assert abs(nats(masked["shuffled input of A"], blocks) - nats(lm, blocks)) > 1e-4


def test_the_cells_differ_in_pattern_and_segments():
    every = {cell.name: cell.run for cell in cells("data", 1e13) if isinstance(cell.run, TokenLMRun)}
    assert {name: (run.model.backbone.pattern, run.model.backbone.num_segments) for name, run in every.items()} == RETRAINED
    assert {run.model.backbone.pattern for run in every.values()} == {"S", "H", "A", "SH", "SA", "HA", "SHA"}
    assert len({dataclasses.replace(run.model, backbone=BACKBONE) for run in every.values()}) == 1
    assert len({run.train for run in every.values()}) == 1
    assert isinstance(AblationStudy(), Study) and studies.get("ablation") == AblationStudy()


def test_the_two_kinds_are_told_apart(tmp_path):
    common = dict(protocol="text", unigram_nats=6.0, tokens=1e6)
    results = [
        {"cell": FULL, "seed": 0, "nats_per_token": 4.0, "masked": {"full": 4.0, "only S": 9.0}, **common},
        {"cell": FULL, "seed": 1, "nats_per_token": 4.5, "masked": {"full": 4.5, "only S": 9.5}, **common},
        {"cell": "S", "seed": 0, "nats_per_token": 4.25, "masked": {}, **common},
    ]
    text = summary_of("ablation", results)
    retrained, masked = text.split("MASKED AT INFERENCE")
    assert "RETRAINED" in retrained and "4.250" in retrained and "9.81" not in retrained
    row = next(line for line in masked.splitlines() if line.startswith("only S"))
    assert "9.250" in row and "5.000 ± 0.000" in row and row.endswith("9.81")
    assert summary_of("ablation", []) == "ablation: no cell is done yet"
    rows = ablation_csv(results).splitlines()
    assert rows[0] == "kind,cell,masked,seed,nats" and len(rows) == 1 + 3 + 4
    assert "retrained,S,,0,4.250000" in rows and "masked at inference,SHA-3,only S,1,9.500000" in rows
    draw_ablation(results, FULL, path_ablation.DESCRIBED, tmp_path / "ablation.png")
    assert (tmp_path / "ablation.png").stat().st_size > 5000


@pytest.fixture(scope="module")
def tiny_cells(tiny_runs):
    latent = load_run_config(tiny_runs / "lm")
    assert isinstance(latent, LatentLMRun)
    train = dataclasses.replace(latent.train, best_metric="", log_every=1)
    made = {}
    for name, (pattern, segments) in {FULL: ("SHA", 3), "A": ("A", 1)}.items():
        backbone = dataclasses.replace(BACKBONE, pattern=pattern, num_segments=segments, num_layers=1)
        made[name] = TokenLMRun(data=latent.data, model=TokenLMConfig(backbone=backbone), train=train)
    return [Cell(name=name, run=run) for name, run in made.items()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_of_tiny_runs_has_both_kinds_and_is_read_back(tiny_cells, tmp_path, monkeypatch):
    monkeypatch.setattr(path_ablation, "cells", lambda data, budget: tiny_cells)
    score = LanguageModelScore(split="valid", max_tokens=384, precision="float32")
    request = Request(name="ablation", out=tmp_path, data=tiny_cells[0].run.data, score=score, say=lambda line: None)
    first = AblationStudy().run(request)
    by_cell = {each["cell"]: each for each in first["results"]}
    assert set(by_cell[FULL]["masked"]) >= set(path_ablation.DESCRIBED) and by_cell["A"]["masked"] == {}
    assert by_cell[FULL]["masked"]["full"] == by_cell[FULL]["nats_per_token"] > 0
    assert (tmp_path / "ablation.md").read_text() == first["summary"] + "\n"
    assert (tmp_path / "results.csv").read_text() == ablation_csv(first["results"])
    assert AblationStudy().run(request) == first
