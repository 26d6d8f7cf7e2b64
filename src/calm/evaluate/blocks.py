"""Scoring trained models on blocks of held-out text. Everything per position happens on the device, in one compiled
function.

Blocks `[R T]` come from `calm.text.batches.evaluation_blocks`. Results keep the sums of every block, so that two models can be
compared on the same blocks (`calm.evaluate.scores.compare`). Here: autoencoders, and models whose Brier-n is known in closed
form, at the boundaries of `calm.evaluate.boundaries`; models that are sampled are in `calm.evaluate.brier`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.autoencoder import Autoencoder
from calm.core.brier_lm import Protocol, TextProtocol
from calm.core.intervals import BlockSums, bootstrap
from calm.errors import UsageError
from calm.evaluate.boundaries import boundaries, targets_at
from calm.evaluate.ngram import Ngram, TokenSource, exact_brier, fit_ngrams, log_prob
from calm.evaluate.reconstruction import LatentMoments, latent_moments, reconstruction, with_noise
from calm.evaluate.scores import AutoencoderReport, BrierReport, NoisyAccuracy
from calm.rng import PRNGKey, stream
from calm.text.shards import Data
from calm.worlds.world import World

# On CPU small batches stay in cache and are faster; an accelerator wants full ones.
TOKENS_PER_BATCH_CPU, TOKENS_PER_BATCH = 2048, 32768


def text_protocol(data: Data, split: str, *, block_tokens: int, chunk_size: int, seed: int = 0) -> TextProtocol:
    """The protocol of one split of prepared data, from its manifest."""
    source = data.manifest.source
    return TextProtocol(
        dataset=str(source["name"]),
        sha256=str(source["sha256"]),
        split=split,
        tokenizer=str(data.manifest.tokenizer["fingerprint"]),
        block_tokens=block_tokens,
        chunk_size=chunk_size,
        seed=seed,
    )


def checked(
    blocks: Int[np.ndarray, "R T"], document: Int[np.ndarray, "*r"], chunk_size: int, text: TextProtocol | None
) -> TextProtocol:
    """The protocol to stamp: `text`, or that of text which nobody named. Raises UsageError where it does not fit the
    blocks.
    """
    rows, block_tokens = blocks.shape
    if not rows or block_tokens % chunk_size or block_tokens < 2 * chunk_size:
        raise UsageError(
            f"evaluation needs blocks of at least 2 chunks of {chunk_size} tokens and a whole number of them, "
            f"got {rows} blocks of {block_tokens} tokens"
        )
    if document.shape != (rows,):
        raise UsageError(f"document must name the document of each block: {rows} blocks, {len(document)} entries")
    if text is None:
        return TextProtocol(
            dataset="unnamed",
            sha256="unknown",
            split="unknown",
            tokenizer="unknown",
            block_tokens=block_tokens,
            chunk_size=chunk_size,
        )
    if (text.block_tokens, text.chunk_size) != (block_tokens, chunk_size):
        raise UsageError(
            f"the protocol says blocks of {text.block_tokens} tokens and K={text.chunk_size}, "
            f"the data and model have {block_tokens} and K={chunk_size}"
        )
    return text


def _batches(blocks: Int[np.ndarray, "R T"], batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of one shape and the row numbers in them; the last one repeats its last row."""
    for start in range(0, len(blocks), batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), len(blocks) - 1)
        yield blocks[rows].astype(np.int32), rows.astype(np.int32)


def run_blocks(
    score: Callable[[np.ndarray, np.ndarray], Any], blocks: Int[np.ndarray, "R T"], batch_size: int | None
) -> tuple[Any, float]:
    """Scores every block: the results with one row a block, and tokens per second.

    The rate leaves out the first batch, which compiles, unless there is no other. Batches after it are queued without
    waiting.
    """
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    tokens_per_batch = TOKENS_PER_BATCH_CPU if jax.default_backend() == "cpu" else TOKENS_PER_BATCH
    batch_size = min(len(blocks), batch_size or max(1, tokens_per_batch // blocks.shape[1]))
    results, began, timed = [], time.perf_counter(), len(blocks)
    for number, (tokens, rows) in enumerate(_batches(blocks, batch_size)):
        results.append(score(tokens, rows))
        if number == 0 and len(blocks) > batch_size:
            jax.block_until_ready(results)
            began, timed = time.perf_counter(), len(blocks) - batch_size
    results = jax.device_get(results)
    rate = timed * blocks.shape[1] / max(time.perf_counter() - began, 1e-9)
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(blocks)], *results), rate


def sums_of(total: np.ndarray, count: int, document: np.ndarray, block_tokens: int) -> BlockSums:
    total = np.asarray(total, np.float64).reshape(len(document), -1)
    full = np.full(len(document), float(count))
    return BlockSums(total=total, count=full, document=np.asarray(document, np.int64), block_tokens=block_tokens)


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
    """Fits the unigram and the bigram model on `train` and scores both: the baselines beside a trained model."""
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
    """Exact Brier-n and nats per token of the law that wrote the text, given each block's own context: what no model passes in
    expectation.

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


@partial(jax.jit, static_argnames=("graph",))
def _score_autoencoder(
    graph: Any, params: Any, tokens: Int[Array, "B T"], rows: Int[Array, "B"], key: PRNGKey, sigmas: Float[Array, "L"]
) -> tuple[Float[Array, "B F"], LatentMoments]:
    """Right tokens (as chunks' worth) and right chunks of each block at every noise level and for a posterior
    sample.
    """
    autoencoder = nnx.merge(graph, params)
    chunks = tokens.reshape(len(tokens), -1, autoencoder.config.chunk_size)
    posterior = autoencoder.encode(chunks)

    keys = jax.vmap(partial(jax.random.fold_in, stream(key, "noise")))(rows)
    noise = jax.vmap(lambda key: with_noise(jnp.zeros(posterior.mean.shape[1:]), key, 1.0))(keys)

    def right(latents: Float[Array, "B N Z"]) -> Float[Array, "B 2"]:
        sums = reconstruction(autoencoder.decode(latents), chunks)
        return jnp.stack([sums.tokens.total / chunks.shape[-1], sums.chunks.total], -1)

    # The same standard normals at every level: a curve over sigma, not a cloud.
    levels = jax.lax.map(lambda sigma: right(posterior.mean + sigma * noise), sigmas)
    every = jnp.concatenate([levels, right(jax.vmap(type(posterior).sample)(posterior, keys))[None]])
    ones = jnp.ones(chunks.shape[1])
    moments = jax.vmap(lambda mean, std, kl: latent_moments(mean, std, kl, ones))(posterior.mean, posterior.std, posterior.kl())
    return every.transpose(1, 0, 2).reshape(len(tokens), -1), moments


def evaluate_autoencoder(
    autoencoder: Autoencoder,
    blocks: Int[np.ndarray, "R T"],
    document: Int[np.ndarray, "*r"],
    key: PRNGKey,
    *,
    noise: Sequence[float] = (0.3,),
    batch_size: int | None = None,
    text: TextProtocol | None = None,
    name: str = "autoencoder",
) -> AutoencoderReport:
    """Token and chunk accuracy from the posterior mean, from the mean plus noise of each standard deviation in `noise`
    (latent units), and from a posterior sample; and the spread of the latents.

    Raises:
        UsageError: blocks that do not fit the chunk size or the protocol, negative noise.
    """
    chunk_size = autoencoder.config.chunk_size
    text = checked(blocks, document, chunk_size, text)
    if any(not sigma >= 0 for sigma in noise):
        raise UsageError(f"noise is a list of standard deviations, each at least 0, got {list(noise)}")
    sigmas = [0.0, *[float(sigma) for sigma in noise if sigma]]
    graph, params = nnx.split(autoencoder)
    levels = np.asarray(sigmas, np.float32)
    (totals, moments), rate = run_blocks(
        lambda tokens, rows: _score_autoencoder(graph, params, tokens, rows, key, levels), blocks, batch_size
    )
    moments = LatentMoments(*(np.asarray(part, np.float64).sum(0) for part in moments))
    aggregate, posterior = np.asarray(moments.aggregate_std), np.asarray(moments.posterior_std)
    inverse = np.mean(1 / np.maximum(aggregate, 1e-12))
    sums = sums_of(totals, blocks.shape[1] // chunk_size, document, blocks.shape[1])
    intervals = bootstrap(sums, [lambda means, i=i: means[..., i] for i in range(totals.shape[1])])
    relative_posterior = float(np.mean(posterior / np.maximum(aggregate, 1e-12)))
    every = [
        NoisyAccuracy(sigma=sigma, relative=relative, tokens=intervals[2 * i], chunks=intervals[2 * i + 1])
        for i, (sigma, relative) in enumerate(
            [*[(sigma, float(sigma * inverse)) for sigma in sigmas], (float(posterior.mean()), relative_posterior)]
        )
    ]
    return AutoencoderReport(
        name=name,
        protocol=text,
        noise=every[:-1],
        sampled=every[-1],
        posterior_std=float(posterior.mean()),
        aggregate_std=float(aggregate.mean()),
        posterior_std_relative=relative_posterior,
        kl=float((moments.kl / moments.count).sum()),
        latent_dim=len(aggregate),
        active_dimensions=moments.active_dimensions,
        tokens_per_second=rate,
    )
