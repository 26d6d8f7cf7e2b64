"""The segment reasoner around the backbone of a model on latents: the preset `z-tiny` with 1, 2 and 3 segments.

A reasoner steers gates, and the pattern of `z-tiny`, convolutions and Hopfield memories by turns, has none. The cells therefore
hold both letters side by side in every layer ("CH"); `by-turns` is the preset's own pattern, for comparison. At a budget more
segments see less text; `--budget` left out gives all the preset's steps, and then segments cost FLOPs instead.
"""

import dataclasses

from calm.runs import presets
from calm.studies.runner import Cell
from calm.studies.study import Place

SIDE_BY_SIDE = "CH"
CELLS = {
    "segments-1": (SIDE_BY_SIDE, 1),
    "segments-2": (SIDE_BY_SIDE, 2),
    "segments-3": (SIDE_BY_SIDE, 3),
    "by-turns": ("C,H", 1),
}
"""cell -> pattern and number of segments"""


def cells(place: Place, budget: float | None) -> list[Cell]:
    """One cell a number of segments, and the preset's own pattern."""
    base = presets.get("z-tiny").lm
    found = []
    for name, (pattern, segments) in CELLS.items():
        backbone = dataclasses.replace(base.model.backbone, pattern=pattern, num_segments=segments)
        model = dataclasses.replace(base.model, backbone=backbone)
        run = dataclasses.replace(base, data=place.data, autoencoder=str(place.autoencoder(4)), model=model)
        found.append(Cell(name=name, run=run, budget=budget))
    return found
