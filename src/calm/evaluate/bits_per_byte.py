"""Bits per byte: the likelihood of text in a unit that does not depend on the tokenizer.

Nats of all scored tokens, over the bytes of the text that they stand for, over ln 2. Models with different tokenizers can then
be compared, which nats per token or perplexity do not allow.
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from calm.core.intervals import BlockSums, Interval, bootstrap
from calm.errors import UsageError


def scored_bytes(
    decode: Callable[[Int[np.ndarray, "_"]], str], blocks: Int[np.ndarray, "R T"], skip: int
) -> Float[np.ndarray, "R"]:
    """Bytes of UTF-8 of the text that tokens `skip` .. T-1 of each block stand for.

    Special tokens stand for none, though their likelihood is counted: predicting where a document ends is part of the text.
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
        raise UsageError("bits per byte: the scored tokens stand for no text")
    return BlockSums(total=nats.total, count=num_bytes, document=nats.document, block_tokens=nats.block_tokens)
