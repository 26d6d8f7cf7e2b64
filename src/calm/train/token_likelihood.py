"""Held-out text under a token model: its likelihood and, in closed form, Brier-1."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.errors import UsageError
from calm.metrics.accumulate import BlockSums
from calm.metrics.brier_lm import Protocol, TextProtocol
from calm.models.token_lm import TokenLM
from calm.report.scores import BrierReport
from calm.train.evaluate import _checked, _run, _sums


@partial(jax.jit, static_argnames=("graph", "skip"))
def _block_sums(graph: Any, params: Any, tokens: Int[Array, "B T"], *, skip: int) -> Float[Array, "B 2"]:
    """Nats and Brier-1 of each block, summed over its scored tokens."""
    lm: TokenLM = nnx.merge(graph, params)
    hidden, _ = lm.hidden(tokens[:, :-1, None])
    nats, match = lm.nats_and_match(hidden[:, skip - 1 :], tokens[:, skip:])
    return jnp.stack([nats.sum(1), (2 * jnp.exp(-nats) - match).sum(1)], axis=-1)


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
    return _score(lm, blocks, document, skip, batch_size)[0]


def evaluate_token_lm(
    lm: TokenLM,
    blocks: Int[np.ndarray, "R T"],
    document: Int[np.ndarray, "*r"],
    *,
    batch_size: int | None = None,
    text: TextProtocol | None = None,
    name: str = "token LM",
) -> BrierReport:
    """Exact Brier-1 and nats per token, at every token of a block but its first.

    Raises:
        UsageError: blocks of one token, or that do not fit the protocol.
    """
    text = _checked(blocks, document, 1, text)
    likelihood, scores, rate = _score(lm, blocks, document, 1, batch_size)
    protocol = Protocol(**text.to_dict(), num_samples=0, decoding="exact")
    return BrierReport(name=name, protocol=protocol, scores=scores, likelihood=likelihood, tokens_per_second=rate)


def _score(
    lm: TokenLM, blocks: np.ndarray, document: np.ndarray, skip: int, batch_size: int | None
) -> tuple[BlockSums, BlockSums, float]:
    """Likelihood, Brier-1, and tokens per second."""
    if not 1 <= skip < blocks.shape[1]:
        raise UsageError(f"skip must lie in 1..{blocks.shape[1] - 1} for blocks of {blocks.shape[1]} tokens, got {skip}")
    graph, params = nnx.split(lm)
    sums, rate = _run(lambda tokens, rows: _block_sums(graph, params, tokens, skip=skip), blocks, batch_size)
    nats, scores = (_sums(sums[:, i], blocks.shape[1] - skip, document, blocks.shape[1]) for i in range(2))
    return nats, scores, rate
