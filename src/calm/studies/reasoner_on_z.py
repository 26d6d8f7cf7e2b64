"""The segment reasoner around the backbone of a model on latents: the preset `z-tiny` with 1, 2 and 3 segments.

A reasoner steers gates, and the pattern of `z-tiny`, which alternates convolutions and Hopfield memories, has none. So the
cells have both letters side by side in every layer ("CH"); `by-turns` is the preset's own pattern, for comparison. At a
budget more segments see less text; without `--budget` all take the preset's steps, and segments cost FLOPs instead.
"""

import dataclasses

from calm.hybrid.backbone import of_pattern
from calm.runs import presets
from calm.studies.runner import Cell
from calm.studies.study import LanguageModelStudy, Place

CELLS = {"segments-1": ("CH", 1), "segments-2": ("CH", 2), "segments-3": ("CH", 3), "by-turns": ("C,H", 1)}
"""cell -> pattern and number of segments"""


class ReasonerStudy(LanguageModelStudy):
    """One cell a number of segments, and the preset's own pattern."""

    def cells(self, place: Place, budget: float | None) -> list[Cell]:
        base = presets.get("z-tiny").lm
        found = []
        for name, (pattern, segments) in CELLS.items():
            backbone = of_pattern(base.model.backbone, pattern, num_segments=segments)
            model = dataclasses.replace(base.model, backbone=backbone)
            run = dataclasses.replace(base, data=place.data, autoencoder=str(place.autoencoder(4)), model=model)
            found.append(Cell(name=name, run=run, budget=budget))
        return found
