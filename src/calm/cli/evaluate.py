"""`calm evaluate RUN`: score a run on held-out text."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Scores a run on held-out text: reconstruction for an autoencoder; also BrierLM with its interval for a language model."""

    folder: Annotated[str, tyro.conf.Positional]
    """The run folder."""
    data: str | None = None
    """Prepared data; without it, the data that the run was trained on."""
    split: str = "valid"
    """train, valid or test."""
    max_tokens: int | None = None
    """Score only this many tokens (30k, 2M are understood); without it, the whole split."""
    seed: int = 0
    out: str | None = None
    """Also write the scores as JSON to this file."""

    def run(self) -> dict[str, Any]:
        from calm import bundle

        scores = bundle.load(self.folder).evaluate(data=self.data, split=self.split, max_tokens=self.max_tokens, seed=self.seed)
        if self.out is not None:
            from calm.cli import plain

            Path(self.out).write_text(json.dumps(plain(scores), indent=2) + "\n", encoding="utf-8")
        return scores
