"""A likelihood bound as it is kept and printed: nats for each number of samples, beside models whose likelihood is known."""

import dataclasses
import math
from functools import cached_property
from typing import Any

from calm.core.brier_lm import TextProtocol
from calm.core.intervals import BlockSums, Interval, bootstrap
from calm.evaluate.tables import interval_text, table


@dataclasses.dataclass(frozen=True, kw_only=True)
class LikelihoodReport:
    """How many nats a token costs at most, by samples of the latent; the decoder is smoothed (`calm.evaluate.nll_bound`).

    Attributes:
        sizes: numbers of samples S, ascending. nats: one column for each, negative bound per token, for each block.
        encoder: the same where latents were proposed by the encoder; None for a head without a density.
        share: of the unigram in every token's probability; `fitted_on` says on which text it was chosen.
        unigram: negative log-likelihood per token of the unigram model alone.
        num_bytes: bytes of text in the scored tokens.
    """

    name: str
    protocol: TextProtocol
    sizes: tuple[int, ...]
    nats: BlockSums
    encoder: BlockSums | None
    share: float
    fitted_on: str
    unigram: BlockSums
    vocab_size: int
    num_bytes: int
    tokens_per_second: float | None = None

    @cached_property
    def rows(self) -> list[tuple[str, Interval]]:
        """Nats per token with their intervals, best bounds last: what the table shows."""
        rows = list(zip([f"{self.name} <= (S={size})" for size in self.sizes], _intervals(self.nats), strict=True))
        if self.encoder is not None:
            rows.append((f"{self.name} <= (S={self.sizes[-1]}, from the encoder)", _intervals(self.encoder)[-1]))
        return rows

    @property
    def nats_per_token(self) -> Interval:
        """The tightest bound that was computed with the model's own samples."""
        return self.rows[len(self.sizes) - 1][1]

    @cached_property
    def unigram_nats(self) -> Interval:
        return _intervals(self.unigram)[0]

    def bits_per_byte(self, nats: float) -> float:
        """Nats per token as bits per byte of the scored text."""
        return nats * float(self.nats.count.sum()) / (self.num_bytes * math.log(2)) if self.num_bytes else math.nan

    def scalars(self) -> dict[str, float]:
        """The estimates alone: for a training log, or a table of another report."""
        nats = float(self.nats.means[-1])
        values = {"nats_per_token_bound": nats, "bits_per_byte_bound": self.bits_per_byte(nats), "smoothing_share": self.share}
        if self.encoder is not None:
            values["nats_per_token_bound_encoder"] = float(self.encoder.means[-1])
        return values

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "protocol": {**self.protocol.to_dict(), "samples": self.sizes[-1], "smoothing_share": self.share},
            "smoothing_fitted_on": self.fitted_on,
            "bounds": {label: interval.to_dict() | self._derived(interval) for label, interval in self.rows},
            "unigram": self.unigram_nats.to_dict() | self._derived(self.unigram_nats),
            "uniform": self._derived(math.log(self.vocab_size)),
            "scored_tokens": int(self.nats.count.sum()),
            "scored_bytes": self.num_bytes,
            "tokens_per_second": self.tokens_per_second,
        }

    def _derived(self, nats: Interval | float) -> dict[str, float]:
        value = nats.estimate if isinstance(nats, Interval) else nats
        return {"nats_per_token": value, "bits_per_byte": self.bits_per_byte(value), "perplexity": math.exp(min(value, 700.0))}

    def table(self, *, markdown: bool = False) -> str:
        header = ["likelihood", "nats per token", "bits per byte", "perplexity"]
        known = [("unigram", self.unigram_nats), ("uniform", _exactly(math.log(self.vocab_size)))]
        rows = [
            [label, interval_text(nats, 3), *[f"{self._derived(nats)[name]:.5g}" for name in ("bits_per_byte", "perplexity")]]
            for label, nats in [*self.rows, *known]
        ]
        below = [
            self.protocol.line(),
            f"<= is a bound: the model is at least as good in expectation; decoder smoothed by {100 * self.share:.2g} % of the "
            f"unigram, fitted on {self.fitted_on}; {int(self.nats.count.sum())} tokens scored",
        ]
        return "\n".join([table(header, rows, markdown=markdown), "", *below])


def _intervals(sums: BlockSums) -> list[Interval]:
    return bootstrap(sums, [lambda means, i=i: means[..., i] for i in range(sums.total.shape[1])])


def _exactly(value: float) -> Interval:
    return Interval(estimate=value, low=math.nan, high=math.nan)
