"""Likelihood of text in the units in which it is published: perplexity per token and per word, and bits per byte.

exp of nats per token differs between tokenizers. Published numbers differ by level:

    word      exp of nats per word, line ends counted as words (WikiText; `calm.text.words`)
    sub-word  exp of nats per token for one tokenizer; across tokenizers exp of all nats over the text's words, line ends
              counted, whatever the tokens were (so are GPT-2's numbers on WikiText), or bits per byte
    byte      bits per byte (of characters: per character)

All of them share the numerator: the nats of every scored token, those that end documents among them. End tokens belong to no
word and no byte: they add to the numerator alone.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from calm.core.brier_lm import TextProtocol
from calm.core.intervals import BlockSums, Interval, bootstrap
from calm.errors import UsageError
from calm.evaluate.tables import interval_text, table
from calm.text.tokenizer import Level, Tokenizer
from calm.text.words import count_words


def scored_bytes(
    decode: Callable[[Int[np.ndarray, "_"]], str], blocks: Int[np.ndarray, "R T"], skip: int
) -> Float[np.ndarray, "R"]:
    """Bytes of UTF-8 of the text of tokens `skip` .. T-1 of each block.

    Special tokens have none, though their likelihood is counted: predicting where a document ends is part of the text.
    A character cut by the edge of a block counts with the bytes of U+FFFD, at most four bytes more than it has.
    """
    return np.array([len(decode(block[skip:]).encode()) for block in blocks], np.float64)


def bits_per_byte(nats: BlockSums, num_bytes: Float[np.ndarray, "R"]) -> Interval:
    """Bits per byte with its bootstrap interval, from each block's nats and bytes.

    Raises:
        UsageError: not one number of bytes a block, or no bytes at all (text of special tokens alone).
    """
    return bootstrap(per_byte(nats, num_bytes), [lambda means: means[..., 0] / math.log(2)])[0]


def per_byte(nats: BlockSums, num_bytes: Float[np.ndarray, "R"]) -> BlockSums:
    """The same sums of nats, counted in bytes instead of tokens."""
    if num_bytes.shape != nats.count.shape:
        raise UsageError(f"bits per byte: {len(nats.count)} blocks and {len(num_bytes)} numbers of bytes")
    if not num_bytes.sum():
        raise UsageError("bits per byte: the scored tokens hold no text")
    return BlockSums(total=nats.total, count=num_bytes, document=nats.document, block_tokens=nats.block_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredText:
    """Bytes and words of the scored tokens of each block. `unknown`: number of unknown words; None where there can be none."""

    level: Level
    bytes: Float[np.ndarray, "R"]
    words: Float[np.ndarray, "R"]
    unknown: int | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer, blocks: Int[np.ndarray, "R T"], skip: int | Int[np.ndarray, "R"]) -> "ScoredText":
        """The text of tokens `skip` .. T-1 of each block; `skip` may differ from block to block."""
        skips = np.broadcast_to(np.asarray(skip), len(blocks))
        parts = [(block[:first], block[first:]) for block, first in zip(blocks, skips, strict=True)]
        unknown = tokenizer.unknown_id
        return cls(
            level=tokenizer.level,
            bytes=np.array([scored_bytes(tokenizer.decode, after[None], 0)[0] for _, after in parts]),
            words=np.array([_words(tokenizer, before, after) for before, after in parts], np.float64),
            unknown=None if unknown is None else sum(int(np.count_nonzero(after == unknown)) for _, after in parts),
        )

    def convention(self, tokens: int) -> str:
        """How the perplexities of so many scored tokens are to be read, in one line."""
        count = f"{tokens:,} tokens, {round(self.words.sum()):,} words with line ends, {round(self.bytes.sum()):,} bytes"
        if self.level == "byte":
            return f"byte level, {count}: quote bits/byte; perplexity is of bytes"
        if self.level == "subword":
            return (
                f"sub-word level, {count}: perplexity is of this tokenizer's tokens; per word it is exp(all nats / words), "
                "which compares across tokenizers, as bits/byte does"
            )
        unknown = ""
        if self.unknown:
            share = self.unknown / max(self.words.sum(), 1)
            unknown = f"; {share:.2%} of them are <unk>, which the other units count as five letters, not as what it hides"
        return f"word level, {count}: perplexity per word, line ends counted, is what WikiText's is quoted in{unknown}"


def _words(tokenizer: Tokenizer, before: np.ndarray, after: np.ndarray) -> int:
    """Number of words that begin after `before`; a word cut by the edge counts where it begins."""
    return count_words(tokenizer.decode(np.concatenate([before, after]))) - count_words(tokenizer.decode(before))


def exp(nats: Interval) -> Interval:
    """The perplexity of nats per unit."""

    def of(value: float) -> float:
        return math.exp(min(value, 700.0))

    return dataclasses.replace(nats, estimate=of(nats.estimate), low=of(nats.low), high=of(nats.high))


def word_perplexity(nats: BlockSums, words: Float[np.ndarray, "R"]) -> Interval:
    """exp(all nats / all words) with its bootstrap interval, from each block's nats and words.

    Raises:
        UsageError: not one number of words a block, or no words at all.
    """
    if words.shape != nats.count.shape:
        raise UsageError(f"perplexity per word: {len(nats.count)} blocks and {len(words)} numbers of words")
    if not words.sum():
        raise UsageError("perplexity per word: the scored tokens hold no word")
    of_words = dataclasses.replace(nats, count=words)
    return exp(bootstrap(of_words, [lambda means: means[..., 0]])[0])


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
        """One line for the foot of the table: window, stride and least context."""
        window = self.protocol.block_tokens
        context = window - self.stride
        return f"windows of {window} tokens every {self.stride}: each token is predicted from at least {context} before it"

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
