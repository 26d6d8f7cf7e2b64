"""The study of hybrids: models of one size, bytes of their states, and the report."""

import dataclasses
from pathlib import Path

import pytest

from calm.core.latent_lm import LatentLMConfig
from calm.core.transformer import TransformerConfig
from calm.errors import UsageError
from calm.hybrid.backbone import of_pattern
from calm.runs.stages import LatentLMRun, load_run_config
from calm.studies import hybrids
from calm.studies.hybrids import HybridStudy, cells, equal_size, state_bytes, with_backbone
from calm.studies.runner import autoencoder_flops, sized
from calm.studies.scoring import LanguageModelScore
from calm.studies.study import Place, Request

BACKBONE = TransformerConfig(dim=64, num_layers=2, inner_dim=172)
MODEL = LatentLMConfig(vocab_size=300, chunk_size=4, latent_dim=8, backbone=BACKBONE)


@pytest.mark.parametrize("pattern", ["A", "H", "SHA", "C,H"])
def test_a_pattern_of_equal_size_is_as_large_within_three_per_cent(pattern):
    found = equal_size(MODEL, pattern)
    weights = dataclasses.replace(MODEL, backbone=found).parameters()
    assert weights == pytest.approx(MODEL.parameters(), rel=0.03)
    assert found.pattern == pattern and found.dim % (2 * found.num_heads) == 0
    if pattern == "A":
        assert found == BACKBONE
    if pattern == "SHA":
        assert found.dim < BACKBONE.dim


def test_a_size_that_no_width_has_is_refused(monkeypatch):
    monkeypatch.setattr(hybrids, "NEAR", -1.0)
    with pytest.raises(UsageError, match="pattern 'SHA': no width gives [0-9,]+ weights; the nearest, "):
        equal_size(MODEL, "SHA")


def test_states_are_counted_in_bytes():
    def size(pattern, context):
        return state_bytes(of_pattern(BACKBONE, pattern), context)

    assert size("A", 16) == 2 * 2 * 64 * 16 * 4  # layers, keys and values, D, context, float32
    assert size("A", 32) == 2 * size("A", 16) and size("S", 32) == size("S", 16) > 0
    assert size("SA", 16) == size("S", 16) + size("A", 16)


@pytest.fixture
def recipe(tiny_runs):
    run = load_run_config(tiny_runs / "lm")
    assert isinstance(run, LatentLMRun)
    run = with_backbone(run, num_layers=2)
    return lambda place, chunk_size: dataclasses.replace(run, train=dataclasses.replace(run.train, best_metric=""))


def test_the_cells_are_of_one_budget_and_of_one_size(recipe):
    base = recipe(None, 4)
    budget = autoencoder_flops(base) + 1e10
    every = {cell.name: cell for cell in cells(Place("data", Path("out")), budget, recipe)}
    assert list(every) == ["A", "S", "H", "SH", "SHA", "C,H", "S-size", "H-size", "SH-size", "SHA-size", "C,H-size"]
    steps = sized(every["A"].run, budget).train.steps
    for name, cell in every.items():
        assert isinstance(cell.run, LatentLMRun) and cell.run.model.backbone.pattern == name.removesuffix("-size")
        if name.endswith("-size"):
            assert cell.budget is None and cell.run.train.steps == steps
        else:
            assert cell.budget == budget and cell.run == with_backbone(base, pattern=name)


@pytest.mark.slow
def test_a_study_of_tiny_runs_says_what_each_costs(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(HybridStudy, "autoencoders", lambda self, place: [])
    monkeypatch.setattr(hybrids, "context_decoder_run", recipe)
    score = LanguageModelScore(split="valid", max_tokens=384, precision="float32", bound_samples=0)
    request = Request(
        name="hybrids", out=tmp_path, data=recipe(None, 4).data, only=("A", "SHA-size"), score=score, log=lambda line: None
    )
    found = HybridStudy().run(request)
    first, other = found["results"]
    assert first["trained_tokens_per_second"] > 0 and first["state_bytes"] != other["state_bytes"]
    assert other["parameters"] == pytest.approx(first["parameters"], rel=0.03)
    assert "state, bytes" in found["summary"] and "BrierLM" in found["summary"]
    assert (tmp_path / "hybrids.md").read_text() == found["summary"] + "\n"
    assert HybridStudy().run(request) == found
