"""What generation and evaluation ask of a model: the next chunk as a deterministic map from (hidden, noise)."""

from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.autoencoder import Autoencoder
from calm.core.cross_entropy import target_log_prob
from calm.core.decoder import ScoringTable, best_token, draw_token
from calm.core.dense import Precision
from calm.core.latent_lm import LatentLM
from calm.errors import UsageError
from calm.rng import PRNGKey, stream

Decoding = Literal["argmax", "drawn"]
DECODINGS: tuple[Decoding, ...] = get_args(Decoding)


class Noise(NamedTuple):
    """All the randomness of one sample of a chunk."""

    latent: Float[Array, "*s E"] | None
    """what the head turns into a latent; none for a model without latents"""
    uniforms: Float[Array, "*s K 2"] | None
    """what draws tokens from a distribution over the vocabulary; none where the most probable token is taken"""


@runtime_checkable
class Predictor(Protocol):
    """A model of the next chunk of K tokens that can be sampled; an `nnx.Module`.

    Randomness is an argument, never a key: the caller draws the noise of every row from the row's own key, so that a row's
    result does not depend on its batch, and all rows still go through the model at once.
    """

    precision: Precision

    @property
    def decoding(self) -> Decoding:
        """How its tokens are to be chosen unless someone asks otherwise."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def chunk_size(self) -> int: ...

    @property
    def reach(self) -> int:
        """How many of the tokens before a chunk `write` is given, besides the hidden state that has read them all."""
        ...

    @property
    def num_layers(self) -> int:
        """Layers that a state is stacked over, which generation takes apart: periods of the backbone's pattern."""
        ...

    @property
    def table(self) -> Float[Array, "V W"]:
        """What the states before the logits are multiplied with."""
        ...

    def init_state(
        self, batch: int, context: int, starts: Int[Array, "B"] | None = None, *, rewindable: bool = False
    ) -> Any: ...

    def fork(self, state: Any, ends: Int[Array, "A"], num_branches: int, capacity: int) -> Any:
        """Branches of a rewindable state from behind its first `ends[a]` chunks each (`calm.nn.Backbone.fork`)."""
        ...

    def rewind(self, state: Any, position: int | Int[Array, ""]) -> Any:
        """A rewindable state as it was after `position` chunks."""
        ...

    def hidden(self, chunks: Int[Array, "B N K"], state: Any = None) -> tuple[Float[Array, "B N D"], Any]: ...

    def draw_noise(self, key: PRNGKey, shape: tuple[int, ...], decoding: str = "argmax") -> Noise: ...

    def write(
        self,
        hidden: Float[Array, "*b D"],
        previous: Int[Array, "*b w"],
        noise: Noise,
        *,
        decoding: str = "argmax",
        table: ScoringTable | None = None,
    ) -> Int[Array, "S *b K"]:
        """One chunk for each noise. `previous` holds the last `reach` tokens that `hidden` has read
        (`calm.decoders.context_decoder.recent_tokens`); `table` leaves banned tokens out."""
        ...


class NextVector(nnx.Module):
    """A latent language model and the frozen autoencoder that reads its latents: the CALM predictor (arXiv:2510.27688).

    Raises:
        UsageError: the two were not trained together.
    """

    def __init__(self, autoencoder: Autoencoder, lm: LatentLM):
        for name in ("chunk_size", "vocab_size", "latent_dim"):
            ours, theirs = getattr(lm.config, name), getattr(autoencoder.config, name)
            if ours != theirs:
                raise UsageError(
                    f"the language model has {name}={ours} and the autoencoder {theirs}: they were not trained together"
                )
        if lm.precision != autoencoder.precision:
            raise UsageError(f"the language model computes in {lm.precision}, the autoencoder in {autoencoder.precision}")
        self.autoencoder, self.lm, self.precision = autoencoder, lm, lm.precision

    @property
    def decoding(self) -> Decoding:
        """How its tokens are to be chosen: drawn where a likelihood trained what writes them, else the most probable."""
        return "argmax" if self.lm.context_decoder is None else "drawn"

    @property
    def vocab_size(self) -> int:
        return self.lm.config.vocab_size

    @property
    def chunk_size(self) -> int:
        return self.lm.config.chunk_size

    @property
    def reach(self) -> int:
        writer = self.lm.context_decoder
        return 0 if writer is None else writer.config.reach

    @property
    def num_layers(self) -> int:
        return self.lm.config.backbone.num_periods

    @property
    def table(self) -> Float[Array, "V W"]:
        """Of the context decoder where there is one, else of the autoencoder."""
        writer = self.lm.context_decoder
        return self.autoencoder.table if writer is None else writer.table

    def init_state(self, batch: int, context: int, starts: Int[Array, "B"] | None = None, *, rewindable: bool = False) -> Any:
        """The state before the first chunk, with room for `context` chunks; row b begins at chunk `starts[b]`."""
        return self.lm.init_state(batch, context, starts, rewindable=rewindable)

    def fork(self, state: Any, ends: Int[Array, "A"], num_branches: int, capacity: int) -> Any:
        """Branches of a rewindable state, from behind its first `ends[a]` chunks each."""
        return self.lm.fork(state, ends, num_branches, capacity)

    def rewind(self, state: Any, position: int | Int[Array, ""]) -> Any:
        """A rewindable state as it was after `position` chunks."""
        return self.lm.rewind(state, position)

    def hidden(self, chunks: Int[Array, "B N K"], state: Any = None) -> tuple[Float[Array, "B N D"], Any]:
        """Position i has read chunks 0..i and predicts chunk i + 1. With a state, the chunks continue what it has read."""
        return self.lm.hidden(chunks, state, self.autoencoder)

    def draw_noise(self, key: PRNGKey, shape: tuple[int, ...], decoding: str = "argmax") -> Noise:
        """The noise of samples of leading shape `shape`."""
        uniforms = None
        if decoding == "drawn":
            uniforms = jax.random.uniform(stream(key, "tokens"), (*shape, self.chunk_size, 2))
        return Noise(self.lm.head.draw_noise(key, shape), uniforms)

    def write(
        self,
        hidden: Float[Array, "*b D"],
        previous: Int[Array, "*b w"],
        noise: Noise,
        *,
        decoding: str = "argmax",
        table: ScoringTable | None = None,
    ) -> Int[Array, "S *b K"]:
        """Noise to latents by the head, latents to chunks by the decoder: its argmax, or drawn from its softmax."""
        assert noise.latent is not None
        latents = self.lm.head(hidden, noise.latent)
        return self.write_latents(hidden, previous, latents, noise.uniforms, decoding=decoding, table=table)

    def write_latents(
        self,
        hidden: Float[Array, "*b D"],
        previous: Int[Array, "*b w"],
        latents: Float[Array, "S *b Z"],
        uniforms: Float[Array, "S *b K 2"] | None,
        *,
        decoding: str = "argmax",
        table: ScoringTable | None = None,
    ) -> Int[Array, "S *b K"]:
        """The second half of `write`: one chunk for each latent."""
        writer = self.lm.context_decoder
        if writer is not None:
            plan = writer.plan(hidden, latents if writer.config.use_latent else None)
            plan = jnp.broadcast_to(plan, (len(latents), *plan.shape[1:]))
            return writer.write(plan, previous, uniforms if decoding == "drawn" else None, table)
        states = self.autoencoder.decode_states(latents)
        scoring = self.table if table is None else table
        if decoding == "argmax":
            return best_token(states, scoring, self.precision)
        assert uniforms is not None
        return draw_token(uniforms, states, scoring, self.precision)

    def token_log_probs(
        self,
        hidden: Float[Array, "*b D"],
        previous: Int[Array, "*b w"],
        latents: Float[Array, "S *b Z"],
        targets: Int[Array, "*b K"],
    ) -> Float[Array, "S *b K"]:
        """log p(token | latent) in nats of each token of the target, for each latent: what `write` draws from.

        A context decoder's tokens are given the target's tokens before them as well.
        """
        writer = self.lm.context_decoder
        if writer is None:
            states = self.autoencoder.decode_states(latents)
        else:
            plan = writer.plan(hidden, latents if writer.config.use_latent else None)
            states = writer.teacher_forced(plan, previous, targets)
            states = jnp.broadcast_to(states, (len(latents), *states.shape[1:]))
        wanted = jnp.broadcast_to(targets, states.shape[:-1])
        flat = target_log_prob(states.reshape(-1, states.shape[-1]), self.table, wanted.reshape(-1), self.precision)
        return flat.reshape(wanted.shape)


def sample_chunks(
    predictor: Predictor,
    key: PRNGKey,
    hidden: Float[Array, "*b D"],
    previous: Int[Array, "*b w"],
    num_samples: int,
    *,
    decoding: str = "argmax",
    table: ScoringTable | None = None,
) -> Int[Array, "S *b K"]:
    """S independent samples of the next chunk at every position, from one key."""
    noise = predictor.draw_noise(key, (num_samples, *hidden.shape[:-1]), decoding)
    return predictor.write(hidden, previous, noise, decoding=decoding, table=table)
