"""The interface that generation and evaluation require of a model: (hidden, noise) -> next chunk, deterministically."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.autoencoder import Autoencoder
from calm.core.chunk_decoder import DECODINGS as DECODINGS
from calm.core.chunk_decoder import Decoding, FrozenDecoder, token_log_probs
from calm.core.dense import Precision
from calm.core.latent_lm import LatentLM
from calm.core.vocabulary import ScoringTable
from calm.errors import UsageError
from calm.rng import PRNGKey, stream


class Noise(NamedTuple):
    """All the randomness of one sample of a chunk."""

    latent: Float[Array, "*s E"] | None
    """the head's noise; none for a model without latents"""
    uniforms: Float[Array, "*s K 2"] | None
    """uniform numbers that draw tokens from the decoder's softmax; none where the most probable token is taken"""


@runtime_checkable
class Predictor(Protocol):
    """A model of the next chunk of K tokens that can be sampled; an `nnx.Module`.

    Randomness is an argument, never a key: the caller draws the noise of every row from the row's own key, so that a row's
    result does not depend on its batch, and all rows still go through the model at once.
    """

    precision: Precision

    @property
    def decoding(self) -> Decoding:
        """The choice of tokens it was trained for, and the default everywhere."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def chunk_size(self) -> int: ...

    @property
    def reach(self) -> int:
        """Number of tokens before a chunk that `write` takes beside the hidden state."""
        ...

    @property
    def num_layers(self) -> int:
        """Length of the stack of layers, which generation takes apart."""
        ...

    @property
    def table(self) -> Float[Array, "V W"]:
        """The table whose product with the last states are the logits."""
        ...

    def init_state(
        self, batch: int, context: int, starts: Int[Array, "B"] | None = None, *, rewindable: bool = False
    ) -> Any: ...

    def fork(self, state: Any, ends: Int[Array, "A"], num_branches: int, capacity: int) -> Any:
        """Branches of a rewindable state, each from after its first `ends[a]` chunks (`Backbone.fork`)."""
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
        lm.config.require_sizes_of(autoencoder.config)
        if lm.precision != autoencoder.precision:
            raise UsageError(f"the language model computes in {lm.precision}, the autoencoder in {autoencoder.precision}")
        self.autoencoder, self.lm, self.precision = autoencoder, lm, lm.precision

    @property
    def decoder(self) -> Any:
        """The `ChunkDecoder` of this model: the language model's own, or the frozen autoencoder's."""
        own = self.lm.context_decoder
        return FrozenDecoder(self.autoencoder) if own is None else own

    @property
    def decoding(self) -> Decoding:
        """The choice of tokens it was trained for."""
        return self.decoder.decoding

    @property
    def has_latents(self) -> bool:
        """Whether its tokens depend on the sampled latent."""
        return self.decoder.reads_latent

    @property
    def vocab_size(self) -> int:
        return self.lm.config.vocab_size

    @property
    def chunk_size(self) -> int:
        return self.lm.config.chunk_size

    @property
    def reach(self) -> int:
        return self.decoder.reach

    @property
    def num_layers(self) -> int:
        return self.lm.config.backbone.num_periods

    @property
    def table(self) -> Float[Array, "V W"]:
        """The decoder's token table."""
        return self.decoder.table

    def init_state(self, batch: int, context: int, starts: Int[Array, "B"] | None = None, *, rewindable: bool = False) -> Any:
        """The state before the first chunk, with room for `context` chunks; row b begins at chunk `starts[b]`."""
        return self.lm.init_state(batch, context, starts, rewindable=rewindable)

    def fork(self, state: Any, ends: Int[Array, "A"], num_branches: int, capacity: int) -> Any:
        """Branches of a rewindable state, each from after its first `ends[a]` chunks."""
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
        if decoding == "drawn":
            assert uniforms is not None
        return self.decoder.write_chunks(hidden, previous, latents, uniforms if decoding == "drawn" else None, table)

    def token_log_probs(
        self,
        hidden: Float[Array, "*b D"],
        previous: Int[Array, "*b w"],
        latents: Float[Array, "S *b Z"],
        targets: Int[Array, "*b K"],
    ) -> Float[Array, "S *b K"]:
        """log p(token | latent) in nats of each token of the target, for each latent: the distribution `write` draws from.

        A context decoder's tokens are given the target's tokens before them as well.
        """
        return token_log_probs(self.decoder, hidden, previous, latents, targets, self.precision)


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
