"""Measures what `calm.evaluate.diagnosis` judges: a next-vector model, stage by stage, on blocks of held-out text."""

import dataclasses
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from calm.core import generate
from calm.core.brier_lm import TextProtocol, brier_argmax
from calm.core.generate import HasSpecialIds
from calm.core.intervals import BlockSums, bootstrap
from calm.core.predictor import sample_chunks
from calm.core.sampler import StepKeys
from calm.core.temperature import BatchTemperature
from calm.decoders.context_decoder import recent_tokens
from calm.errors import UsageError
from calm.evaluate.blocks import checked, run_blocks, sums_of
from calm.evaluate.diagnosis import (
    Diagnosis,
    Stage,
    judge_alignment,
    judge_codec,
    judge_free_running,
    judge_head_mean,
    judge_one_sample,
    judge_voted,
)
from calm.evaluate.ngram import Bigram, Unigram, log_prob
from calm.rng import PRNGKey, row_keys, stream

ALIGNED_CHUNKS = 16  # chunks after the first on which alignment is scored: short prompts are what it is about
FREE_ROWS, FREE_TOKENS = 16, 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiagnoseOptions:
    """How much is drawn."""

    num_samples: int = 8
    candidates: int = 100
    """draws that vote at T = 1/2"""
    decoding: str = "argmax"

    def __post_init__(self) -> None:
        if self.num_samples < 2 or self.candidates < 2:
            raise UsageError("diagnose: num_samples and candidates must be at least 2")


def diagnose(
    predictor: Any,
    blocks: Int[np.ndarray, "R T"],
    document: Int[np.ndarray, "*r"],
    key: PRNGKey,
    *,
    special: HasSpecialIds,
    unigram: Unigram,
    bigram: Bigram,
    options: DiagnoseOptions | None = None,
    text: TextProtocol | None = None,
    name: str = "CALM",
) -> Diagnosis:
    """Judges the six stages of a next-vector model (`calm.models.NextVector`) on held-out blocks.

    Args:
        blocks, document: token blocks, and the document that each begins in. special: the tokenizer.
        unigram, bigram: fitted on the training text: the least that a sample must beat, and the judge of free-running text.

    Raises:
        UsageError: blocks that do not fit, or too few of them for an interval.
    """
    options = options or DiagnoseOptions()
    text = checked(blocks, document, predictor.chunk_size, text)
    if blocks.shape[1] < 4 * predictor.chunk_size or len(blocks) < 2:
        raise UsageError(f"diagnose needs at least 2 blocks of 4 chunks, got {len(blocks)} of {blocks.shape[1]} tokens")
    stages = (
        _codec(predictor, blocks, document, stream(key, "codec")),
        *_true_prefixes(predictor, blocks, document, stream(key, "prefixes"), unigram, options),
        _alignment(predictor, blocks, document, stream(key, "alignment"), special, options),
        _free_running(predictor, blocks, stream(key, "free"), special, bigram, options),
    )
    return Diagnosis(name=name, protocol=text, stages=stages)


# -- codec -------------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("graph",))
def _score_codec(
    graph: Any, params: Any, tokens: Int[Array, "B T"], rows: Int[Array, "B"], key: PRNGKey
) -> Float[Array, "B 3"]:
    """Tokens right from the posterior's mean, chunks right, and tokens right from a draw; sums over a block's chunks."""
    autoencoder = nnx.merge(graph, params).autoencoder
    chunks = tokens.reshape(len(tokens), -1, nnx.merge(graph, params).chunk_size)
    posterior = autoencoder.encode(chunks)
    keys = jax.vmap(partial(jax.random.fold_in, key))(rows)
    right = autoencoder.decode(posterior.mean) == chunks
    drawn = autoencoder.decode(jax.vmap(type(posterior).sample)(posterior, keys)) == chunks
    return jnp.stack([right.mean(-1).sum(1), right.all(-1).sum(1).astype(jnp.float32), drawn.mean(-1).sum(1)], -1)


def _codec(predictor: Any, blocks: np.ndarray, document: np.ndarray, key: PRNGKey) -> Stage:
    graph, params = nnx.split(predictor)
    totals, _ = run_blocks(lambda tokens, rows: _score_codec(graph, params, tokens, rows, key), blocks, None)
    sums = sums_of(totals, blocks.shape[1] // predictor.chunk_size, document, blocks.shape[1])
    return judge_codec(*bootstrap(sums, [lambda means, i=i: means[..., i] for i in range(3)]))


# -- true prefixes ----------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("graph", "options", "has_latents"))
def _score_prefixes(
    graph: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    rows: Int[Array, "B"],
    key: PRNGKey,
    center: Float[Array, "Z"],
    unigram: Float[Array, "V"],
    *,
    options: DiagnoseOptions,
    has_latents: bool,
) -> Float[Array, "B 10"]:
    predictor: Any = nnx.merge(graph, params)
    chunks = tokens.reshape(len(tokens), -1, predictor.chunk_size)
    targets = chunks[:, 1:]
    hidden, _ = predictor.hidden(chunks[:, :-1])
    previous = recent_tokens(chunks[:, :-1], predictor.reach)
    count = options.num_samples

    def block(row: Array, hidden: Array, previous: Array, targets: Array) -> Float[Array, "10"]:
        of_row = jax.random.fold_in(key, row)
        residual, total, right_mean = jnp.zeros(()), jnp.ones(()), jnp.zeros(())
        if has_latents:
            latents = predictor.lm.head(hidden, predictor.draw_noise(stream(of_row, "mean"), (count, len(hidden))).latent)
            truth, mean = predictor.autoencoder.encode(targets).mean, latents.mean(0)
            # The squared distance of the mean of S samples has the samples' variance / S in it; that is taken out again.
            noise = jnp.square(latents - mean).sum((0, -1)) / (count * (count - 1))
            residual = (jnp.square(mean - truth).sum(-1) - noise).sum()
            total = jnp.square(truth - center).sum()
            right_mean = (predictor.autoencoder.decode(mean) == targets).sum()
        samples = sample_chunks(
            predictor, stream(of_row, "one"), hidden, previous, options.candidates, decoding=options.decoding
        )
        few = samples[:count]
        brier = brier_argmax(few, targets)[..., 0].sum()
        first = targets[..., 0]
        baseline = (2 * unigram[first] - jnp.square(unigram).sum()).sum()
        hits = (few[..., 0] == first).mean(0).sum()
        equal = (few[1:] == few[:-1]).all(-1).mean(0).sum()
        keys = row_keys(stream(of_row, "vote"), len(hidden))
        choice = BatchTemperature(num_candidates=options.candidates).sample(StepKeys(keys, keys), _Drawn(samples))
        voted, one = (choice.chunk == targets).sum(), (few == targets).mean(0).sum()
        fallback = choice.fell_back.sum()
        return jnp.stack([residual, total, right_mean, brier, baseline, hits, equal, voted, one, fallback]).astype(jnp.float32)

    return jax.lax.map(lambda each: block(*each), (rows, hidden, previous, targets))


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """Chunks that were drawn already, as what a sampler draws from."""

    chunks: Int[Array, "S B K"]

    @property
    def alive(self) -> Bool[Array, "B"]:
        return jnp.ones(self.chunks.shape[1], bool)

    def draw(self, keys: Array, num_draws: int) -> Int[Array, "S B K"]:
        return self.chunks[:num_draws]

    def repeats(self, chunks: Int[Array, "S B K"], length: int) -> Bool[Array, "S B"]:
        return jnp.zeros(chunks.shape[:2], bool)


@partial(jax.jit, static_argnames=("graph",))
def _mean_latent(graph: Any, params: Any, tokens: Int[Array, "B T"], rows: Int[Array, "B"]) -> Float[Array, "B Z"]:
    predictor: Any = nnx.merge(graph, params)
    return predictor.autoencoder.encode(tokens.reshape(len(tokens), -1, predictor.chunk_size)[:, 1:]).mean.mean(1)


def _true_prefixes(
    predictor: Any, blocks: np.ndarray, document: np.ndarray, key: PRNGKey, unigram: Unigram, options: DiagnoseOptions
) -> tuple[Stage, Stage, Stage]:
    """Head mean, one sample and voted sample: everything that is asked at true prefixes, in one pass."""
    graph, params = nnx.split(predictor)
    writer = getattr(predictor.lm, "context_decoder", None)
    has_latents = writer is None or writer.config.use_latent
    center = run_blocks(partial(_mean_latent, graph, params), blocks, None)[0].mean(0)
    score = partial(_score_prefixes, graph, params, options=options, has_latents=has_latents)
    probability = jnp.asarray(unigram.probability, jnp.float32)
    totals, _ = run_blocks(lambda tokens, rows: score(tokens, rows, key, center, probability), blocks, None)
    positions, chunk_size = blocks.shape[1] // predictor.chunk_size - 1, predictor.chunk_size
    sums = sums_of(totals, positions, document, blocks.shape[1])
    means, points = sums.means, 1 / chunk_size
    explained, brier, above, gain = bootstrap(
        sums,
        [
            lambda m: 1 - m[..., 0] / m[..., 1],
            lambda m: 100 * m[..., 3],
            lambda m: 100 * (m[..., 3] - m[..., 4]),
            lambda m: (m[..., 7] - m[..., 8]) * points,
        ],
    )
    most_frequent = float(np.mean(blocks[:, chunk_size:] == int(np.argmax(unigram.probability))))
    return (
        judge_head_mean(explained if has_latents else None, float(means[2]) * points, most_frequent),
        judge_one_sample(brier, above, float(means[5]), float(means[6])),
        judge_voted(gain, float(means[7]) * points, float(means[9]), options.candidates),
    )


# -- prompts ----------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("graph", "num_samples", "decoding"))
def _score_aligned(
    graph: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    rows: Int[Array, "B"],
    key: PRNGKey,
    begin: Int[Array, ""],
    num_samples: int,
    decoding: str,
) -> Float[Array, "B X"]:
    """Brier-1 after a first chunk with 0 .. K-1 tokens behind begin ids, and after the whole first chunk."""
    predictor: Any = nnx.merge(graph, params)
    size = predictor.chunk_size
    chunks = tokens.reshape(len(tokens), -1, size)[:, : ALIGNED_CHUNKS + 1]
    read, targets = chunks[:, :-1], chunks[:, 1:]

    def score(kept: Int[Array, ""]) -> Float[Array, "B"]:
        first = jnp.where(jnp.arange(size) < size - kept, begin, read[:, 0])
        filled = read.at[:, 0].set(first)
        hidden, _ = predictor.hidden(filled)
        keys = jax.vmap(partial(jax.random.fold_in, key))(rows)  # the same draws for every filling

        def draw(key: Array, hidden: Array, previous: Array) -> Int[Array, "S N K"]:
            return sample_chunks(predictor, key, hidden, previous, num_samples, decoding=decoding)

        samples = jax.vmap(draw, out_axes=1)(keys, hidden, recent_tokens(filled, predictor.reach))
        return brier_argmax(samples, targets)[..., 0].sum(1)

    return jax.lax.map(score, jnp.arange(size + 1)).T


def _alignment(
    predictor: Any, blocks: np.ndarray, document: np.ndarray, key: PRNGKey, special: HasSpecialIds, options: DiagnoseOptions
) -> Stage:
    graph, params = nnx.split(predictor)
    size = predictor.chunk_size
    score = partial(_score_aligned, graph, params, num_samples=options.num_samples, decoding=options.decoding)
    totals, _ = run_blocks(lambda tokens, rows: score(tokens, rows, key, jnp.int32(special.begin_id)), blocks, None)
    positions = min(ALIGNED_CHUNKS, blocks.shape[1] // size - 1)
    sums = BlockSums(
        total=np.asarray(totals, np.float64),
        count=np.full(len(blocks), float(positions)),
        document=np.asarray(document, np.int64),
        block_tokens=blocks.shape[1],
    )
    losses = bootstrap(sums, [lambda means, rest=rest: 100 * (means[..., size] - means[..., rest]) for rest in range(size)])
    prefix = blocks[:2, : 4 * size].reshape(2, -1, size)
    padded = np.concatenate([np.full((2, 3, size), special.begin_id), prefix], axis=1)
    state = predictor.init_state(2, padded.shape[1], jnp.full((2,), 3, jnp.int32))
    alone = predictor.hidden(jnp.asarray(prefix, jnp.int32))[0]
    in_batch = predictor.hidden(jnp.asarray(padded, jnp.int32), state)[0][:, 3:]
    return judge_alignment(100 * float(sums.means[size]), dict(enumerate(losses)), _relative(in_batch, alone))


def _free_running(
    predictor: Any,
    blocks: np.ndarray,
    key: PRNGKey,
    special: HasSpecialIds,
    bigram: Bigram,
    options: DiagnoseOptions,
) -> Stage:
    """Continues the first half of blocks, and compares with samples after their true second half."""
    size, tokens = predictor.chunk_size, blocks[:FREE_ROWS]
    half = blocks.shape[1] // size // 2 * size
    length = min(FREE_TOKENS, blocks.shape[1] - half - size) // size * size
    prompts, rest = tokens[:, :half], tokens[:, half : half + length]
    keys = row_keys(stream(key, "write"), len(tokens))
    made = generate(predictor, list(prompts), keys, special=special, max_tokens=length, decoding=options.decoding, context=None)
    whole, step_by_step, forced = _read_twice(predictor, stream(key, "forced"), tokens[:, : half + length], half, options)
    last = prompts[:, -1]
    nats = -log_prob(bigram, last, made.tokens)
    written = np.arange(length) < made.lengths[:, None]
    chunks = rest.reshape(len(rest), -1, size)
    before = np.concatenate([last[:, None], chunks[:, :-1, -1]], axis=1)
    after_truth = -log_prob(bigram, before, forced)
    pairs = [pair for row, n in zip(made.tokens, made.lengths, strict=True) for pair in itertools.pairwise(row[:n].tolist())]
    return judge_free_running(
        state=_relative(step_by_step, whole),
        drift=float(nats[written].mean() - after_truth.mean()) if written.any() else 0.0,
        repeated=_repeated(made.tokens, size, made.lengths),
        repeated_in_text=_repeated(rest, size, np.full(len(rest), length)),
        early_ends=float(np.mean(made.ended & (made.lengths < length / 4))),
        distinct=len(set(pairs)) / max(len(pairs), 1),
    )


def _read_twice(
    predictor: Any, key: PRNGKey, tokens: np.ndarray, half: int, options: DiagnoseOptions
) -> tuple[Array, Array, np.ndarray]:
    """Hidden states of the second half, read at once and chunk by chunk, and one sample after each true prefix."""
    chunks = jnp.asarray(tokens, jnp.int32).reshape(len(tokens), -1, predictor.chunk_size)
    begin = half // predictor.chunk_size
    graph, params = nnx.split(predictor)

    @jax.jit
    def read(params: Any, chunks: Array) -> tuple[Array, Array, Array]:
        model: Any = nnx.merge(graph, params)
        whole = model.hidden(chunks[:, :-1])[0][:, begin - 1 :]
        state = model.init_state(len(chunks), chunks.shape[1])
        state = model.hidden(chunks[:, : begin - 1], state)[1] if begin > 1 else state

        def step(state: Any, chunk: Array) -> tuple[Any, Array]:
            hidden, state = model.hidden(chunk[:, None], state)
            return state, hidden[:, 0]

        _, stepped = jax.lax.scan(step, state, jnp.moveaxis(chunks[:, begin - 1 : -1], 1, 0))
        previous = recent_tokens(chunks[:, :-1], model.reach)[:, begin - 1 :]
        sample = sample_chunks(model, key, whole, previous, 1, decoding=options.decoding)[0]
        return whole, jnp.moveaxis(stepped, 0, 1), sample

    whole, stepped, sample = read(params, chunks)
    return whole, stepped, np.asarray(sample)


def _relative(found: Array, expected: Array) -> float:
    """The largest |difference| of a hidden state over its norm."""
    difference = jnp.linalg.norm(found - expected, axis=-1) / jnp.maximum(jnp.linalg.norm(expected, axis=-1), 1e-9)
    return float(difference.max())


def _repeated(tokens: np.ndarray, chunk_size: int, lengths: np.ndarray) -> float:
    """Share of whole written chunks that equal the one before."""
    chunks = tokens.reshape(len(tokens), -1, chunk_size)
    counted = np.arange(1, chunks.shape[1]) < (lengths // chunk_size)[:, None]
    same = (chunks[:, 1:] == chunks[:, :-1]).all(-1) & counted
    return float(same.sum() / max(counted.sum(), 1))
