"""Measures what `calm.evaluate.inspection` shows of an autoencoder, on blocks of held-out text."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.brier_lm import TextProtocol
from calm.core.intervals import BlockSums, Interval, bootstrap
from calm.errors import UsageError
from calm.evaluate.blocks import checked, run_blocks, sums_of
from calm.evaluate.geometry import covariance, effective_rank, participation_ratio
from calm.evaluate.inspection import AutoencoderInspection, Interpolation, Neighbours, NoiseCurve
from calm.evaluate.reconstruction import LatentMoments, latent_moments
from calm.rng import PRNGKey, stream

LEVELS = tuple(round(0.1 * level, 1) for level in range(11))
PLACES = tuple(round(0.1 * place, 1) for place in range(11))


def inspect_autoencoder(
    autoencoder: Any,
    blocks: Int[np.ndarray, "R T"],
    document: Int[np.ndarray, "*r"],
    key: PRNGKey,
    *,
    levels: Sequence[float] = LEVELS,
    special_ids: Sequence[int] = (),
    text: TextProtocol | None = None,
    name: str = "autoencoder",
) -> AutoencoderInspection:
    """Accuracy under noise in three units, the dimensions' statistics, and how smoothly latents change with text.

    Args:
        autoencoder: `calm.autoencoder.Autoencoder`, or a module with its `encode`, `decode` and `config`.
        levels: standard deviations of the noise; the first must be 0. special_ids: tokens that no chunk is changed to.

    Raises:
        UsageError: blocks that do not fit, or levels that do not start at 0.
    """
    text = checked(blocks, document, autoencoder.config.chunk_size, text)
    if not levels or levels[0] != 0 or min(levels) < 0:
        raise UsageError(f"levels are standard deviations that start at 0, got {list(levels)}")
    graph, params = nnx.split(autoencoder)
    moments, (total, products) = run_blocks(partial(_moments, graph, params), blocks, None)[0]
    moments = LatentMoments(*(np.asarray(part, np.float64).sum(0) for part in moments))
    aggregate, posterior = np.asarray(moments.aggregate_std), np.asarray(moments.posterior_std)
    spread = covariance(*(np.asarray(part, np.float64).sum(0) for part in (total, products)), count=float(moments.count))

    def accuracy(unit: str, scale: np.ndarray, levels: Sequence[float]) -> tuple[list[Interval], list[Interval]]:
        """Tokens and chunks right at each level of noise."""
        score = partial(_right_under_noise, graph, params, own_std=unit == "own")
        sigmas, widths = jnp.asarray(levels, jnp.float32), jnp.asarray(scale, jnp.float32)
        totals, _ = run_blocks(lambda tokens, rows: score(tokens, rows, stream(key, "noise"), sigmas, widths), blocks, None)
        sums = sums_of(totals, blocks.shape[1] // autoencoder.config.chunk_size, document, blocks.shape[1])
        return _pairs(sums)

    scales = {"latent": np.ones_like(aggregate), "posterior": posterior, "aggregate": aggregate}
    curves = [
        NoiseCurve(unit=unit, levels=list(levels), tokens=tokens, chunks=chunks)
        for unit, scale in scales.items()
        for tokens, chunks in [accuracy(unit, scale, levels)]
    ]
    sampled_tokens, sampled_chunks = accuracy("own", np.ones_like(aggregate), [1.0])
    way, near = _smoothness(autoencoder, blocks, stream(key, "neighbours"), aggregate, special_ids)
    return AutoencoderInspection(
        name=name,
        protocol=text,
        curves=curves,
        sampled_tokens=sampled_tokens[0],
        sampled_chunks=sampled_chunks[0],
        kl=np.asarray(moments.kl / moments.count),
        posterior_std=posterior,
        aggregate_std=aggregate,
        variance_of_means=np.asarray(moments.variance_of_means),
        effective_rank=effective_rank(spread),
        participation_ratio=participation_ratio(spread),
        interpolation=way,
        neighbours=near,
    )


def _pairs(sums: BlockSums) -> tuple[list[Interval], list[Interval]]:
    count = sums.total.shape[1]
    intervals = bootstrap(sums, [lambda means, i=i: means[..., i] for i in range(count)])
    return intervals[: count // 2], intervals[count // 2 :]


@partial(jax.jit, static_argnames=("graph",))
def _moments(
    graph: Any, params: Any, tokens: Int[Array, "B T"], rows: Int[Array, "B"]
) -> tuple[LatentMoments, tuple[Float[Array, "B Z"], Float[Array, "B Z Z"]]]:
    """Sums over each block's chunks: of the dimensions' statistics, of means, and of their outer products."""
    autoencoder = nnx.merge(graph, params)
    posterior = autoencoder.encode(tokens.reshape(len(tokens), -1, autoencoder.config.chunk_size))
    ones = jnp.ones(posterior.mean.shape[1])
    moments = jax.vmap(lambda mean, std, kl: latent_moments(mean, std, kl, ones))(posterior.mean, posterior.std, posterior.kl())
    products = jnp.einsum("bnx,bny->bxy", posterior.mean, posterior.mean, precision="highest")
    return moments, (posterior.mean.sum(1), products)


@partial(jax.jit, static_argnames=("graph", "own_std"))
def _right_under_noise(
    graph: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    rows: Int[Array, "B"],
    key: PRNGKey,
    sigmas: Float[Array, "L"],
    scale: Float[Array, "Z"],
    *,
    own_std: bool,
) -> Float[Array, "B F"]:
    """Tokens right (as chunks' worth) at every level, then chunks right; `own_std`: noise as each chunk's posterior has it."""
    autoencoder = nnx.merge(graph, params)
    chunks = tokens.reshape(len(tokens), -1, autoencoder.config.chunk_size)
    posterior = autoencoder.encode(chunks)
    keys = jax.vmap(partial(jax.random.fold_in, key))(rows)
    if own_std:
        noise = jax.vmap(type(posterior).sample)(posterior, keys) - posterior.mean
    else:
        noise = scale * jax.vmap(lambda key: jax.random.normal(key, posterior.mean.shape[1:]))(keys)

    def right(sigma: Float[Array, ""]) -> Float[Array, "2 B"]:
        equal = autoencoder.decode(posterior.mean + sigma * noise) == chunks
        return jnp.stack([equal.mean(-1).sum(1), equal.all(-1).sum(1).astype(jnp.float32)])

    return jnp.moveaxis(jax.lax.map(right, sigmas), 0, 1).reshape(-1, len(tokens)).T


def _smoothness(
    autoencoder: Any, blocks: np.ndarray, key: PRNGKey, aggregate: np.ndarray, special_ids: Sequence[int]
) -> tuple[Interpolation, Neighbours]:
    """On up to 4096 chunks: the straight way to a random other chunk, and the distance to a chunk with one token changed."""
    size, vocab_size = autoencoder.config.chunk_size, autoencoder.config.vocab_size
    chunks = jnp.asarray(blocks.reshape(-1, size)[:4096], jnp.int32)
    keys = {name: stream(key, name) for name in ("other", "place", "token", "draw")}
    others = chunks[jax.random.permutation(keys["other"], len(chunks))]
    ordinary = jnp.asarray(np.setdiff1d(np.arange(vocab_size), np.asarray(special_ids, int)), jnp.int32)
    place = jax.random.randint(keys["place"], (len(chunks), 1), 0, size)
    token = ordinary[jax.random.randint(keys["token"], (len(chunks), 1), 0, len(ordinary))]
    changed = jnp.where(jnp.arange(size) == place, token, chunks)
    graph, params = nnx.split(autoencoder)
    scale = jnp.asarray(np.maximum(aggregate, 1e-6), jnp.float32)

    @jax.jit
    def measure(params: Any) -> tuple[Array, Array]:
        model = nnx.merge(graph, params)
        here, there, near = (model.encode(each) for each in (chunks, others, changed))
        draw = here.sample(keys["draw"]) - here.mean

        def root_mean_square(difference: Array, counts: Array) -> Array:
            squares = jnp.square(difference / scale).mean(-1)
            return jnp.sqrt((squares * counts).sum() / jnp.maximum(counts.sum(), 1))

        differ, moved = (chunks != others).any(-1), (chunks != changed).any(-1)
        distances = jnp.stack(
            [
                root_mean_square(draw, jnp.ones(len(chunks))),
                root_mean_square(near.mean - here.mean, moved),
                root_mean_square(there.mean - here.mean, differ),
            ]
        )

        def shares(place: Array) -> Array:
            found = model.decode(here.mean + place * (there.mean - here.mean))
            different = chunks != others  # tokens that both share say nothing about the way
            count = jnp.maximum(different.sum(), 1)
            return jnp.stack([((found == end) & different).sum() / count for end in (chunks, others)])

        return jax.lax.map(shares, jnp.asarray(PLACES, jnp.float32)), distances

    shares, distances = map(np.asarray, measure(params))
    way = Interpolation(places=list(PLACES), start=shares[:, 0].tolist(), end=shares[:, 1].tolist())
    draw, one, every = map(float, distances)
    return way, Neighbours(posterior_draw=draw, one_token=one, all_tokens=every)
