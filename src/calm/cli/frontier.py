"""`calm frontier RUN`: accuracy against collision over temperatures and numbers of candidates."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frontier:
    """Sweeps the batch sampler on held-out text: how often it writes the true chunk, and how often two of its choices agree."""

    folder: Annotated[str, tyro.conf.Positional]
    """The run folder of a language model."""
    data: str | None = None
    """Prepared data; without it, the data that the run was trained on."""
    split: str = "valid"
    """train, valid or test."""
    max_tokens: int | None = 32_768
    """Read only this much text (30k, 2M are understood)."""
    positions: int = 16
    """Chunks of every block that are predicted."""
    temperatures: tuple[str, ...] = ("1", "0.7", "1/2", "1/3", "1/4", "1/8")
    """Temperatures above 0."""
    candidates: tuple[int, ...] = (10, 50, 200)
    """Numbers of draws to choose among."""
    decoding: Literal["argmax", "drawn"] | None = None
    """How a latent becomes tokens: the decoder's argmax, or drawn from its softmax; by default what suits the model."""
    seed: int = 0
    out: str | None = None
    """A folder for frontier.json and frontier.png; without it, nothing is written."""

    def run(self) -> dict[str, Any]:
        from calm.cli import plain
        from calm.evaluate.frontier import frontier_curves
        from calm.runs import bundle
        from calm.runs.evaluation import sweep_frontier

        report = sweep_frontier(
            bundle.load(self.folder),
            self.data,
            split=self.split,
            max_tokens=self.max_tokens,
            temperatures=self.temperatures,
            sizes=self.candidates,
            positions=self.positions,
            decoding=self.decoding,
            seed=self.seed,
        )
        if self.out is not None:
            out = Path(self.out)
            out.mkdir(parents=True, exist_ok=True)
            (out / "frontier.json").write_text(json.dumps(plain(report), indent=2) + "\n", encoding="utf-8")
            frontier_curves(report, out / "frontier.png")
        return {"frontier": report}

    def show(self, result: dict[str, Any]) -> str:
        return result["frontier"].table()
