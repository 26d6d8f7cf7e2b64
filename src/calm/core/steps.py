"""The device side of generation: one step, and a compiled loop of it.

A step lets the sampler draw chunks from the hidden state and choose, and reads the chosen chunk. `run` and `step` share it, so
both give the same tokens.
"""

import dataclasses
import zlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from calm.core import repetition
from calm.core.chunk_decoder import recent_tokens
from calm.core.dense import operand
from calm.core.predictor import Predictor
from calm.core.sampler import Sampler, StepKeys
from calm.core.unrolled import unrolled, unstack
from calm.core.vocabulary import ScoringTable
from calm.errors import UsageError
from calm.text.chunking import NOTHING


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Static settings of the compiled loop, besides the model."""

    sampler: Sampler
    decoding: str
    """one of `calm.core.predictor.DECODINGS`"""


class Model(NamedTuple):
    """A module as a pytree: `nnx.split`."""

    graphdef: Any
    params: Any

    def merge(self) -> Any:
        return nnx.merge(self.graphdef, self.params)


class Weights(NamedTuple):
    """A predictor, laid out for a loop of small steps."""

    model: Model
    table: ScoringTable
    end_id: Int[Array, ""]


class Progress(NamedTuple):
    """Everything that a step hands to the next one."""

    state: Any
    """has read all chunks but the last"""
    chunk: Int[Array, "B K"]
    """the last chunk, which the next step reads"""
    previous: Int[Array, "B w"]
    """the last tokens up to the end of that chunk (`Predictor.reach`)"""
    history: Int[Array, "B T"]
    """prompt and continuation, right-aligned; `NOTHING` where there is no token"""
    ended: Bool[Array, "B"]
    lengths: Int[Array, "B"]
    """tokens written so far, the end token not counted"""
    steps: Int[Array, "B"]
    """steps made before the row ended"""
    fallbacks: Int[Array, "B"]
    draws: Int[Array, "B"]
    ran_out: Bool[Array, "B"]
    """rows whose sampler found no chunk at the last step: generation ends there"""
    last_draws: Int[Array, "B"]
    """draws of the last step"""
    collision_rate: Float[Array, "B"]
    """of the last step's draws"""
    step: Int[Array, ""]


@jax.jit
def prepare(model: Model, allowed: Int[Array, "X"], end_id: Int[Array, ""]) -> Weights:
    """Takes the layers apart, and rounds the operands of products: once, because a step would otherwise do it again every time.

    `allowed` holds the ids that may be written, ascending. Exact: a product rounds its operands in any case, and the model's
    embeddings enter nothing but products.
    """
    predictor: Predictor = model.merge()

    def leaf(path: tuple, x: Array) -> Array:
        names = {getattr(entry, "key", None) for entry in path}
        # the autoencoder's embeddings, where its encoder reads them, enter a sum as well
        products_only = "kernel" in names or ("embedding" in names and "autoencoder" not in names)
        return operand(x, predictor.precision) if products_only else x

    graphdef, params = nnx.split(unrolled(model.merge()))
    laid_out = Model(graphdef, jax.tree_util.tree_map_with_path(leaf, params))
    return Weights(laid_out, ScoringTable.of(predictor.table, predictor.precision, allowed), end_id)


def begin(
    model: Model,
    chunks: Int[Array, "B N K"],
    starts: Int[Array, "B"],
    history: Int[Array, "B T"],
    capacity: int,
    rewindable: bool = False,
) -> Progress:
    """Reads all chunks of the prompts but the last, with the layers still stacked; the state has room for `capacity` chunks."""
    predictor: Predictor = model.merge()
    batch, length, _ = chunks.shape
    state = predictor.init_state(batch, capacity, starts, rewindable=rewindable)
    if length > 1:
        state = predictor.hidden(chunks[:, :-1], state)[1]
    zeros = jnp.zeros((batch,), jnp.int32)
    state = state._replace(layers=unstack(state.layers, predictor.num_layers))
    no = zeros.astype(bool)
    padding = jnp.arange(length)[:, None] < starts[:, None, None]
    previous = recent_tokens(jnp.where(padding, NOTHING, chunks), predictor.reach)[:, -1]
    return Progress(
        state=state,
        chunk=chunks[:, -1],
        previous=previous,
        history=history,
        ended=no,
        lengths=zeros,
        steps=zeros,
        fallbacks=zeros,
        draws=zeros,
        ran_out=no,
        last_draws=zeros,
        collision_rate=zeros.astype(jnp.float32),
        step=jnp.zeros((), jnp.int32),
    )


def step_keys(keys: Array, step: Int[Array, ""]) -> StepKeys:
    """`calm.rng.stream(key, name, step)` for each field's name: all names at once, which compiles three times faster."""
    names = jnp.array([zlib.crc32(name.encode()) for name in StepKeys._fields], jnp.uint32)

    def named(name: Array, key: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(key, name), step)

    return StepKeys(*jax.vmap(jax.vmap(named, in_axes=(None, 0)), in_axes=(0, None))(names, keys))


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """The distribution of the next chunk of every row, as something that a sampler can draw from (a `Source`)."""

    predictor: Predictor
    table: ScoringTable
    decoding: str
    hidden: Float[Array, "B D"]
    previous: Int[Array, "B w"]
    history: Int[Array, "B T"]
    alive: Bool[Array, "B"]

    def draw(self, keys: Array, num_draws: int) -> Int[Array, "S B K"]:
        predictor = self.predictor
        noise = jax.vmap(lambda key: predictor.draw_noise(key, (num_draws,), self.decoding), out_axes=1)(keys)
        return predictor.write(self.hidden, self.previous, noise, decoding=self.decoding, table=self.table)

    def repeats(self, chunks: Int[Array, "S B K"], length: int) -> Bool[Array, "S B"]:
        return repetition.repeats(self.history, chunks, length)

    def logits(self) -> Float[Array, "B V"]:
        """Logits of the next token, of a model that has them; banned tokens have minus infinity."""
        logits = getattr(self.predictor, "logits", None)
        if logits is None:
            raise UsageError("this sampler needs probabilities, which only a token model has; use one that draws")
        return logits(self.hidden, self.table)


def advance(recipe: Recipe, weights: Weights, keys: StepKeys, progress: Progress) -> tuple[Progress, Int[Array, "B K"]]:
    """One step: the next chunk of every row. Rows that have ended write end ids and count no more."""
    predictor: Predictor = weights.model.merge()
    hidden, state = predictor.hidden(progress.chunk[:, None], progress.state)
    source = ModelSource(
        predictor, weights.table, recipe.decoding, hidden[:, 0], progress.previous, progress.history, ~progress.ended
    )
    choice = recipe.sampler.sample(keys, source)

    ends = choice.chunk == weights.end_id
    over = progress.ended[:, None] | (jnp.cumsum(ends, axis=-1) > 0)
    chunk = jnp.where(over, weights.end_id, choice.chunk)
    alive = (~progress.ended).astype(jnp.int32)
    progress = Progress(
        state=state,
        chunk=chunk,
        previous=jnp.concatenate([progress.previous, chunk], axis=1)[:, chunk.shape[1] :],
        history=jnp.concatenate([progress.history[:, chunk.shape[1] :], chunk], axis=1),
        ended=over[:, -1],
        lengths=progress.lengths + jnp.sum(~over, axis=-1, dtype=jnp.int32),
        steps=progress.steps + alive,
        fallbacks=progress.fallbacks + alive * choice.fell_back,
        draws=progress.draws + alive * choice.draws,
        ran_out=progress.ran_out if choice.ran_out is None else choice.ran_out,
        last_draws=choice.draws,
        collision_rate=progress.collision_rate if choice.collision_rate is None else choice.collision_rate,
        step=progress.step + 1,
    )
    return progress, chunk


@partial(jax.jit, static_argnums=(0, 7))
def run(
    recipe: Recipe,
    model: Model,
    weights: Weights,
    keys: Array,
    chunks: Int[Array, "B N K"],
    starts: Int[Array, "B"],
    history: Int[Array, "B T"],
    capacity: int,
    num_steps: Int[Array, ""],
) -> tuple[Progress, Int[Array, "X B K"]]:
    """Prompts in, chunks out: `num_steps` steps, or fewer once every row has ended. Chunks never written hold end ids.

    It also stops where a sampler ran out of draws; the caller looks at `Progress.ran_out`.
    """
    progress = begin(model, chunks, starts, history, capacity)
    batch, length, chunk_size = chunks.shape
    limit = capacity - length + 1
    written = jnp.full((limit, batch, chunk_size), weights.end_id, jnp.int32)
    every_key = jax.vmap(lambda step: step_keys(keys, step))(jnp.arange(limit))  # deriving a key is a loop of small operations

    def unfinished(carry: tuple[Progress, Array]) -> Array:
        return (carry[0].step < num_steps) & ~carry[0].ended.all() & ~carry[0].ran_out.any()

    def body(carry: tuple[Progress, Array]) -> tuple[Progress, Array]:
        progress, chunk = advance(recipe, weights, jax.tree.map(lambda x: x[carry[0].step], every_key), carry[0])
        return progress, jax.lax.dynamic_update_index_in_dim(carry[1], chunk, carry[0].step, 0)

    return jax.lax.while_loop(unfinished, body, (progress, written))


prefill = jax.jit(begin, static_argnums=(4, 5))


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def step(recipe: Recipe, weights: Weights, keys: Array, progress: Progress) -> tuple[Progress, Int[Array, "B K"]]:
    """`advance`, one compiled call a chunk; the progress is given up and written in place."""
    return advance(recipe, weights, step_keys(keys, progress.step), progress)
