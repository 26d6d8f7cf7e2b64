"""Predictors that know a world's law, or a wrong one: what is sampled from them has exact scores."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from calm.core.predictor import Noise
from calm.worlds.finite_state import FiniteStateWorld


class Beliefs(NamedTuple):
    """The belief behind every chunk that was read, `[B N M]`; of a fork, those that its branches stand at."""

    behind: Any


class WorldPredictor(nnx.Module):
    """Chunks of `chunk_size` tokens drawn exactly from a world's law given all that was read; begin ids say nothing."""

    def __init__(self, world: FiniteStateWorld, chunk_size: int, collapsed: bool = False):
        self.chunk_size, self.collapsed = chunk_size, collapsed
        self.precision, self.decoding, self.vocab_size, self.num_layers = "float32", "drawn", world.vocab_size, 1
        self.reach = 0
        self.begin_id = world.begin_id
        self.law = nnx.Variable(jnp.asarray(world.table_of_states, jnp.float32))
        self.following = nnx.Variable(jax.nn.one_hot(jnp.asarray(world.following), world.num_states))
        self.first = nnx.Variable(jnp.asarray(world.start(1)[0], jnp.float32))
        self.table = jnp.zeros((world.vocab_size, 1))

    def update(self, belief, tokens):
        weights = belief * jnp.moveaxis(self.law[...][:, tokens], 0, -1)
        new = jnp.einsum("...m,m...n->...n", weights, self.following[...][:, tokens])
        new = new / jnp.maximum(new.sum(-1, keepdims=True), 1e-30)
        return jnp.where((tokens == self.begin_id)[..., None], belief, new)

    def init_state(self, batch, context, starts=None, *, rewindable=False):
        return Beliefs(jnp.zeros((batch, 0, len(self.first[...]))))

    def fork(self, state, ends, num_branches, capacity):
        return Beliefs(jnp.repeat(state.behind[:, ends - 1], num_branches, axis=1))

    def rewind(self, state, position):
        return Beliefs(state.behind[:, :position])

    def hidden(self, chunks, state=None):
        batch = len(chunks)
        if state is not None and state.behind.shape[1]:  # every branch goes on from where it stands
            belief = state.behind
            for place in range(self.chunk_size):
                belief = self.update(belief, chunks[..., place])
            return belief, Beliefs(belief)
        belief = jnp.broadcast_to(self.first[...], (batch, len(self.first[...])))

        def read(belief, chunk):
            for place in range(self.chunk_size):
                belief = self.update(belief, chunk[:, place])
            return belief, belief

        behind = jnp.moveaxis(jax.lax.scan(read, belief, jnp.moveaxis(chunks, 1, 0))[1], 0, 1)
        return behind, None if state is None else Beliefs(behind)

    def draw_noise(self, key, shape, decoding="argmax"):
        return Noise(None, jax.random.uniform(key, (*shape, self.chunk_size, 2)))

    def write(self, hidden, previous, noise, *, decoding="argmax", table=None):
        belief = jnp.broadcast_to(hidden, (*noise.uniforms.shape[:-2], hidden.shape[-1]))
        tokens = []
        for place in range(self.chunk_size):
            cumulative = jnp.cumsum(belief @ self.law[...], axis=-1)
            uniform = 0.5 if self.collapsed else noise.uniforms[..., place, :1]
            tokens.append((uniform * cumulative[..., -1:] >= cumulative).sum(-1))
            belief = self.update(belief, tokens[-1])
        return jnp.stack(tokens, axis=-1)


class TokenWorldPredictor(WorldPredictor):
    """The same, one token at a time, and it knows its probabilities."""

    def __init__(self, world: FiniteStateWorld):
        super().__init__(world, 1)

    def logits(self, hidden):
        return jnp.log(hidden @ self.law[...])
