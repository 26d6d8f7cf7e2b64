"""How well a model writes: continuations of held-out prompts, scored by an independent token model and by their repetition.

BrierLM asks whether the next few tokens are predicted, not what a page of them looks like. Here every author continues the same
held-out prompts, and the held-out text's own continuations are scored beside theirs. Few bits per byte with many repetitions is
a model that says the same thing again; many bits per byte with none, one that says anything. All these numbers move with the
number and the length of the texts, so only equal amounts of text can be compared.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.generate import generate
from calm.core.intervals import BlockSums, Interval, bootstrap
from calm.core.predictor import Predictor
from calm.core.sampler import Sampler
from calm.errors import UsageError
from calm.evaluate.ngram import Ngram
from calm.evaluate.ngram import sample as sample_ngram
from calm.evaluate.tables import interval_text, table
from calm.rng import PRNGKey, row_keys
from calm.text.tokenizer import Tokenizer

ROWS_AT_ONCE = 8  # texts that the judge reads together
REPEATED = 4
DISTINCT = (1, 2, 4)


def ngrams(row: Int[np.ndarray, "T"], n: int) -> Int[np.ndarray, "X n"]:
    """All runs of n tokens; none in a shorter row."""
    if n < 1:
        raise UsageError(f"n-grams need n of at least 1, got {n}")
    return np.lib.stride_tricks.sliding_window_view(row, n) if len(row) >= n else np.zeros((0, n), row.dtype)


def repeated(rows: Sequence[Int[np.ndarray, "_"]], n: int) -> Float[np.ndarray, "R 2"]:
    """For each row, how many of its n-grams occurred in it before, and how many there are.

    Their ratio is seq-rep-n (Welleck et al., arXiv:1908.04319): 1 minus the share of different n-grams.
    """
    counts = [(len(found := ngrams(row, n)), len(np.unique(found, axis=0))) for row in rows]
    return np.array([(total - different, total) for total, different in counts], np.float64).reshape(-1, 2)


def distinct(rows: Sequence[Int[np.ndarray, "_"]], n: int) -> float:
    """distinct-n (Li et al., arXiv:1510.03055): different n-grams of all rows together over all n-grams; nan without any."""
    every = np.concatenate([ngrams(row, n) for row in rows]) if rows else np.zeros((0, n))
    return len(np.unique(every, axis=0)) / len(every) if len(every) else float("nan")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing:
    """Texts of one author: a model, or the held-out text itself.

    Attributes:
        judged: the judge's nats of each text, counted in its bytes; None without a judge.
        repeated: 4-grams that occurred in their text before, counted in all of its 4-grams, for each text.
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
        """The judge's bits for a byte of these texts, given their prompts."""
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
        """One line for the foot of the table: prompts, lengths, temperature, seed and judge."""
        judge = f"judge {self.judge}" if self.judge else "no judge (--judge RUN names a token model)"
        return (
            f"{self.samples} continuations of {self.prompt_tokens} held-out tokens by at most {self.new_tokens}, "
            f"temperature {self.temperature}, seed {self.seed}, {judge}"
        )

    def to_dict(self) -> dict:
        fields = ("judge", "samples", "prompt_tokens", "new_tokens", "temperature", "seed")
        return {name: getattr(self, name) for name in fields} | {"writings": [each.to_dict() for each in self.writings]}

    def table(self, brier_lm: Mapping[str, Interval | None] | None = None, *, markdown: bool = False) -> str:
        """One row an author, with 95 % intervals over texts; `brier_lm` by author is the first column, where it is given."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """Held-out beginnings, and how the text continues.

    Attributes:
        tokens: beginnings. following: the tokens after them, up to the end of their document.
    """

    tokens: Int[np.ndarray, "R P"]
    following: tuple[Int[np.ndarray, "_"], ...]
    new_tokens: int

    @staticmethod
    def of(blocks: Int[np.ndarray, "R T"], end_id: int, *, samples: int, prompt_tokens: int, new_tokens: int) -> "Prompts":
        """From the start of `samples` blocks, spread evenly over all.

        Raises:
            UsageError: fewer blocks than that, or blocks that are shorter than prompt and continuation.
        """
        if samples < 1 or new_tokens < REPEATED or prompt_tokens < 1:
            raise UsageError(f"text quality needs at least 1 sample, 1 prompt token and {REPEATED} new tokens")
        if samples > len(blocks):
            raise UsageError(f"samples: {samples} continuations need as many held-out blocks, there are {len(blocks)}")
        if prompt_tokens + new_tokens > blocks.shape[1]:
            raise UsageError(
                f"{prompt_tokens} prompt tokens and {new_tokens} new ones do not fit into blocks of {blocks.shape[1]} tokens"
            )
        chosen = blocks[np.arange(samples) * len(blocks) // samples]
        following = chosen[:, prompt_tokens : prompt_tokens + new_tokens]
        return Prompts(
            tokens=chosen[:, :prompt_tokens],
            following=tuple(_until(row, end_id) for row in following),
            new_tokens=new_tokens,
        )

    def continued_by(
        self, predictor: Predictor, tokenizer: Tokenizer, key: PRNGKey, *, sampler: Sampler, decoding: str
    ) -> list[Int[np.ndarray, "_"]]:
        """A model's continuation of each prompt, up to its end token."""
        keys = row_keys(key, len(self.tokens))
        options: dict[str, Any] = dict(special=tokenizer, max_tokens=self.new_tokens, sampler=sampler, decoding=decoding)
        result = generate(predictor, list(self.tokens), keys, **options)
        return [row[:length] for row, length in zip(result.tokens, result.lengths, strict=True)]

    def continued_by_ngram(self, model: Ngram, tokenizer: Tokenizer, seed: int) -> list[Int[np.ndarray, "_"]]:
        """The same of an n-gram model."""
        rows = sample_ngram(model, self.tokens[:, -1], num_tokens=self.new_tokens, num_samples=1, seed=seed)[0]
        return [_until(row, tokenizer.end_id) for row in rows]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """A token model with its own tokenizer, which may differ from the author's."""

    name: str
    lm: Any
    """a token model (`calm.token.model.TokenLM`)"""
    tokenizer: Tokenizer
    block_tokens: int
    """the most tokens that it reads at once"""

    def nats(self, prompts: Sequence[str], texts: Sequence[str]) -> Float[np.ndarray, "R"]:
        """-log p of each text given its prompt. Where both do not fit, the front of the prompt is left out.

        Raises:
            UsageError: a text longer than the judge can read.
        """
        rows = []
        for prompt, text in zip(prompts, texts, strict=True):
            ids = self.tokenizer.encode(text)
            room = self.block_tokens - len(ids) - 1
            if room < 0:
                raise UsageError(f"judge {self.name}: reads {self.block_tokens} tokens, a text has {len(ids)}")
            before = self.tokenizer.encode(prompt)
            before = np.concatenate([[self.tokenizer.begin_id], before[max(0, len(before) - room) :]])
            rows.append((np.concatenate([before, ids]).astype(np.int32), len(before)))
        width = -(-max(len(row) for row, _ in rows) // 64) * 64
        tokens, scored = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
        for number, (row, start) in enumerate(rows):
            tokens[number, : len(row)], scored[number, start : len(row)] = row, True
        graph, params = nnx.split(self.lm)
        parts = []
        for start in range(0, len(rows), ROWS_AT_ONCE):
            pick = np.minimum(np.arange(start, start + ROWS_AT_ONCE), len(rows) - 1)  # one shape, compiled once
            parts.append(np.asarray(_row_nats(graph, params, tokens[pick], scored[pick])))
        return np.concatenate(parts)[: len(rows)].astype(np.float64)


@partial(jax.jit, static_argnames=("graph",))
def _row_nats(graph: Any, params: Any, tokens: Int[Array, "B T"], scored: Array) -> Float[Array, "B"]:
    """-log p of the scored tokens of each row, in nats. Padding after a row has no effect on it: the model is causal."""
    lm: Any = nnx.merge(graph, params)
    hidden, _ = lm.hidden(tokens[:, :-1, None])
    nats, _ = lm.nats_and_match(hidden, tokens[:, 1:])
    return (nats * scored[:, 1:]).sum(1)


def judged(
    name: str, prompts: Prompts, rows: Sequence[Int[np.ndarray, "_"]], tokenizer: Tokenizer, judge: Judge | None
) -> Writing:
    """The numbers of one author's continuations `rows` of `prompts`, in tokens of `tokenizer`."""
    nats = None
    if judge is not None:
        texts = [tokenizer.decode(row) for row in rows]
        num_bytes = np.array([len(text.encode()) for text in texts], np.float64)
        total = judge.nats([tokenizer.decode(prompt) for prompt in prompts.tokens], texts)
        nats = _per_text(np.where(num_bytes > 0, total, 0.0), num_bytes)
    counts = repeated(rows, REPEATED)
    return Writing(
        name=name,
        judged=nats,
        repeated=_per_text(counts[:, 0], counts[:, 1]),
        distinct=tuple(distinct(rows, n) for n in DISTINCT),
        tokens=sum(map(len, rows)),
        ended=sum(len(row) < prompts.new_tokens for row in rows),
    )


def _per_text(total: np.ndarray, count: np.ndarray) -> BlockSums:
    """Texts from different places are independent: each is a unit of its own for the bootstrap, like a document."""
    return BlockSums(total=total[:, None], count=count, document=np.arange(len(count)), block_tokens=1024)


def _until(row: Int[np.ndarray, "T"], end_id: int) -> Int[np.ndarray, "_"]:
    """The tokens before the first end id."""
    ends = np.flatnonzero(row == end_id)
    return row[: ends[0]] if len(ends) else row
