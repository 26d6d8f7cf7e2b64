"""Latent futures: continuations of a prompt by a next-vector model, as latents that gradients can pass through.

S futures of N chunks start from the prompt's state (`Backbone.fork`: one trunk, S branches). At every step
a branch reads its last chunk, the head maps hidden state and noise to a latent, and the decoder writes the latent's chunk,
which is read next. Tokens between steps are not differentiable; `Feedback` sets what replaces their gradient:

    constant            none: each latent depends on the weights of its own step alone
    straight_through    values as in `constant`; the gradient passes as if the inputs (the tokens' embeddings, the encoder's
                        mean) were their expectation under the decoder (embeddings) or the latent itself (mean)
    latent              the latent itself is read, for stems that read nothing else: the exact gradient of the whole
                        trajectory. Values differ from generation, which reads the written chunk's mean

Straight-through: Bengio et al. 2013, arXiv:1308.3432.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calm.core.chunk_decoder import recent_tokens
from calm.core.dense import matmul
from calm.core.predictor import NextVector, Noise
from calm.core.vocabulary import ScoringTable
from calm.errors import UsageError
from calm.rng import PRNGKey, stream
from calm.text.chunking import NOTHING

Feedback = Literal["constant", "straight_through", "latent"]


class PromptState(NamedTuple):
    """State after a prompt, and S branches after all its chunks but the last."""

    hidden: Float[Array, "D"]
    """after the last chunk, for the first new latent"""
    state: Any
    chunk: Int[Array, "S K"]
    """the prompt's last chunk, which every branch reads first"""
    previous: Int[Array, "S w"]


class Futures(NamedTuple):
    """N steps of S branches."""

    latents: Float[Array, "S N Z"]
    chunks: Int[Array, "S N K"]


def require_steerable(predictor: Any) -> NextVector:
    """The predictor. Raises UsageError for a model whose text does not depend on latents."""
    if not isinstance(predictor, NextVector):
        raise UsageError("alignment works on latents, and a token model has none; name the run of a latent language model")
    writer = predictor.lm.context_decoder
    if writer is not None and not writer.reads_latent:
        raise UsageError("alignment works on latents, and this model's context decoder reads none (use_latent = false)")
    return predictor


def default_feedback(predictor: NextVector) -> Feedback:
    """`latent` where the gradient is exact, else `constant`."""
    return "latent" if predictor.lm.config.stem == "continuous" else "constant"


def read_prompt(
    predictor: NextVector, chunks: Int[Array, "N K"], start: Int[Array, ""], num_futures: int, num_chunks: int
) -> PromptState:
    """Reads a prompt of at least two chunks, padding included; it begins at chunk `start`."""
    length = chunks.shape[0]
    state = predictor.init_state(1, length, start[None], rewindable=True)
    hidden, state = predictor.hidden(chunks[None], state)
    state = predictor.fork(state, jnp.array([length - 1]), num_futures, num_chunks)
    known = jnp.where(jnp.arange(length)[:, None] < start, NOTHING, chunks)
    previous = recent_tokens(known, predictor.reach)[-1]

    def each(x: Array) -> Array:
        return jnp.broadcast_to(x, (num_futures, *x.shape))

    return PromptState(hidden[0, -1], state, each(chunks[-1]), each(previous))


def draw_noise(predictor: NextVector, key: PRNGKey, num_futures: int, num_chunks: int) -> Noise:
    """Noise of S futures of N chunks, `[N S ...]`; that of a single future is as in `calm.core.generate`."""
    keys = jax.vmap(lambda step: stream(key, "draw", step))(jnp.arange(num_chunks))
    return jax.vmap(lambda key: predictor.draw_noise(key, (num_futures,), predictor.decoding))(keys)


class SoftChunk(NamedTuple):
    """Differentiable input of a branch, in place of the chunk that it wrote."""

    latent: Float[Array, "S Z"]
    embedded: Float[Array, "S K D"] | None
    """expected embeddings under the decoder; None for a stem that reads no tokens"""


def futures(
    predictor: NextVector,
    prompt: PromptState,
    noise: Noise,
    table: ScoringTable,
    *,
    feedback: Feedback = "constant",
    shift: Float[Array, "Z"] | None = None,
) -> Futures:
    """S continuations of N chunks, one for each noise `[N S ...]`; `table` excludes banned tokens.

    `shift` is added to every latent before its chunk is written, which steers without a change of weights.
    """

    def step(carry: tuple[Any, Array, Array, SoftChunk | None], noise: Noise) -> tuple[Any, Futures]:
        state, chunk, previous, read = carry
        hidden, state = _reads(predictor, state, chunk, read, feedback)
        assert noise.latent is not None
        latent = predictor.lm.head(hidden, noise.latent[None])[0]
        latent = latent if shift is None else latent + shift
        chunk = _written(predictor, hidden, previous, latent, noise.uniforms, table)
        if feedback != "constant":
            read = SoftChunk(latent, _expected(predictor, hidden, previous, latent, chunk))
        previous = jnp.concatenate([previous, chunk], axis=1)[:, chunk.shape[1] :]
        return (state, chunk, previous, read), Futures(latent, chunk)

    read = None
    if feedback != "constant":
        rows = predictor.lm.stem.embedding
        read = SoftChunk(predictor.autoencoder.encode(prompt.chunk).mean, None if rows is None else rows[...][prompt.chunk])
        read = jax.lax.stop_gradient(read)
    _, written = jax.lax.scan(step, (prompt.state, prompt.chunk, prompt.previous, read), noise)
    return Futures(*(jnp.moveaxis(x, 0, 1) for x in written))


def _written(
    predictor: NextVector,
    hidden: Float[Array, "S D"],
    previous: Int[Array, "S w"],
    latent: Float[Array, "S Z"],
    uniforms: Float[Array, "S K 2"] | None,
    table: ScoringTable,
) -> Int[Array, "S K"]:
    """The chunk of each latent, by the model's own decoding."""
    hidden, latent = jax.lax.stop_gradient((hidden, latent))
    uniforms = None if uniforms is None else uniforms[None]
    return predictor.write_latents(hidden, previous, latent[None], uniforms, decoding=predictor.decoding, table=table)[0]


def _reads(
    predictor: NextVector, state: Any, chunk: Int[Array, "S K"], read: SoftChunk | None, feedback: Feedback
) -> tuple[Float[Array, "S D"], Any]:
    """Lets every branch read its last chunk."""
    if read is None:
        hidden, state = predictor.hidden(chunk[None], state)
        return hidden[0], state
    lm, latents, embedded = predictor.lm, None, None
    if lm.stem.reads_latents:
        latents = read.latent
        if feedback == "straight_through":
            latents = _through(predictor.autoencoder.encode(chunk).mean, latents)
        latents = latents[None]
    if lm.stem.embedding is not None and read.embedded is not None:
        embedded = _through(lm.stem.embedding[...][chunk], read.embedded)[None]
    hidden, state = lm.read(chunk[None], state, latents, embedded)
    return hidden[0], state


def _expected(
    predictor: NextVector,
    hidden: Float[Array, "S D"],
    previous: Int[Array, "S w"],
    latent: Float[Array, "S Z"],
    chunk: Int[Array, "S K"],
) -> Float[Array, "S K D"] | None:
    """Expected embeddings under the decoder at each position, given the tokens before it; None where the stem reads none."""
    if predictor.lm.stem.embedding is None:
        return None
    writer = predictor.lm.context_decoder
    if writer is None:
        states = predictor.autoencoder.decode_states(latent)
    else:
        states = writer.teacher_forced(writer.plan(hidden, latent[None]), previous, chunk)[0]
    logits = matmul(states.reshape(-1, states.shape[-1]), predictor.table.T, predictor.precision)
    odds = jax.nn.softmax(logits, axis=-1)
    rows = jax.lax.stop_gradient(predictor.lm.stem.embedding[...])
    return matmul(odds, rows, predictor.precision).reshape(*chunk.shape, -1)


def _through(value: Float[Array, "*b X"], smooth: Float[Array, "*b X"]) -> Float[Array, "*b X"]:
    """`value`, with the gradients of both."""
    return value + (smooth - jax.lax.stop_gradient(smooth))
