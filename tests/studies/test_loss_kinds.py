"""The study of loss kinds: its cells differ in two weights, and its report has the parts of the loss."""

import dataclasses
import json
from pathlib import Path

import pytest

from calm import config
from calm.evaluate.loss_curves import LossCurves
from calm.hybrid.hopfield import HopfieldConfig
from calm.runs import presets
from calm.studies import loss_kinds
from calm.studies.loss_kinds import LossKindStudy
from calm.studies.runner import Cell
from calm.studies.scoring import LanguageModelScore
from calm.studies.study import Place, Request


def test_the_cells_are_one_model_under_four_losses():
    place = Place("data", Path("out"))
    cells = LossKindStudy().cells(place, 1e12)
    assert [cell.name for cell in cells] == ["calm", "rf", "calm_rf", "calm_rf-2"]
    weights = [(cell.run.loss.weight("energy"), cell.run.loss.weight("direction")) for cell in cells]
    assert weights == [(1.0, 0.0), (0.0, 1.0), (1.0, 0.1), (1.0, 2.0)]
    blank = [dataclasses.replace(cell.run, loss=cells[0].run.loss) for cell in cells]
    assert blank == [blank[0]] * 4 and all(cell.budget == 1e12 for cell in cells)


@pytest.mark.parametrize(
    ("name", "chunks", "weight", "gate"),
    [("calm-on-z", 64, 0.1, "dimension"), ("calm-seal", 128, 2.0, "dynamic"), ("z-tiny", 64, 0.1, "dynamic")],
)
def test_the_presets_have_the_numbers_of_the_descriptions(name, chunks, weight, gate):
    preset = presets.get(name)
    lm, backbone = preset.lm, preset.lm.model.backbone
    assert preset.autoencoder.model.chunk_size == 4 and lm.train.num_tokens == 4 * chunks and lm.train.batch_size == 8
    assert (backbone.pattern, backbone.mixers["C"].kernel, backbone.mixers["H"].num_slots) == ("C,H", 7, 64)
    assert lm.model.stem == "continuous" and lm.model.head.gate == gate and lm.loss.weight("direction") == weight
    if name != "z-tiny":
        assert (preset.autoencoder.train.steps, lm.train.steps, lm.train.precision) == (2000, 4000, "bfloat16")
        assert lm.loss.weight("auxiliary") == 0 and preset.autoencoder.train.batch_size == 8
    assert config.from_dict(type(lm), config.to_dict(lm)) == lm  # a run's file reproduces it
    model = dataclasses.replace(lm.model, vocab_size=4096, chunk_size=4, latent_dim=preset.autoencoder.model.latent_dim)
    assert model.parameters() == {"calm-on-z": 26842400, "calm-seal": 26907936, "z-tiny": 3566472}[name]


def test_parts_are_read_at_the_best_checkpoint(tmp_path):
    for step in (2, 4, 6):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    rows = [
        {"step": step, **{f"valid/{name}": float(step) for name in ("fidelity", "diversity", "direction", "gate_mean")}}
        for step in (2, 4, 6)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert loss_kinds.parts_of(tmp_path) == dict.fromkeys(loss_kinds.PARTS, 6.0)
    (tmp_path / "best.json").write_text('{"step": 4}')
    assert loss_kinds.parts_of(tmp_path) == dict.fromkeys(loss_kinds.PARTS, 4.0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_table_has_the_parts_at_the_checkpoint_that_is_scored(tiny_runs, tmp_path, monkeypatch):
    """One cell of it, trained for a few steps at the smallest size."""
    every = LossKindStudy.cells

    def small(self, place: Place, budget: float | None) -> list[Cell]:
        (cell,) = [cell for cell in every(self, place, budget) if cell.name == "rf"]
        run = cell.run
        backbone = dataclasses.replace(
            run.model.backbone,
            dim=16,
            num_layers=2,
            num_heads=2,
            num_kv_heads=2,
            inner_dim=16,
            mixers=run.model.backbone.mixers | {"H": HopfieldConfig(num_slots=4, num_heads=2)},
        )
        train = dataclasses.replace(
            run.train, steps=4, batch_size=2, num_tokens=192, evaluate_every=2, sample_every=0, precision="float32"
        )
        model = dataclasses.replace(run.model, backbone=backbone)
        loss = dataclasses.replace(run.loss, num_samples=2)
        return [dataclasses.replace(cell, run=dataclasses.replace(run, model=model, train=train, loss=loss))]

    monkeypatch.setattr(LossKindStudy, "autoencoders", lambda self, place: [])
    monkeypatch.setattr(LossKindStudy, "cells", small)
    monkeypatch.setattr(Place, "autoencoder", lambda self, chunk_size: tiny_runs / "autoencoder")
    score = LanguageModelScore(precision="float32", split="valid", max_tokens=384, bound_samples=0)
    request = Request(name="losses", out=tmp_path, data=str(tiny_runs / "data"), score=score)
    found = LossKindStudy().run(request)
    (result,) = found["results"]
    folder = tmp_path / "rf" / "seed-0"
    best = json.loads((folder / "best.json").read_text())["step"]
    arrays = LossCurves.read(folder).arrays
    at = list(arrays["valid_step"]).index(best)
    assert result["rf_loss"] == arrays["valid_rf_loss"][at] and result["d_fid"] == arrays["valid_d_fid"][at]
    assert 0 < result["gate_mean"] < 1 and "gate_mean" in (tmp_path / "losses.md").read_text()
    assert "brier_lm" in result
