"""`calm diagnose RUN`: which stage of a next-vector model fails first."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from calm.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnose:
    """Follows a model from text to text stage by stage, on held-out text, and names the first stage that fails.

    codec round trip, head mean on true prefixes, vector use, one sample, voted sample, prompt alignment, free running
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
    vector_tokens: int = 8 * 1024
    """Tokens on which it is measured whether the decoder uses its vector; 0 = not at all, and that stage is left out."""
    seed: int = 0
    out: str | None = None
    """Also write the stages as JSON to this file."""

    def run(self) -> Any:
        from calm.cli import plain
        from calm.runs import bundle
        from calm.runs.evaluation import find_failure, vector_use

        if self.vector_tokens < 0:
            raise UsageError(f"vector_tokens must be at least 0, got {self.vector_tokens}")
        model = bundle.load(self.folder)
        options: dict[str, Any] = dict(split=self.split, decoding=self.decoding, num_samples=self.num_samples, seed=self.seed)
        vector = vector_use(model, self.data, max_tokens=self.vector_tokens, **options) if self.vector_tokens else None
        found = find_failure(
            model,
            self.data,
            max_tokens=self.max_tokens,
            candidates=self.candidates,
            vector=vector,
            **options,
        )
        if self.out is not None:
            Path(self.out).write_text(json.dumps(plain(found), indent=2) + "\n", encoding="utf-8")
        return found

    def show(self, found: Any) -> str:
        return found.table()
