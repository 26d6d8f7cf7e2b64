"""`calm diagnose RUN`: which stage of a next-vector model fails first."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnose:
    """Goes the way from text to text stage by stage, on held-out text, and names the first stage that fails.

    codec round trip, head mean on true prefixes, one sample, voted sample, prompt alignment, free running
    """

    folder: Annotated[str, tyro.conf.Positional]
    """The run folder, or export, of a latent language model."""
    data: str | None = None
    """Prepared data; without it, the data that the run was trained on."""
    split: str = "valid"
    """train, valid or test."""
    max_tokens: int = 16 * 1024
    """Look at only this many tokens."""
    decoding: Literal["argmax", "drawn"] | None = None
    """How a latent becomes tokens: the decoder's argmax, or drawn from its softmax."""
    num_samples: int = 8
    """Samples at every position."""
    candidates: int = 100
    """Draws that vote at T = 1/2."""
    seed: int = 0
    out: str | None = None
    """Also write the stages as JSON to this file."""

    def run(self) -> Any:
        from calm.cli import plain
        from calm.runs import bundle
        from calm.runs import measure as examine

        found = examine.faults(
            bundle.load(self.folder),
            self.data,
            split=self.split,
            max_tokens=self.max_tokens,
            decoding=self.decoding,
            num_samples=self.num_samples,
            candidates=self.candidates,
            seed=self.seed,
        )
        if self.out is not None:
            Path(self.out).write_text(json.dumps(plain(found), indent=2) + "\n", encoding="utf-8")
        return found

    def show(self, found: Any) -> str:
        return found.table()
