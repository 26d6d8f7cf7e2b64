"""Held-out text under a token model: its likelihood, at every token. BrierLM is in `calm.train.brier`."""

from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.errors import UsageError
from calm.metrics.accumulate import BlockSums
from calm.models.token_lm import TokenLM
from calm.train.evaluate import run_blocks, sums_of


@partial(jax.jit, static_argnames=("graph", "skip"))
def _block_nats(graph: Any, params: Any, tokens: Int[Array, "B T"], *, skip: int) -> Float[Array, "B 1"]:
    lm: TokenLM = nnx.merge(graph, params)
    hidden, _ = lm.hidden(tokens[:, :-1, None])
    nats, _ = lm.nats_and_match(hidden[:, skip - 1 :], tokens[:, skip:])
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
