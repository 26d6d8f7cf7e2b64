"""A model on its own text beside the same model on the true text: hidden states, likelihood under a bigram, repetition."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from calm.core.chunk_decoder import Decoding, recent_tokens
from calm.core.generate import HasSpecialIds, generate
from calm.core.predictor import sample_chunks
from calm.evaluate.ngram import Bigram, log_prob
from calm.rng import PRNGKey, row_keys, stream

FREE_ROWS, FREE_TOKENS = 16, 128


class FreeRunning(NamedTuple):
    """Differences between the model on its own text and on the true text."""

    state: float
    """largest relative difference of hidden states read chunk by chunk and at once"""
    drift: float
    """nats a token under a bigram, of what it writes alone minus what it writes after true text"""
    repeated: float
    """share of written chunks that equal the one before"""
    repeated_in_text: float
    """the same of the true text"""
    early_ends: float
    """share of continuations that end in their first quarter"""
    distinct: float
    """share of different pairs among all pairs of neighbouring tokens"""


def run_free(
    predictor: Any,
    blocks: Int[np.ndarray, "R T"],
    key: PRNGKey,
    *,
    special: HasSpecialIds,
    bigram: Bigram,
    decoding: Decoding,
) -> FreeRunning:
    """Continues the first half of blocks, and compares with samples after their true second half."""
    size, tokens = predictor.chunk_size, blocks[:FREE_ROWS]
    half = blocks.shape[1] // size // 2 * size
    length = min(FREE_TOKENS, blocks.shape[1] - half - size) // size * size
    prompts, rest = tokens[:, :half], tokens[:, half : half + length]
    keys = row_keys(stream(key, "write"), len(tokens))
    made = generate(predictor, list(prompts), keys, special=special, max_tokens=length, decoding=decoding, context=None)
    whole, step_by_step, forced = _read_twice(predictor, stream(key, "forced"), tokens[:, : half + length], half, decoding)
    last = prompts[:, -1]
    nats = -log_prob(bigram, last, made.tokens)
    written = np.arange(length) < made.lengths[:, None]
    chunks = rest.reshape(len(rest), -1, size)
    before = np.concatenate([last[:, None], chunks[:, :-1, -1]], axis=1)
    after_truth = -log_prob(bigram, before, forced)
    pairs = [pair for row, n in zip(made.tokens, made.lengths, strict=True) for pair in itertools.pairwise(row[:n].tolist())]
    return FreeRunning(
        state=relative_difference(step_by_step, whole),
        drift=float(nats[written].mean() - after_truth.mean()) if written.any() else 0.0,
        repeated=_repeated(made.tokens, size, made.lengths),
        repeated_in_text=_repeated(rest, size, np.full(len(rest), length)),
        early_ends=float(np.mean(made.ended & (made.lengths < length / 4))),
        distinct=len(set(pairs)) / max(len(pairs), 1),
    )


def _read_twice(
    predictor: Any, key: PRNGKey, tokens: np.ndarray, half: int, decoding: Decoding
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
        sample = sample_chunks(model, key, whole, previous, 1, decoding=decoding)[0]
        return whole, jnp.moveaxis(stepped, 0, 1), sample

    whole, stepped, sample = read(params, chunks)
    return whole, stepped, np.asarray(sample)


def relative_difference(found: Array, expected: Array) -> float:
    """The largest |difference| of a hidden state over its norm."""
    difference = jnp.linalg.norm(found - expected, axis=-1) / jnp.maximum(jnp.linalg.norm(expected, axis=-1), 1e-9)
    return float(difference.max())


def _repeated(tokens: np.ndarray, chunk_size: int, lengths: np.ndarray) -> float:
    """Share of whole written chunks that equal the one before."""
    chunks = tokens.reshape(len(tokens), -1, chunk_size)
    counted = np.arange(1, chunks.shape[1]) < (lengths // chunk_size)[:, None]
    same = (chunks[:, 1:] == chunks[:, :-1]).all(-1) & counted
    return float(same.sum() / max(counted.sum(), 1))
