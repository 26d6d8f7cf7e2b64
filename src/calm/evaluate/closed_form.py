"""Exact Brier-n and nats per token of distributions in closed form: n-gram models and worlds.

They are scored at the boundaries of `calm.evaluate.boundaries`, on the blocks on which trained models are scored.
"""

import time
from typing import Any

import numpy as np
from jaxtyping import Int

from calm.core.brier_lm import Protocol, TextProtocol
from calm.errors import UsageError
from calm.evaluate.blocks import checked, sums_of
from calm.evaluate.boundaries import boundaries, targets_at
from calm.evaluate.ngram import Ngram, TokenSource, exact_brier, fit_ngrams, log_prob
from calm.evaluate.scores import BrierReport
from calm.worlds.world import World


def score_ngram(
    model: Ngram,
    blocks: Int[np.ndarray, "R T"],
    document: Int[np.ndarray, "*r"],
    *,
    chunk_size: int = 1,
    boundary_every: int = 4,
    text: TextProtocol | None = None,
    name: str = "n-gram",
) -> BrierReport:
    """Exact Brier-n and nats per token of an n-gram model, at the boundaries where a trained model is scored.

    `chunk_size` is that of the text's protocol and changes nothing.
    """
    text = checked(blocks, document, chunk_size, text)
    block_tokens = blocks.shape[1]
    places = boundaries(block_tokens, boundary_every)
    scores, nats, began = [], [], time.perf_counter()
    for start in range(0, len(blocks), max(1, 2**19 // block_tokens)):
        part = blocks[start : start + max(1, 2**19 // block_tokens)]
        scores.append(exact_brier(model, part[:, places - 1], targets_at(part, places)).sum(1))
        nats.append(-log_prob(model, part[:, places[0] - 1], part[:, places[0] :]).sum(1))
    return BrierReport(
        name=name,
        protocol=Protocol(**text.to_dict(), num_samples=0, decoding="exact", boundary_every=boundary_every),
        scores=sums_of(np.concatenate(scores), len(places), document, block_tokens),
        likelihood=sums_of(np.concatenate(nats), block_tokens - int(places[0]), document, block_tokens),
        tokens_per_second=blocks.size / max(time.perf_counter() - began, 1e-9),
    )


def evaluate_ngrams(
    train: TokenSource,
    vocab_size: int,
    blocks: Int[np.ndarray, "R T"],
    document: Int[np.ndarray, "*r"],
    *,
    chunk_size: int = 1,
    boundary_every: int = 4,
    text: TextProtocol | None = None,
) -> dict[str, BrierReport]:
    """Fits the unigram and the bigram model on `train` and scores both."""
    models = zip(("unigram", "bigram"), fit_ngrams(train, vocab_size), strict=True)
    options: dict[str, Any] = dict(chunk_size=chunk_size, boundary_every=boundary_every, text=text)
    return {name: score_ngram(model, blocks, document, name=name, **options) for name, model in models}


def evaluate_world(
    world: World,
    blocks: Int[np.ndarray, "R T"],
    document: Int[np.ndarray, "*r"],
    *,
    chunk_size: int = 1,
    boundary_every: int = 4,
    text: TextProtocol | None = None,
    name: str = "true law",
) -> BrierReport:
    """Exact Brier-n and nats per token of the distribution that the text was drawn from, given each block's own context.

    No model scores better in expectation.

    Raises:
        UsageError: as for any model, and tokens that the world never writes.
    """
    text = checked(blocks, document, chunk_size, text)
    rows, block_tokens = blocks.shape
    places = boundaries(block_tokens, boundary_every)
    probability = np.empty(blocks.shape)
    matches, began, state = [], time.perf_counter(), world.start(rows)
    for place, column in enumerate(blocks.T):
        if place in places:
            matches.append(world.self_match(state))
        probability[:, place] = world.distribution(state)[np.arange(rows), column]
        state = world.read(state, column)
    if not (probability > 0).all():
        raise UsageError(f"world {world.name}: the blocks hold text that it never writes; was it prepared from it?")
    hits = np.cumprod(targets_at(probability, places), axis=-1)
    return BrierReport(
        name=name,
        protocol=Protocol(**text.to_dict(), num_samples=0, decoding="exact", boundary_every=boundary_every),
        scores=sums_of((2 * hits - np.stack(matches, 1)).sum(1), len(places), document, block_tokens),
        likelihood=sums_of(-np.log(probability[:, places[0] :]).sum(1), block_tokens - int(places[0]), document, block_tokens),
        tokens_per_second=blocks.size / max(time.perf_counter() - began, 1e-9),
    )
