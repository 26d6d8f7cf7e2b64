"""`calm experiment NAME`: a study of many short runs, resumable cell by cell."""

import dataclasses
from typing import Annotated, Any, Literal

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Runs a study: trains and scores every cell that is not done, and prints its table. Start it again to go on, or start it
    in several terminals on one folder to share the cells out.

    Studies: chunk-sizes (a token model and CALM at K = 1, 2, 4, 8, at equal compute), recipes (what makes CALM learn at small
    scale), stems (tokens, latents or both as input), hybrids (mixers under a latent model), ablation and probes (what a
    hybrid's paths are worth, and what its gates hear), memory (which mixer remembers what), regularisers (what keeps a
    token model from collapsing), losses (energy score, direction term, both), reasoner-on-z (segments of a model on
    latents), latent-spaces (sphere beside Gaussian, two levels beside one), align (weight updates for a prompt against the same
    FLOPs spent otherwise). An option that a study has no use for is refused.
    """

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
    """KEY=VALUE,VALUE: every cell for every value, such as loss.auxiliary_weight=0,1,3; several make several axes."""
    only: tuple[str, ...] = ()
    """Names of the cells to run, or patterns such as recall-*; without it, all."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """In which the cells are scored."""
    split: str = "test"
    """The split to score on."""
    max_tokens: int = 65536
    """Score so many tokens of it."""
    bound_samples: int = 64
    """Latents at each position for the likelihood bound; 0 = no bound."""
    judge: str | None = None
    """Run of an independent token model that reads what the cells write."""
    texts: int = 0
    """Let every cell write so many continuations, and score them."""
    model: str | None = None
    """Run of a latent language model, for studies of what can be done with one."""
    concept: tuple[str, ...] = ()
    """Concepts to align to, each words with commas between them; without it, the study's own."""
    speed_tokens: int = 0
    """Measure generation over so many tokens; 0 = not. Wants a quiet machine."""

    def run(self) -> dict[str, Any]:
        from pathlib import Path

        from calm.studies import catalogue as studies
        from calm.studies.runner import parse_axes
        from calm.studies.scoring import LanguageModelScore
        from calm.studies.study import Request

        study = studies.get(self.name)
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
        """Raises UsageError for data that is missing, and for an option that the study would not read."""
        from calm.errors import UsageError

        if "data" in options and self.data is None:
            raise UsageError(f"experiment {self.name}: needs --data, a folder of prepared data")
        for field in dataclasses.fields(self):
            told = field.default is not dataclasses.MISSING and getattr(self, field.name) != field.default
            if told and field.name not in options | {"seeds", "only"}:
                raise UsageError(f"experiment {self.name}: has no use for --{field.name.replace('_', '-')}; leave it out")

    def show(self, result: dict[str, Any]) -> str:
        return result["summary"]
