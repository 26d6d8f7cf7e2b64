"""The likelihood of a whole text under a sliding window, in every unit that it is published in."""

import dataclasses
from functools import cached_property
from typing import Any

from calm.core.brier_lm import TextProtocol
from calm.core.intervals import BlockSums, Interval, bootstrap
from calm.evaluate.bits_per_byte import bits_per_byte
from calm.evaluate.perplexity import ScoredText, exp, word_perplexity
from calm.evaluate.tables import interval_text, table


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityReport:
    """Nats of every token that was scored, and the text that these tokens are. `protocol.block_tokens` is the window."""

    name: str
    protocol: TextProtocol
    stride: int
    likelihood: BlockSums
    scored: ScoredText

    @cached_property
    def nats_per_token(self) -> Interval:
        return bootstrap(self.likelihood, [lambda means: means[..., 0]])[0]

    @property
    def perplexity(self) -> Interval:
        """exp of nats per token."""
        return exp(self.nats_per_token)

    @cached_property
    def word_perplexity(self) -> Interval | None:
        """exp of all nats over all words, line ends counted; None for text without words."""
        return word_perplexity(self.likelihood, self.scored.words) if self.scored.words.sum() else None

    @cached_property
    def bits_per_byte(self) -> Interval:
        return bits_per_byte(self.likelihood, self.scored.bytes)

    @property
    def line(self) -> str:
        """What was scored, and how."""
        window = self.protocol.block_tokens
        return f"windows of {window} tokens every {self.stride}: each token is told at least {window - self.stride} before it"

    def to_dict(self) -> dict[str, Any]:
        tokens = int(self.likelihood.count.sum())
        return {
            "name": self.name,
            "protocol": {**self.protocol.to_dict(), "stride": self.stride},
            "nats_per_token": self.nats_per_token.to_dict(),
            "perplexity": self.perplexity.to_dict(),
            "word_perplexity": self.word_perplexity and self.word_perplexity.to_dict(),
            "bits_per_byte": self.bits_per_byte.to_dict(),
            "perplexity_convention": self.scored.convention(tokens),
            "scored_tokens": tokens,
        }

    def table(self, *, markdown: bool = False) -> str:
        header = ["sliding window", "nats/token", "perplexity", "perplexity/word", "bits/byte"]
        cells = [self.nats_per_token, self.perplexity, self.word_perplexity, self.bits_per_byte]
        rows = [[self.name, *(interval_text(cell, 3) for cell in cells)]]
        below = [self.protocol.line(), self.line, self.scored.convention(int(self.likelihood.count.sum()))]
        return "\n".join([table(header, rows, markdown=markdown), "", *below])
