"""`calm experiment NAME`: a study of many short runs, resumable cell by cell."""

import dataclasses
from typing import Annotated, Any, Literal

import tyro

from calm.errors import UsageError
from calm.studies import catalogue


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    # The docstring, which lists the studies, is set below.

    name: Annotated[str, tyro.conf.Positional]
    """The study."""
    out: str
    """Folder for the cells and the table."""
    data: str | None = None
    """Prepared data (`calm data prepare`), for studies that read text."""
    seeds: tuple[int, ...] = (0,)
    """Every cell is run once for each."""
    budget: float | None = None
    """Training FLOPs of a cell, its autoencoder's included, such as 3e13; without it, the presets' numbers of steps."""
    grid: tuple[str, ...] = ()
    """KEY=VALUE,VALUE: every cell for every value, such as loss.terms.auxiliary.weight=0,1,3; several make several axes."""
    only: tuple[str, ...] = ()
    """Names of the cells to run, or patterns such as recall-*; without it, all."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of scoring."""
    split: str = "test"
    """The split to score on."""
    max_tokens: int = 65536
    """The most tokens of it to score."""
    bound_samples: int = 64
    """Latents at each position for the likelihood bound; 0 = no bound."""
    judge: str | None = None
    """Run of an independent token model that scores what the cells write."""
    texts: int = 0
    """Continuations for every cell to write, which are scored; 0 = none."""
    model: str | None = None
    """Run of a latent language model, for studies of a trained one."""
    concept: tuple[str, ...] = ()
    """Concepts to align to, each words with commas between them; without it, the study's own."""
    speed_tokens: int = 0
    """Tokens to generate for a measurement of speed, which needs an idle machine; 0 = none."""

    def run(self) -> dict[str, Any]:
        from pathlib import Path

        from calm.studies.runner import parse_axes
        from calm.studies.scoring import LanguageModelScore
        from calm.studies.study import Request

        study = catalogue.get(self.name)
        self._check(study.options)
        score = LanguageModelScore(
            precision=self.precision,
            split=self.split,
            max_tokens=self.max_tokens,
            bound_samples=self.bound_samples,
            judge=self.judge,
            texts=self.texts,
            speed_tokens=self.speed_tokens,
        )
        request = Request(
            name=self.name,
            out=Path(self.out),
            data=self.data,
            seeds=self.seeds,
            budget=self.budget,
            axes=parse_axes(self.grid),
            only=self.only,
            score=score,
            model=self.model,
            concepts=self.concept,
        )
        return study.run(request)

    def _check(self, options: frozenset[str]) -> None:
        """Raises UsageError for data that is missing, and for an option that the study does not read."""
        if "data" in options and self.data is None:
            raise UsageError(f"experiment {self.name}: needs --data, a folder of prepared data")
        for field in dataclasses.fields(self):
            given = field.default is not dataclasses.MISSING and getattr(self, field.name) != field.default
            if given and field.name not in options | {"seeds", "only"}:
                raise UsageError(f"experiment {self.name}: has no use for --{field.name.replace('_', '-')}; leave it out")

    def show(self, result: dict[str, Any]) -> str:
        return result["summary"]


Experiment.__doc__ = f"""Runs a study: trains and scores every cell that is not done, and prints its table. The same command
continues an interrupted study, and several processes on one folder share its cells. An option that the study does not
read is refused.

Studies:

{chr(10).join(f"  {name:14} {listing.summary}" for name, listing in catalogue.STUDIES.items())}
"""
