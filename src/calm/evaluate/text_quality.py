"""Scoring what models write: continuations of held-out prompts, read by an independent token model.

BrierLM asks whether the next few tokens are predicted; nobody asks there what a page of them looks like. Here every author
continues the same held-out prompts, and the held-out text's own continuations stand beside theirs. Low bits per byte with many
repetitions is a model that says the same thing again; high bits per byte with none, one that says anything.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core import generate
from calm.core.intervals import BlockSums
from calm.core.predictor import Predictor
from calm.core.sampler import Sampler
from calm.errors import UsageError
from calm.evaluate.diversity import distinct, repeated
from calm.evaluate.ngram import Ngram
from calm.evaluate.ngram import sample as sample_ngram
from calm.evaluate.quality_report import DISTINCT, REPEATED, Writing
from calm.rng import PRNGKey, row_keys
from calm.text.tokenizer import Tokenizer
from calm.token.model import TokenLM

ROWS_AT_ONCE = 8  # texts that the judge reads together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """Held-out beginnings, and how the text goes on.

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
        """What a model writes after each, up to its end token."""
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
    """A token model with its own tokenizer, which need not be that of what it reads."""

    name: str
    lm: TokenLM
    tokenizer: Tokenizer
    block_tokens: int
    """the most tokens that it reads at once"""

    def nats(self, prompts: Sequence[str], texts: Sequence[str]) -> Float[np.ndarray, "R"]:
        """-log p of each text given its prompt. What does not fit is left out at the front, where it only conditions.

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
    """A causal model reads padding behind a row without any effect on the row."""
    lm: TokenLM = nnx.merge(graph, params)
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
