"""Latent futures: what a next-vector model would write behind a prompt, as latents through which a gradient can run.

S futures of N chunks part from the prompt's state (`calm.nn.Backbone.fork`: one trunk, S branches). At every step a branch
reads its last chunk, the head turns hidden state and noise into a latent, and the decoder writes the latent's chunk. The chunk
is what is read next, so tokens stand between one step and the next, and tokens have no slope. `Feedback` says what the
gradient does:

    constant            it ends at the tokens: a latent answers for the weights of its own step
    straight_through    the values are those of `constant`; the gradient passes as if what is read (the tokens' embeddings, the
                        encoder's mean) were its expectation under the decoder (embeddings) or the latent itself (mean)
    latent              the latent itself is read, which only a stem that reads nothing else can do: the gradient is exact,
                        through the whole trajectory. Values differ from generation's, where the written chunk's mean is read

Straight-through: Bengio et al. 2013, arXiv:1308.3432.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from calm.core.decoder import ScoringTable
from calm.core.dense import matmul
from calm.core.generate import LENGTH_STEP
from calm.core.predictor import NextVector, Noise
from calm.decoders.context_decoder import recent_tokens
from calm.errors import UsageError
from calm.rng import PRNGKey, stream
from calm.text.chunking import NOTHING, pad_prompts

Feedback = Literal["constant", "straight_through", "latent"]


class Begun(NamedTuple):
    """A prompt, read, and S branches behind all its chunks but the last."""

    hidden: Float[Array, "D"]
    """behind the last chunk: what the first new latent is drawn from"""
    state: Any
    chunk: Int[Array, "S K"]
    """the prompt's last chunk, which every branch reads first"""
    previous: Int[Array, "S w"]


class Futures(NamedTuple):
    """What S branches wrote in N steps."""

    latents: Float[Array, "S N Z"]
    chunks: Int[Array, "S N K"]


def require_steerable(predictor: Any) -> NextVector:
    """Raises UsageError for a model whose text does not follow from latents."""
    if not isinstance(predictor, NextVector):
        raise UsageError("alignment works on latents, and a token model has none; name the run of a latent language model")
    writer = predictor.lm.context_decoder
    if writer is not None and not writer.config.use_latent:
        raise UsageError("alignment works on latents, and this model's context decoder reads none (use_latent = false)")
    return predictor


def default_feedback(predictor: NextVector) -> Feedback:
    """The exact gradient where there is one, else that of each step."""
    return "latent" if predictor.lm.config.stem == "continuous" else "constant"


def begin(predictor: NextVector, chunks: Int[Array, "N K"], start: Int[Array, ""], num_futures: int, num_chunks: int) -> Begun:
    """Reads a prompt of at least two chunks, padding among them; its row begins at chunk `start`."""
    length = chunks.shape[0]
    state = predictor.init_state(1, length, start[None], rewindable=True)
    hidden, state = predictor.hidden(chunks[None], state)
    state = predictor.fork(state, jnp.array([length - 1]), num_futures, num_chunks)
    known = jnp.where(jnp.arange(length)[:, None] < start, NOTHING, chunks)
    previous = recent_tokens(known, predictor.reach)[-1]

    def each(x: Array) -> Array:
        return jnp.broadcast_to(x, (num_futures, *x.shape))

    return Begun(hidden[0, -1], state, each(chunks[-1]), each(previous))


def draw_noise(predictor: NextVector, key: PRNGKey, num_futures: int, num_chunks: int) -> Noise:
    """All the randomness of S futures of N chunks, `[N S ...]`; that of a single future is `calm.core.generate`'s."""
    keys = jax.vmap(lambda step: stream(key, "draw", step))(jnp.arange(num_chunks))
    return jax.vmap(lambda key: predictor.draw_noise(key, (num_futures,), predictor.decoding))(keys)


class Read(NamedTuple):
    """What a branch reads of the chunk that it wrote, where a gradient passes."""

    latent: Float[Array, "S Z"]
    embedded: Float[Array, "S K D"] | None
    """the tokens' embeddings, as expected under the decoder; none for a stem that reads no tokens"""


def futures(
    predictor: NextVector,
    begun: Begun,
    noise: Noise,
    table: ScoringTable,
    *,
    feedback: Feedback = "constant",
    shift: Float[Array, "Z"] | None = None,
) -> Futures:
    """S continuations of N chunks, one for each noise `[N S ...]`; `table` leaves banned tokens out.

    `shift` is added to every latent before its chunk is written: steering without a change of weights.
    """

    def step(carry: tuple[Any, Array, Array, Read | None], noise: Noise) -> tuple[Any, Futures]:
        state, chunk, previous, read = carry
        hidden, state = _reads(predictor, state, chunk, read, feedback)
        assert noise.latent is not None
        latent = predictor.lm.head(hidden, noise.latent[None])[0]
        latent = latent if shift is None else latent + shift
        chunk = _written(predictor, hidden, previous, latent, noise.uniforms, table)
        if feedback != "constant":
            read = Read(latent, _expected(predictor, hidden, previous, latent, chunk))
        previous = jnp.concatenate([previous, chunk], axis=1)[:, chunk.shape[1] :]
        return (state, chunk, previous, read), Futures(latent, chunk)

    read = None
    if feedback != "constant":
        rows = predictor.lm.stem.embedding
        read = Read(predictor.autoencoder.encode(begun.chunk).mean, None if rows is None else rows[...][begun.chunk])
        read = jax.lax.stop_gradient(read)
    _, written = jax.lax.scan(step, (begun.state, begun.chunk, begun.previous, read), noise)
    return Futures(*(jnp.moveaxis(x, 0, 1) for x in written))


def _written(
    predictor: NextVector,
    hidden: Float[Array, "S D"],
    previous: Int[Array, "S w"],
    latent: Float[Array, "S Z"],
    uniforms: Float[Array, "S K 2"] | None,
    table: ScoringTable,
) -> Int[Array, "S K"]:
    """The chunk of each latent, chosen as suits the model."""
    hidden, latent = jax.lax.stop_gradient((hidden, latent))
    uniforms = None if uniforms is None else uniforms[None]
    return predictor.write_latents(hidden, previous, latent[None], uniforms, decoding=predictor.decoding, table=table)[0]


def _reads(
    predictor: NextVector, state: Any, chunk: Int[Array, "S K"], read: Read | None, feedback: Feedback
) -> tuple[Float[Array, "S D"], Any]:
    """Every branch reads its last chunk."""
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
    hidden, state = lm.backbone(lm.stem(chunk[None], latents, embedded), state)
    return hidden[0], state


def _expected(
    predictor: NextVector,
    hidden: Float[Array, "S D"],
    previous: Int[Array, "S w"],
    latent: Float[Array, "S Z"],
    chunk: Int[Array, "S K"],
) -> Float[Array, "S K D"] | None:
    """The embeddings that what writes the chunk expects at each place, given the tokens before it; none where none are read."""
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
    """The value of the one, with the gradients of both."""
    return value + (smooth - jax.lax.stop_gradient(smooth))


def lay_out(
    prompts: Sequence[Int[np.ndarray, "_"]], chunk_size: int, begin_id: int
) -> tuple[Int[np.ndarray, "B N K"], Int[np.ndarray, "B"]]:
    """Prompts as generation lays them out, in lengths of few kinds, so that few shapes are compiled."""
    chunks, starts = pad_prompts(prompts, chunk_size, begin_id)
    extra = -len(chunks[0]) % LENGTH_STEP
    padded = np.pad(chunks, ((0, 0), (extra, 0), (0, 0)), constant_values=begin_id)
    return padded.astype(np.int32), (starts + extra).astype(np.int32)
