"""The device side of generation: one step, and a compiled loop of it.

A step draws candidate latents from the hidden state, decodes them to chunks, lets the sampler choose, and reads the chosen
chunk. `run` and `stream` share it, so both give the same tokens.
"""

import dataclasses
import zlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from calm.autoencoder.autoencoder import Autoencoder
from calm.autoencoder.decoder import ScoringTable, best_token, draw_token
from calm.models.latent_lm import LatentLM
from calm.nn.backbone import BackboneState
from calm.nn.dense import operand
from calm.nn.unrolled import unrolled, unstack
from calm.sampling.temperature import Sampler

DECODINGS = ("argmax", "drawn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is fixed when the loop is compiled, besides the models."""

    sampler: Sampler
    decoding: str
    """one of DECODINGS"""


class Model(NamedTuple):
    """A module as a pytree: `nnx.split`."""

    graphdef: Any
    params: Any

    def merge(self) -> Any:
        return nnx.merge(self.graphdef, self.params)


class Weights(NamedTuple):
    """Both models, laid out for a loop of small steps."""

    autoencoder: Model
    lm: Model
    table: ScoringTable
    end_id: Int[Array, ""]


class Progress(NamedTuple):
    """Everything that a step hands to the next one."""

    state: BackboneState
    """has read all chunks but the last"""
    chunk: Int[Array, "B K"]
    """the last chunk, which the next step reads"""
    ended: Bool[Array, "B"]
    lengths: Int[Array, "B"]
    """tokens written so far, the end token not counted"""
    steps: Int[Array, "B"]
    """steps made before the row ended"""
    fallbacks: Int[Array, "B"]
    step: Int[Array, ""]


@jax.jit
def prepare(autoencoder: Model, lm: Model, allowed: Int[Array, "X"], end_id: Int[Array, ""]) -> Weights:
    """Takes the layers apart, and rounds the operands of products: once, because a step would otherwise do it again every time.

    `allowed` holds the ids that may be written, ascending. Exact: a product rounds its operands in any case, and embeddings
    enter nothing but products.
    """

    def laid_out(model: Model) -> Model:
        module = model.merge()

        def leaf(path: tuple, x: Array) -> Array:
            names = {getattr(entry, "key", None) for entry in path}
            return operand(x, module.precision) if names & {"kernel", "embedding"} else x

        graphdef, params = nnx.split(unrolled(module))
        return Model(graphdef, jax.tree_util.tree_map_with_path(leaf, params))

    codec: Autoencoder = autoencoder.merge()
    return Weights(laid_out(autoencoder), laid_out(lm), ScoringTable.of(codec.table, codec.precision, allowed), end_id)


def begin(model: Model, chunks: Int[Array, "B N K"], starts: Int[Array, "B"], capacity: int) -> Progress:
    """Reads all chunks of the prompts but the last, with the layers still stacked; the state has room for `capacity` chunks."""
    lm: LatentLM = model.merge()
    batch, length, _ = chunks.shape
    state = lm.init_state(batch, capacity, starts)
    if length > 1:
        state = continued(lm.hidden(chunks[:, :-1], state)[1])
    zeros = jnp.zeros((batch,), jnp.int32)
    state = state._replace(layers=unstack(state.layers, lm.backbone.config.num_layers))
    return Progress(state, chunks[:, -1], zeros.astype(bool), zeros, zeros, zeros, jnp.zeros((), jnp.int32))


def continued(state: BackboneState | None) -> BackboneState:
    """A model that was given a state returns one."""
    assert state is not None
    return state


class StepKeys(NamedTuple):
    """The keys of one step, one for each row and purpose. A row's depend on its own key and the step alone."""

    noise: Array
    tokens: Array
    choice: Array

    @staticmethod
    def of(keys: Array, step: Int[Array, ""]) -> "StepKeys":
        """`calm.rng.stream(key, name, step)` for each field's name: all names at once, which compiles three times faster."""
        names = jnp.array([zlib.crc32(name.encode()) for name in StepKeys._fields], jnp.uint32)

        def named(name: Array, key: Array) -> Array:
            return jax.random.fold_in(jax.random.fold_in(key, name), step)

        return StepKeys(*jax.vmap(jax.vmap(named, in_axes=(None, 0)), in_axes=(0, None))(names, keys))


def advance(recipe: Recipe, weights: Weights, keys: StepKeys, progress: Progress) -> tuple[Progress, Int[Array, "B K"]]:
    """One step: the next chunk of every row. Rows that have ended write end ids and count no more."""
    lm: LatentLM = weights.lm.merge()
    hidden, state = lm.hidden(progress.chunk[:, None], progress.state)
    candidates = draw_candidates(recipe, weights, keys, hidden[:, 0])
    index, fell_back = jax.vmap(recipe.sampler.choose)(keys.choice, candidates.swapaxes(0, 1))
    drawn = jnp.take_along_axis(candidates, index[None, :, None], axis=0)[0]

    ends = drawn == weights.end_id
    over = progress.ended[:, None] | (jnp.cumsum(ends, axis=-1) > 0)
    chunk = jnp.where(over, weights.end_id, drawn)
    alive = (~progress.ended).astype(jnp.int32)
    progress = Progress(
        state=continued(state),
        chunk=chunk,
        ended=over[:, -1],
        lengths=progress.lengths + jnp.sum(~over, axis=-1, dtype=jnp.int32),
        steps=progress.steps + alive,
        fallbacks=progress.fallbacks + alive * fell_back,
        step=progress.step + 1,
    )
    return progress, chunk


def draw_candidates(recipe: Recipe, weights: Weights, keys: StepKeys, hidden: Float[Array, "B D"]) -> Int[Array, "S B K"]:
    """S chunks that may come next, for every row from its own keys."""
    codec: Autoencoder = weights.autoencoder.merge()
    lm: LatentLM = weights.lm.merge()
    num_samples = recipe.sampler.num_candidates
    noise = jax.vmap(lambda key: lm.head.draw_noise(key, (num_samples,)), out_axes=1)(keys.noise)
    states = codec.decode_states(lm.head(hidden, noise))
    if recipe.decoding == "argmax":
        return best_token(states, weights.table, codec.precision)
    shape = (num_samples, states.shape[2], 2)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, shape), out_axes=1)(keys.tokens)
    return draw_token(uniforms, states, weights.table, codec.precision)


@partial(jax.jit, static_argnums=(0, 6))
def run(
    recipe: Recipe,
    model: Model,
    weights: Weights,
    keys: Array,
    chunks: Int[Array, "B N K"],
    starts: Int[Array, "B"],
    capacity: int,
    num_steps: Int[Array, ""],
) -> tuple[Progress, Int[Array, "X B K"]]:
    """Prompts in, chunks out: `num_steps` steps, or fewer once every row has ended. Chunks never written hold end ids."""
    progress = begin(model, chunks, starts, capacity)
    batch, length, chunk_size = chunks.shape
    limit = capacity - length + 1
    written = jnp.full((limit, batch, chunk_size), weights.end_id, jnp.int32)
    step_keys = jax.vmap(lambda step: StepKeys.of(keys, step))(
        jnp.arange(limit)
    )  # deriving a key is a loop of small operations

    def unfinished(carry: tuple[Progress, Array]) -> Array:
        return (carry[0].step < num_steps) & ~carry[0].ended.all()

    def body(carry: tuple[Progress, Array]) -> tuple[Progress, Array]:
        progress, chunk = advance(recipe, weights, jax.tree.map(lambda x: x[carry[0].step], step_keys), carry[0])
        return progress, jax.lax.dynamic_update_index_in_dim(carry[1], chunk, carry[0].step, 0)

    return jax.lax.while_loop(unfinished, body, (progress, written))


prefill = jax.jit(begin, static_argnums=3)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def step(recipe: Recipe, weights: Weights, keys: Array, progress: Progress) -> tuple[Progress, Int[Array, "B K"]]:
    """`advance`, one compiled call a chunk; the progress is given up and written in place."""
    return advance(recipe, weights, StepKeys.of(keys, progress.step), progress)
