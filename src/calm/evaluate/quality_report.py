"""What a model writes, in numbers: what an independent judge pays for it, how it repeats itself, how its texts differ."""

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property

from calm.core.intervals import BlockSums, Interval, bootstrap
from calm.evaluate.tables import interval_text, table

REPEATED = 4
DISTINCT = (1, 2, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing:
    """Texts of one author: a model, or the held-out text itself.

    Attributes:
        judged: the judge's nats of each text, counted in its bytes; None without a judge.
        repeated: 4-grams that stood in their text before, counted in all of its 4-grams, for each text.
        distinct: distinct-1, -2 and -4 over all texts together.
    """

    name: str
    judged: BlockSums | None
    repeated: BlockSums
    distinct: tuple[float, ...]
    tokens: int
    ended: int
    """texts that ended before the limit"""

    @cached_property
    def bits_per_byte(self) -> Interval | None:
        """What the judge pays for a byte of these texts, given their prompts."""
        if self.judged is None or not self.judged.count.sum():
            return None
        return bootstrap(self.judged, [lambda means: means[..., 0] / math.log(2)])[0]

    @cached_property
    def repetition(self) -> Interval | None:
        """Share of repeated 4-grams; None if no text has four tokens."""
        return bootstrap(self.repeated, [lambda means: means[..., 0]])[0] if self.repeated.count.sum() else None

    def to_dict(self) -> dict:
        return {
            "name": self.name,
            "bits_per_byte": self.bits_per_byte and self.bits_per_byte.to_dict(),
            f"repeated_{REPEATED}": self.repetition and self.repetition.to_dict(),
            **{f"distinct_{n}": value for n, value in zip(DISTINCT, self.distinct, strict=True)},
            "tokens": self.tokens,
            "ended": self.ended,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityReport:
    """Writings from the same prompts, of the same number and length. `judge` names the token model and its tokenizer."""

    judge: str
    samples: int
    prompt_tokens: int
    new_tokens: int
    temperature: str
    seed: int
    writings: tuple[Writing, ...]

    def line(self) -> str:
        """What the numbers depend on besides the authors."""
        judge = f"judge {self.judge}" if self.judge else "no judge (--judge RUN names a token model)"
        return (
            f"{self.samples} continuations of {self.prompt_tokens} held-out tokens by at most {self.new_tokens}, "
            f"temperature {self.temperature}, seed {self.seed}, {judge}"
        )

    def to_dict(self) -> dict:
        fields = ("judge", "samples", "prompt_tokens", "new_tokens", "temperature", "seed")
        return {name: getattr(self, name) for name in fields} | {"writings": [each.to_dict() for each in self.writings]}

    def table(self, brier_lm: Mapping[str, Interval | None] | None = None, *, markdown: bool = False) -> str:
        """One row an author, with 95 % intervals over texts; `brier_lm` by author stands in front, where it is given."""
        brier = brier_lm or {}
        header = ["text of", "BrierLM", "judge's bits/byte", f"repeated {REPEATED}-grams %"]
        header += [f"distinct-{n} %" for n in DISTINCT]
        rows = [
            [
                each.name,
                interval_text(brier.get(each.name), 3),
                interval_text(each.bits_per_byte, 3),
                interval_text(each.repetition and each.repetition.scaled(100.0), 2),
                *(f"{100 * value:.1f}" for value in each.distinct),
            ]
            for each in self.writings
        ]
        return "\n".join([table(header, rows, markdown=markdown), "", self.line()])
