"""Perplexity, and what it is divided by.

exp of nats per token means something else for every tokenizer. What is published differs by level:

    word      exp of nats per word, line ends counted as words (WikiText; `calm.text.words`)
    sub-word  exp of nats per token for one tokenizer; across tokenizers exp of all nats over the text's words, line ends
              counted, whatever the tokens were (so are GPT-2's numbers on WikiText), or bits per byte
    byte      bits per byte (of characters: per character)

All of them share the numerator: the nats of every scored token, those that end documents among them. These belong to no word
and no byte, so per word and per byte they cost a little and count nothing.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Int

from calm.core.intervals import BlockSums, Interval, bootstrap
from calm.errors import UsageError
from calm.evaluate.bits_per_byte import scored_bytes
from calm.text.tokenizer import Level, Tokenizer
from calm.text.words import count_words


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredText:
    """What the scored tokens of each block stand for. `unknown`: how many of all are unknown words; None where none can be."""

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
    """Words that begin behind `before`: one that was begun there is not counted a second time."""
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
