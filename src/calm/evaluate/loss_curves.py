"""What a run's loss was made of, step by step: fidelity and diversity, direction, gate; a table, a picture, a file of arrays.

The file's names are those of J. Adam's descriptions (2025), which keep such a file for every run. Over training steps, a mean
over the steps since the record before:

    step, loss, d_fid, d_div, rf_loss, gate_mean                             [records]

and, of held-out text, at every evaluation:

    valid_step, valid_loss, valid_d_fid, valid_d_div, valid_rf_loss, valid_gate_mean    [evaluations]
    fidelity_per_step     [evaluations positions]    d_fid at each place of a row; position i has read i + 1 chunks
    gate_histogram        [evaluations bins]         shares of the gate's values between gate_edges [bins + 1]

rf_loss is 1 - cos (`calm.heads.direction`). What a run does not have is left out.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calm.errors import UsageError
from calm.evaluate.plots import COLOURS, _figure, _tidy, read_rows
from calm.evaluate.tables import table

NUMBERS = {
    "loss": ("loss", "objective"),
    "d_fid": ("fidelity", "fidelity"),
    "d_div": ("diversity", "diversity"),
    "rf_loss": ("direction", "direction"),
    "gate_mean": ("gate_mean", "gate_mean"),
}
"""their name -> ours in training and in validation"""
CURVES = {"fidelity_per_step": "fidelity_at", "gate_histogram": "gate_histogram"}
TITLES = {
    "loss": "loss",
    "d_fid": "fidelity E|x - y|",
    "d_div": "diversity E|x - x'|",
    "rf_loss": "direction 1 - cos",
    "gate_mean": "gate, mean",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossCourse:
    """The arrays of the module's docstring, by name."""

    name: str
    arrays: dict[str, np.ndarray]

    @classmethod
    def read(cls, run: str | Path) -> "LossCourse":
        """From the metrics.jsonl of a run folder.

        Raises:
            UsageError: no such file, or a run without energy or direction term.
        """
        path = Path(run) / "metrics.jsonl"
        rows = read_rows(path)
        arrays: dict[str, Any] = {}
        for prefix, at, place in (("", "train", 0), ("valid_", "valid", 1)):
            names = {theirs: f"{at}/{ours[place]}" for theirs, ours in NUMBERS.items()}
            rows_here = [row for row in rows if f"{at}/fidelity" in row]
            if not rows_here:
                continue
            arrays[f"{prefix}step"] = np.array([row["step"] for row in rows_here], np.int64)
            arrays |= {f"{prefix}{theirs}": _column(rows_here, ours) for theirs, ours in names.items()}
            if at == "valid":
                arrays |= {theirs: _column(rows_here, f"valid/{ours}") for theirs, ours in CURVES.items()}
        arrays = {name: array for name, array in arrays.items() if array is not None}
        if not arrays:
            raise UsageError(
                f"{path}: holds no fidelity; name a language model's run with loss.energy_weight or direction_weight"
            )
        if "gate_histogram" in arrays:
            arrays["gate_edges"] = np.linspace(0, 1, arrays["gate_histogram"].shape[1] + 1)
        return cls(name=Path(run).name, arrays=arrays)

    def save(self, path: str | Path) -> None:
        """Writes the arrays as .npz, which `numpy.load` reads without pickle."""
        arrays: dict[str, Any] = dict(self.arrays)
        np.savez_compressed(path, **arrays)

    def table(self) -> str:
        """First and last value of every number in training, and the last on held-out text."""
        rows = []
        for name, title in TITLES.items():
            if name in self.arrays:
                train, valid = self.arrays[name], self.arrays.get(f"valid_{name}")
                rows.append([title, *(f"{x:.4g}" for x in (train[0], train[-1])), "-" if valid is None else f"{valid[-1]:.4g}"])
        return table([self.name, "first", "last", "held out"], rows)

    def to_dict(self) -> dict[str, Any]:
        """The last value of everything, and how many there are."""
        return {name: {"shape": list(array.shape), "last": array[-1].tolist()} for name, array in self.arrays.items()}

    def plot(self, out: str | Path) -> None:
        """A panel for each number over steps, training as a line and held-out text as points, and one for each curve."""
        panels = [name for name in TITLES if name in self.arrays] + [name for name in CURVES if name in self.arrays]
        rows = -(-len(panels) // 3)
        figure = _figure(10.8, 2.7 * rows)
        grid = figure.subplots(rows, 3, squeeze=False)
        for axes, name in zip(grid.flat, panels, strict=False):
            if name == "gate_histogram":
                steps = np.arange(len(self.arrays["valid_step"]) + 1)
                axes.pcolormesh(steps, self.arrays["gate_edges"], self.arrays[name].T, cmap="Blues", vmin=0)
                ticks = steps[:-1][:: max(1, len(steps) // 5)]
                axes.set_xticks(ticks + 0.5, [str(self.arrays["valid_step"][tick]) for tick in ticks])
                _tidy(axes, "gate, shares of its values", "step", "")
            elif name == "fidelity_per_step":
                for place, colour in dict.fromkeys([(0, COLOURS[5]), (len(self.arrays[name]) - 1, COLOURS[0])]):
                    step = self.arrays["valid_step"][place]
                    values = self.arrays[name][place]
                    axes.plot(np.arange(1, len(values) + 1), values, color=colour, linewidth=1.2, label=f"step {step}")
                axes.legend(fontsize=7, frameon=False)
                _tidy(axes, "fidelity by position, held out", "chunks read before", "")
            else:
                axes.plot(self.arrays["step"], self.arrays[name], color=COLOURS[0], linewidth=1.2)
                if f"valid_{name}" in self.arrays:
                    axes.plot(self.arrays["valid_step"], self.arrays[f"valid_{name}"], "o", color=COLOURS[1], markersize=4)
                _tidy(axes, TITLES[name], "step", "")
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        figure.savefig(out)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray | None:
    """The values of `name` in every row; nan where a number was not finite. None where a row has none."""
    if any(name not in row for row in rows):
        return None
    return np.array([row[name] for row in rows], np.float64)
