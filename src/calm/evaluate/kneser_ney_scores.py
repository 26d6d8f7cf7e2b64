"""Scoring Kneser-Ney models, plain and with a cache, on the blocks and boundaries where a trained model is scored.

Brier-n is 2 P(y) - sum P^2 over the first n tokens after a boundary. P(y) is exact. sum P^2 is the mean of P(x) over x drawn
from P itself, by S continuations that read what they drew: unbiased, and each needs only the probability of its own tokens.
Counting equal pairs of continuations, for models without probabilities, would have to meet the same n-gram twice.

Axis letters: R blocks · T tokens of a block · A boundaries · S samples · O orders of Brier-n
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer

from calm.core.brier_lm import ORDERS, Protocol, TextProtocol
from calm.errors import UsageError
from calm.evaluate.blocks import checked, sums_of
from calm.evaluate.boundaries import boundaries, targets_at
from calm.evaluate.history import HistoryModel, histories
from calm.evaluate.kneser_ney import KneserNey, fit_discounts
from calm.evaluate.ngram import TokenSource
from calm.evaluate.ngram_counts import NgramCounts, count_ngrams
from calm.evaluate.scores import BrierReport
from calm.evaluate.text_cache import Cached, fit_cache

FIT_TOKENS = 65_536
"""The most held-out tokens that discounts and cache weights are fitted on."""
BLOCKS_AT_ONCE = 8


def fit_kneser_ney(
    counts: NgramCounts, order: int, held_out: Integer[np.ndarray, "R T"] | None, *, cache: bool = False
) -> HistoryModel:
    """One model from counts, its discounts and cache weights fitted on the first `FIT_TOKENS` tokens of held-out blocks.

    Each held-out token is predicted from its own block, as in scoring. Without held-out blocks, discounts have their closed
    form and the cache its default weights.

    Raises:
        UsageError: an order that was not counted, held-out blocks without two tokens, ids outside the vocabulary.
    """
    model = KneserNey.closed_form(counts, order)
    if held_out is None:
        return Cached(model) if cache else model
    if not held_out.size or held_out.shape[1] < 2:
        raise UsageError(f"fitting needs held-out blocks of at least 2 tokens, got {held_out.shape}")
    blocks = held_out[: max(1, FIT_TOKENS // held_out.shape[1])]
    places = np.arange(1, blocks.shape[1])
    token = blocks[:, places].reshape(-1).astype(np.int64)

    def context(reach: int | None) -> Integer[np.ndarray, "R L"]:
        rows = histories(blocks, places, reach)
        return rows.reshape(len(token), rows.shape[-1])

    model = fit_discounts(model, context(model.reach), token)
    return fit_cache(model, context(None), token) if cache else model


def score_history_model(
    model: HistoryModel,
    blocks: Integer[np.ndarray, "R T"],
    document: Int[np.ndarray, "*r"],
    *,
    num_samples: int = 8,
    chunk_size: int = 1,
    boundary_every: int = 4,
    text: TextProtocol | None = None,
    seed: int = 0,
    name: str = "Kneser-Ney",
) -> BrierReport:
    """Brier-1..4 and exact nats per token, each token given its own block up to there.

    Args:
        num_samples: S continuations of every boundary, for sum P^2 alone.
        chunk_size: that of the text's protocol; it changes nothing.

    Raises:
        UsageError: blocks that do not fit the boundaries or the protocol, ids outside the vocabulary, fewer than 2 samples.
    """
    text = checked(blocks, document, chunk_size, text)
    protocol = Protocol(**text.to_dict(), num_samples=num_samples, decoding="drawn", boundary_every=boundary_every)
    block_tokens, generator = blocks.shape[1], np.random.default_rng(seed)
    places = boundaries(block_tokens, boundary_every)
    scores, nats, began = [], [], time.perf_counter()
    for start in range(0, len(blocks), BLOCKS_AT_ONCE):
        part = blocks[start : start + BLOCKS_AT_ONCE]
        all_places = np.arange(places[0], block_tokens)
        probability = np.ones(part.shape)
        probability[:, all_places] = model.conditional(histories(part, all_places, model.reach), part[:, all_places])
        hits = np.cumprod(targets_at(probability, places), axis=-1)
        scores.append((2 * hits - _self_match(model, part, places, num_samples, generator)).sum(1))
        nats.append(-np.log(probability).sum(1))
    return BrierReport(
        name=name,
        protocol=protocol,
        scores=sums_of(np.concatenate(scores), len(places), document, block_tokens),
        likelihood=sums_of(np.concatenate(nats), block_tokens - int(places[0]), document, block_tokens),
        tokens_per_second=blocks.size / max(time.perf_counter() - began, 1e-9),
    )


def _self_match(
    model: HistoryModel,
    blocks: Integer[np.ndarray, "R T"],
    places: Int[np.ndarray, "A"],
    num_samples: int,
    generator: np.random.Generator,
) -> Float[np.ndarray, "R A O"]:
    """An unbiased estimate of sum P^2 of the first 1..ORDERS tokens after each boundary."""
    context = np.repeat(histories(blocks, places, model.reach)[:, :, None], num_samples, axis=2)
    passed, means = np.ones(context.shape[:-1]), []
    for order in range(ORDERS):
        token, probability = model.draw_with_probability(context, generator)
        passed = passed * probability
        means.append(passed.mean(-1))
        if order + 1 < ORDERS:
            context = np.concatenate([context, token[..., None].astype(context.dtype)], axis=-1)
            context = context if model.reach is None else context[..., max(0, context.shape[-1] - model.reach) :]
    return np.stack(means, axis=-1)


def evaluate_kneser_ney(
    train: TokenSource,
    vocab_size: int,
    blocks: Integer[np.ndarray, "R T"],
    document: Int[np.ndarray, "*r"],
    *,
    held_out: Integer[np.ndarray, "R2 T"] | None,
    orders: Sequence[int] = (2, 3, 4, 5),
    caches: Sequence[bool] = (False, True),
    max_tokens: int | None = None,
    **options: Any,
) -> dict[str, BrierReport]:
    """Counts `train` once, fits every order with and without a cache on `held_out`, and scores all: names like "kn5+cache".

    Args:
        held_out: blocks of text that is neither counted nor scored; None for closed-form discounts and default cache weights.
        max_tokens: as in `count_ngrams`. options: as in `score_history_model`.
    """
    if not orders:
        raise UsageError("Kneser-Ney: no order to score")
    counts, reports = count_ngrams(train, vocab_size, max_order=max(orders), max_tokens=max_tokens), {}
    for order in orders:
        for cache in caches:
            key = f"kn{order}{'+cache' if cache else ''}"
            name = f"Kneser-Ney {order}{' + cache' if cache else ''}"
            model = fit_kneser_ney(counts, order, held_out, cache=cache)
            reports[key] = score_history_model(model, blocks, document, name=name, **options)
    return reports
