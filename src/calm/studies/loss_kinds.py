"""The three loss types of "Hybrid CALM-on-Z" (J. Adam 2025) on one model: energy, direction, both.

Everything else is the preset `z-tiny`. Its auxiliary cross-entropy is on in all cells: the energy alone stays at BrierLM 0 at
this size (docs/log.md). `--grid loss.auxiliary_weight=0,1` asks what it does here.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from calm.evaluate.loss_curves import LossCourse
from calm.runs import presets
from calm.runs.stages import LatentLMRun
from calm.studies.runner import Cell, cell_folder
from calm.studies.scoring import results_table
from calm.studies.study import OF_LANGUAGE_MODELS, LanguageModelStudy, Place, Request
from calm.train.run_folder import best_step

KINDS: dict[str, tuple[presets.LossKind, float]] = {
    "calm": ("calm", 0.0),
    "rf": ("rf", 1.0),
    "calm_rf": ("calm_rf", 0.1),
    "calm_rf-2": ("calm_rf", 2.0),
}
"""cell -> loss kind and weight of the direction: both published weights are there"""
PARTS = ("d_fid", "d_div", "rf_loss", "gate_mean")


def loss_kind_run(place: Place, kind: presets.LossKind, rf_weight: float) -> LatentLMRun:
    """`z-tiny` with another loss."""
    base = presets.get("z-tiny").lm
    loss = presets.loss_of_kind(kind, rf_weight, auxiliary_weight=base.loss.auxiliary_weight)
    return dataclasses.replace(base, data=place.data, autoencoder=str(place.autoencoder(4)), loss=loss)


def cells(place: Place, budget: float | None) -> list[Cell]:
    """One cell a kind."""
    return [Cell(name=name, run=loss_kind_run(place, *kind), budget=budget) for name, kind in KINDS.items()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossKindStudy:
    """A study of language models, with what the loss was made of behind its table: held-out text, at each run's end."""

    summary: str = "the energy score, the direction term, and both, under a gated head that reads latents"
    options: frozenset[str] = OF_LANGUAGE_MODELS

    def run(self, request: Request) -> dict[str, Any]:
        study = LanguageModelStudy(summary=self.summary, chunk_sizes=(4,), cells=cells)
        found = study.run(request)
        results = [result | parts_of(cell_folder(request.out, result["cell"], result["seed"])) for result in found["results"]]
        columns = {name: lambda result, name=name: result[name] for name in PARTS}
        parts = results_table(results, columns)
        return request.written(results, f"{found['summary']}\n\n{parts}\n\nvalidation text, at the checkpoint that is scored")


def parts_of(folder: Path) -> dict[str, float]:
    """Fidelity, diversity, direction and gate of a run at its best checkpoint, or its last where none was named best."""
    arrays = LossCourse.read(folder).arrays
    (place,) = np.flatnonzero(arrays["valid_step"] == best_step(folder))
    return {name: float(arrays[f"valid_{name}"][place]) for name in PARTS}
