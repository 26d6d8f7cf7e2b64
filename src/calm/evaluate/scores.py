"""Scores of a model as they are kept, printed and compared: sums for each block, the protocol, intervals on demand."""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from calm.core.brier_lm import ORDERS, BrierIntervals, Protocol, TextProtocol, brier_intervals, brier_lm, compare_brier
from calm.core.intervals import BlockSums, Interval, bootstrap
from calm.errors import UsageError
from calm.evaluate.bits_per_byte import bits_per_byte
from calm.evaluate.perplexity import ScoredText, exp, word_perplexity
from calm.evaluate.tables import interval_text, table

BRIER_N = [f"Brier-{n + 1}" for n in range(ORDERS)]


def _to_lists(sums: BlockSums | None) -> dict | None:
    if sums is None:
        return None
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(sums).items()}


def _from_lists(values: dict | None) -> BlockSums | None:
    if values is None:
        return None
    return BlockSums(
        total=np.asarray(values["total"], np.float64),
        count=np.asarray(values["count"], np.float64),
        document=np.asarray(values["document"], np.int64),
        block_tokens=values["block_tokens"],
    )


def scored_to_lists(scored: ScoredText) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(scored).items()}


def scored_from_lists(values: dict[str, Any]) -> ScoredText:
    bytes_, words = (np.asarray(values[name], np.float64) for name in ("bytes", "words"))
    return ScoredText(level=values["level"], bytes=bytes_, words=words, unknown=values["unknown"])


def _mean(sums: BlockSums | None) -> Interval | None:
    return None if sums is None else bootstrap(sums, [lambda means: means[..., 0]])[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BrierReport:
    """The scores of one model on one protocol. Sums for each block are kept: a paired comparison needs them.

    Attributes:
        scores: Brier-1..4 (unscaled).
        energy: energy loss of each position, or None.
        likelihood: negative log-likelihood in nats of each token, or None where it is not known.
        scored: bytes and words of the text that the tokens of `likelihood` stand for, or None where nobody counted.
        tokens_per_second: tokens scored per second, compilation excluded, or None.
    """

    name: str
    protocol: Protocol
    scores: BlockSums
    energy: BlockSums | None = None
    likelihood: BlockSums | None = None
    scored: ScoredText | None = None
    tokens_per_second: float | None = None

    @functools.cached_property
    def intervals(self) -> BrierIntervals:
        return brier_intervals(self.scores)

    @property
    def brier_n(self) -> list[Interval]:
        """Brier-1..4 times 100, not floored."""
        return self.intervals.brier_n

    @property
    def brier_lm(self) -> Interval:
        """BrierLM (0 .. 100)."""
        return self.intervals.brier_lm

    @functools.cached_property
    def energy_loss(self) -> Interval | None:
        return _mean(self.energy)

    @functools.cached_property
    def nats_per_token(self) -> Interval | None:
        return _mean(self.likelihood)

    @functools.cached_property
    def perplexity(self) -> Interval | None:
        """exp of nats per token: of this tokenizer's tokens alone."""
        return None if self.nats_per_token is None else exp(self.nats_per_token)

    @functools.cached_property
    def word_perplexity(self) -> Interval | None:
        """exp of all nats over all words, line ends counted (`calm.evaluate.perplexity`); None for text without words."""
        if self.likelihood is None or self.scored is None or not self.scored.words.sum():
            return None
        return word_perplexity(self.likelihood, self.scored.words)

    @functools.cached_property
    def bits_per_byte(self) -> Interval | None:
        """The likelihood in a unit that models of different tokenizers share (`calm.evaluate.bits_per_byte`)."""
        if self.likelihood is None or self.scored is None:
            return None
        return bits_per_byte(self.likelihood, self.scored.bytes)

    @property
    def perplexity_convention(self) -> str | None:
        """How its perplexities are to be read."""
        if self.likelihood is None or self.scored is None:
            return None
        return self.scored.convention(int(self.likelihood.count.sum()))

    def scalars(self) -> dict[str, float]:
        """The estimates alone, without the bootstrap: for a training log."""
        means = self.scores.means
        values = {f"brier_{n + 1}": 100 * float(mean) for n, mean in enumerate(means)}
        values["brier_lm"] = float(brier_lm(means))
        for name, sums in (("energy_loss", self.energy), ("nats_per_token", self.likelihood)):
            if sums is not None:
                values[name] = float(sums.means[0])
        return values

    def to_dict(self, *, per_block: bool = False) -> dict:
        """JSON-able. `per_block` adds the sums of every block, from which `from_dict` restores the report."""
        values = {
            "name": self.name,
            "protocol": self.protocol.to_dict(),
            "brier_n": [interval.to_dict() for interval in self.brier_n],
            "brier_lm": self.brier_lm.to_dict(),
            "energy_loss": self.energy_loss and self.energy_loss.to_dict(),
            "nats_per_token": self.nats_per_token and self.nats_per_token.to_dict(),
            "perplexity": self.perplexity and self.perplexity.to_dict(),
            "word_perplexity": self.word_perplexity and self.word_perplexity.to_dict(),
            "bits_per_byte": self.bits_per_byte and self.bits_per_byte.to_dict(),
            "perplexity_convention": self.perplexity_convention,
            "positions": int(self.scores.count.sum()),
            "tokens_per_second": self.tokens_per_second,
        }
        if per_block:
            values["blocks"] = {name: _to_lists(getattr(self, name)) for name in ("scores", "energy", "likelihood")}
            values["scored"] = None if self.scored is None else scored_to_lists(self.scored)
        return values

    @classmethod
    def from_dict(cls, values: dict) -> "BrierReport":
        if "blocks" not in values:
            raise UsageError(f"the scores of {values.get('name')!r} hold no sums of blocks: evaluate again")
        sums: dict[str, Any] = {name: _from_lists(lists) for name, lists in values["blocks"].items()}
        rate, protocol = values["tokens_per_second"], Protocol(**values["protocol"])
        counted = values.get("scored")
        sums["scored"] = None if counted is None else scored_from_lists(counted)
        return cls(name=values["name"], protocol=protocol, tokens_per_second=rate, **sums)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON with the sums of every block."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.to_dict(per_block=True), file)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "BrierReport":
        with open(path, encoding="utf-8") as file:
            return cls.from_dict(json.load(file))

    def table(self, *, markdown: bool = False) -> str:
        return brier_table([self], markdown=markdown)


def brier_table(reports: Sequence[BrierReport], *, markdown: bool = False) -> str:
    """One row a model, with 95 % intervals; the protocols below it, each once."""
    header = ["model", *BRIER_N, "BrierLM"]
    optional = [
        ("energy", "energy_loss"),
        ("nats/token", "nats_per_token"),
        ("perplexity", "perplexity"),
        ("perplexity/word", "word_perplexity"),
        ("bits/byte", "bits_per_byte"),
    ]
    optional = [(title, name) for title, name in optional if any(getattr(report, name) for report in reports)]
    rows = []
    for report in reports:
        cells = [*report.brier_n, report.brier_lm]
        cells += [getattr(report, name) for _, name in optional]
        # Three digits: Brier-4 of small models lies below 0.01.
        rows.append([report.name, *(interval_text(cell, 3) for cell in cells)])
    # A model scored in closed form differs from a sampled one in its last words only: each line is printed once.
    below = list(dict.fromkeys(report.protocol.line() for report in reports))
    below += dict.fromkeys(line for report in reports if (line := report.perplexity_convention))
    unit = reports[0].brier_n[0]
    below.append(f"{100 * unit.level:g} % intervals by bootstrap over units: {unit.units} x {unit.unit}")
    return "\n".join([table([*header, *[title for title, _ in optional]], rows, markdown=markdown), "", *below])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """first - second on the same blocks, by paired bootstrap."""

    first: str
    second: str
    difference: BrierIntervals

    @property
    def verdict(self) -> str:
        """ "above", "below" or "undecided": the interval of the difference in BrierLM against 0."""
        interval = self.difference.brier_lm
        if not interval.excludes_zero:
            return "undecided"
        return "above" if interval.estimate > 0 else "below"

    def to_dict(self) -> dict:
        return {
            "first": self.first,
            "second": self.second,
            "brier_n": [interval.to_dict() for interval in self.difference.brier_n],
            "brier_lm": self.difference.brier_lm.to_dict(),
            "verdict": self.verdict,
        }

    def table(self, *, markdown: bool = False) -> str:
        return comparison_table([self], markdown=markdown)


def compare(first: BrierReport, second: BrierReport) -> Comparison:
    """Raises UsageError where the two protocols differ in text, tokens or positions."""
    first.protocol.require_comparable(second.protocol)
    return Comparison(first=first.name, second=second.name, difference=compare_brier(first.scores, second.scores))


def comparison_table(comparisons: Sequence[Comparison], *, markdown: bool = False) -> str:
    """One row a pair: the difference with its interval, and what it says."""
    header = ["difference", *BRIER_N, "BrierLM", "verdict"]
    rows = [
        [
            f"{each.first} - {each.second}",
            *map(interval_text, each.difference.brier_n),
            interval_text(each.difference.brier_lm),
            each.verdict,
        ]
        for each in comparisons
    ]
    return table(header, rows, markdown=markdown)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyAccuracy:
    """Accuracy of decoding the posterior mean plus noise of standard deviation `sigma`.

    `relative` is sigma in units of the aggregate standard deviation, averaged over dimensions.
    """

    sigma: float
    relative: float
    tokens: Interval
    chunks: Interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderReport:
    """How well an autoencoder reconstructs, and what its latents look like.

    Attributes:
        noise: accuracy at each noise level, sigma 0 (the posterior mean itself) first.
        sampled: accuracy of decoding a sample of the posterior; sigma is the posterior's own mean.
        posterior_std, aggregate_std: averaged over dimensions, in latent units.
        posterior_std_relative: their ratio, dimension by dimension, averaged.
        kl: nats per chunk; latent_dim, active_dimensions: dimensions, and those whose mean varies.
    """

    name: str
    protocol: TextProtocol
    noise: list[NoisyAccuracy]
    sampled: NoisyAccuracy
    posterior_std: float
    aggregate_std: float
    posterior_std_relative: float
    kl: float
    latent_dim: int
    active_dimensions: int
    tokens_per_second: float | None = None

    @property
    def token_accuracy(self) -> Interval:
        return self.noise[0].tokens

    @property
    def chunk_accuracy(self) -> Interval:
        return self.noise[0].chunks

    def scalars(self) -> dict[str, float]:
        """The estimates alone: for a training log."""
        values = {"token_accuracy": self.token_accuracy.estimate, "chunk_accuracy": self.chunk_accuracy.estimate}
        for each in self.noise[1:]:
            values[f"token_accuracy_noise_{each.sigma:g}"] = each.tokens.estimate
            values[f"chunk_accuracy_noise_{each.sigma:g}"] = each.chunks.estimate
        return {**values, "posterior_std": self.posterior_std, "active_dimensions": float(self.active_dimensions)}

    def to_dict(self) -> dict:
        values = dataclasses.asdict(self)
        for entry, source in zip([*values["noise"], values["sampled"]], [*self.noise, self.sampled], strict=True):
            entry["tokens"], entry["chunks"] = source.tokens.to_dict(), source.chunks.to_dict()
        return values

    def table(self, *, markdown: bool = False) -> str:
        named = [("posterior mean" if not each.sigma else f"noise {each.sigma:g}", each) for each in self.noise]
        rows = [
            [name, f"{each.relative:.2f}", interval_text(each.tokens.scaled(100.0)), interval_text(each.chunks.scaled(100.0))]
            for name, each in [*named, ("posterior sample", self.sampled)]
        ]
        header = ["decoded from", "sigma / aggregate std", "tokens right %", "chunks right %"]
        return "\n".join(
            [
                table(header, rows, markdown=markdown),
                "",
                f"posterior std {self.posterior_std:.3f}, aggregate std {self.aggregate_std:.3f}, "
                f"KL {self.kl:.1f} nats a chunk, {self.active_dimensions} of {self.latent_dim} dimensions active",
                self.protocol.line(),
            ]
        )
