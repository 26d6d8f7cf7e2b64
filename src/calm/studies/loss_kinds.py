"""The three loss types of "Hybrid CALM-on-Z" (J. Adam 2025) on one model: energy, direction, both.

Everything else is the preset `z-tiny`. All cells keep its auxiliary cross-entropy, without which the energy stays at
BrierLM 0 at this size (docs/log.md); `--grid loss.terms.auxiliary.weight=0,1` measures its effect.
"""

import dataclasses
import operator
from pathlib import Path
from typing import Any

import numpy as np

from calm.evaluate.loss_curves import LossCurves
from calm.runs import presets
from calm.runs.stages import LatentLMRun
from calm.studies.runner import Cell, cell_folder
from calm.studies.scoring import results_table
from calm.studies.study import LanguageModelStudy, Place, Request
from calm.train.run_folder import best_step

KINDS: dict[str, tuple[presets.LossKind, float]] = {
    "calm": ("calm", 0.0),
    "rf": ("rf", 1.0),
    "calm_rf": ("calm_rf", 0.1),
    "calm_rf-2": ("calm_rf", 2.0),
}
"""cell -> loss kind and weight of the direction term, with both published weights"""
PARTS = ("d_fid", "d_div", "rf_loss", "gate_mean")


def loss_kind_run(place: Place, kind: presets.LossKind, rf_weight: float) -> LatentLMRun:
    """`z-tiny` with another loss."""
    base = presets.get("z-tiny").lm
    loss = presets.loss_of_kind(kind, rf_weight, base.loss.terms["auxiliary"])
    return dataclasses.replace(base, data=place.data, autoencoder=str(place.autoencoder(4)), loss=loss)


class LossKindStudy(LanguageModelStudy):
    """One cell a kind of loss, with the parts of the loss on held-out text at each run's best checkpoint."""

    def cells(self, place: Place, budget: float | None) -> list[Cell]:
        return [Cell(name=name, run=loss_kind_run(place, *kind), budget=budget) for name, kind in KINDS.items()]

    def run(self, request: Request) -> dict[str, Any]:
        found = super().run(request)
        results = [result | parts_of(cell_folder(request.out, result["cell"], result["seed"])) for result in found["results"]]
        parts = results_table(results, {name: operator.itemgetter(name) for name in PARTS})
        return request.written(results, f"{found['summary']}\n\n{parts}\n\nvalidation text, at the checkpoint that is scored")


def parts_of(folder: Path) -> dict[str, float]:
    """Fidelity, diversity, direction and gate of a run at its best checkpoint, or at its last if none is marked best."""
    arrays = LossCurves.read(folder).arrays
    (place,) = np.flatnonzero(arrays["valid_step"] == best_step(folder))
    return {name: float(arrays[f"valid_{name}"][place]) for name in PARTS}
