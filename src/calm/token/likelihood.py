"""Held-out text under a token model: its likelihood, at every token. BrierLM is in `calm.evaluate.brier`.

In blocks that do not overlap the first tokens of each are told little. `sliding_likelihood` gives every token the context that
its stride leaves, and leaves out none but the first of the text: how perplexities of fixed-context models are published.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.intervals import BlockSums
from calm.errors import UsageError
from calm.evaluate.blocks import run_blocks, sums_of
from calm.token.model import TokenLM


@partial(jax.jit, static_argnames=("graph", "skip"))
def _block_nats(
    graph: Any, params: Any, tokens: Int[Array, "B T"], first: Int[Array, "B"] | None = None, *, skip: int
) -> Float[Array, "B 1"]:
    """Nats from token `skip` on; of row b from token `first[b]` >= skip on, if given."""
    lm: TokenLM = nnx.merge(graph, params)
    hidden, _ = lm.hidden(tokens[:, :-1, None])
    nats, _ = lm.nats_and_match(hidden[:, skip - 1 :], tokens[:, skip:])
    if first is not None:
        nats = nats * (jnp.arange(skip, tokens.shape[1]) >= first[:, None])
    return nats.sum(1, keepdims=True)


def token_likelihood(
    lm: TokenLM,
    blocks: Int[np.ndarray, "R T"],
    document: Int[np.ndarray, "*r"],
    *,
    skip: int = 1,
    batch_size: int | None = None,
) -> BlockSums:
    """-log p in nats of each block's tokens `skip` .. T-1, each given all tokens of the block before it.

    A chunk of K tokens is never scored on a block's first chunk; `skip` = K scores a token model on the same tokens.

    Raises:
        UsageError: fewer tokens in a block than it takes to score one.
    """
    if not 1 <= skip < blocks.shape[1]:
        raise UsageError(f"skip must lie in 1..{blocks.shape[1] - 1} for blocks of {blocks.shape[1]} tokens, got {skip}")
    graph, params = nnx.split(lm)
    nats, _ = run_blocks(lambda tokens, rows: _block_nats(graph, params, tokens, skip=skip), blocks, batch_size)
    return sums_of(nats, blocks.shape[1] - skip, document, blocks.shape[1])


def windows(num_tokens: int, window: int, stride: int) -> tuple[Int[np.ndarray, "W"], Int[np.ndarray, "W"]]:
    """Where the windows of a text start, and the first token in each that no window before it scored.

    A window of T tokens every `stride` tokens; the last one ends with the text. Together they score every token but the first.

    Raises:
        UsageError: a stride outside 1..T-1, or less text than a window.
    """
    if not 1 <= stride < window:
        raise UsageError(f"stride: must lie in 1..{window - 1} for windows of {window} tokens, got {stride}")
    if num_tokens < window:
        raise UsageError(f"stride: the text has {num_tokens} tokens, fewer than one window of {window}")
    starts = np.minimum(np.arange(0, num_tokens - window + stride, stride), num_tokens - window)
    scored_until = np.concatenate([[1], starts[:-1] + window])
    return starts, scored_until - starts


def sliding_likelihood(
    lm: TokenLM,
    tokens: Int[np.ndarray, "M"],
    documents: Int[np.ndarray, "*m"],
    *,
    window: int,
    stride: int,
    batch_size: int | None = None,
) -> tuple[BlockSums, Int[np.ndarray, "W T"], Int[np.ndarray, "W"]]:
    """-log p in nats of every token of a text but the first, given at least T - `stride` tokens before it (at its start, all).

    Returns the sums of each window over the tokens that it scores first, the windows, and the first of these tokens in each.
    `documents` holds the first token of each document.
    """
    starts, first = windows(len(tokens), window, stride)
    rows = np.asarray(tokens, np.int32)[starts[:, None] + np.arange(window)]
    graph, params = nnx.split(lm)
    parts = []
    for some in (slice(0, 1), slice(1, None)):  # only the first window scores more than its end
        if not len(rows[some]):
            continue
        skip, at = int(first[some].min()), first[some].astype(np.int32)
        score = partial(_block_nats, graph, params, skip=skip)
        parts.append(run_blocks(lambda part, number, at=at, score=score: score(part, at[number]), rows[some], batch_size)[0])
    nats = np.concatenate(parts)
    document = np.searchsorted(documents, (starts + first).astype(np.uint64), side="right").astype(np.int64) - 1
    sums = BlockSums(
        total=np.asarray(nats, np.float64), count=(window - first).astype(np.float64), document=document, block_tokens=stride
    )
    return sums, rows, first
