"""The interface of what turns latents into tokens, and the paper's own: the frozen autoencoder's decoder.

B batch · K tokens per chunk · Z latent width · D model width · V vocabulary · W table width · S latents · w tokens before a
chunk
"""

import dataclasses
from typing import Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.autoencoder import Autoencoder
from calm.core.cross_entropy import target_log_prob
from calm.core.dense import Precision
from calm.core.vocabulary import ScoringTable, best_token, draw_token
from calm.registry import Registered
from calm.text.chunking import NOTHING

Decoding = Literal["argmax", "drawn"]
DECODINGS: tuple[Decoding, ...] = get_args(Decoding)


class DecoderConfig(Registered, family="decoder"):
    """Base of the configurations of decoders that are trained with the language model, in the autoencoder's place."""

    @property
    def reach(self) -> int:
        """Number of tokens before a chunk that the decoder reads."""
        raise NotImplementedError

    @property
    def reads_latent(self) -> bool:
        """Whether it reads the sampled latent."""
        raise NotImplementedError

    @property
    def reads_hidden(self) -> bool:
        """Whether it reads the hidden state."""
        raise NotImplementedError

    def build(
        self,
        vocab_size: int,
        chunk_size: int,
        hidden_dim: int,
        latent_dim: int,
        *,
        rngs: nnx.Rngs,
        precision: Precision = "float32",
    ) -> Any:
        """A module that is a `ChunkDecoder`."""
        raise NotImplementedError

    def flops(self, hidden_dim: int, latent_dim: int, chunk_size: int, vocab_size: int, num_samples: int) -> int:
        """Forward FLOPs of writing one chunk for `num_samples` latents."""
        raise NotImplementedError


def recent_tokens(chunks: Int[Array, "*b N K"], reach: int) -> Int[Array, "*b N w"]:
    """The last `reach` tokens up to the end of each chunk; `NOTHING` before the first."""
    *lead, length, size = chunks.shape
    tokens = chunks.reshape(*lead, length * size)
    tokens = jnp.pad(tokens, [(0, 0)] * len(lead) + [(reach, 0)], constant_values=NOTHING)
    ends = size * jnp.arange(1, length + 1)
    return tokens[..., ends[:, None] + jnp.arange(reach)]


@runtime_checkable
class ChunkDecoder(Protocol):
    """Turns latents into tokens. `previous` holds the last `reach` tokens before the chunk."""

    @property
    def table(self) -> Float[Array, "V W"]:
        """The token table whose product with the states are the logits."""
        ...

    def write_chunks(
        self,
        hidden: Float[Array, "*b D"],
        previous: Int[Array, "*b w"],
        latents: Float[Array, "S *b Z"],
        uniforms: Float[Array, "S *b K 2"] | None,
        table: ScoringTable | None = None,
    ) -> Int[Array, "S *b K"]:
        """One chunk for each latent: drawn from the decoder's softmax by `uniforms`, or the most probable tokens without."""
        ...

    def target_states(
        self,
        hidden: Float[Array, "*b D"],
        previous: Int[Array, "*b w"],
        latents: Float[Array, "S *b Z"],
        targets: Int[Array, "*b K"],
    ) -> Float[Array, "S *b K W"]:
        """States whose product with the table are the logits of each token of known chunks, given the tokens before it."""
        ...


@dataclasses.dataclass(frozen=True)
class FrozenDecoder:
    """The frozen autoencoder's decoder (CALM): a latent gives all K tokens at once, and nothing else is read."""

    autoencoder: Autoencoder

    reach: ClassVar[int] = 0
    reads_latent: ClassVar[bool] = True
    reads_hidden: ClassVar[bool] = False
    decoding: ClassVar[Decoding] = "argmax"

    @property
    def table(self) -> Float[Array, "V W"]:
        return self.autoencoder.table

    def write_chunks(
        self,
        hidden: Float[Array, "*b D"],
        previous: Int[Array, "*b w"],
        latents: Float[Array, "S *b Z"],
        uniforms: Float[Array, "S *b K 2"] | None,
        table: ScoringTable | None = None,
    ) -> Int[Array, "S *b K"]:
        states, precision = self.autoencoder.decode_states(latents), self.autoencoder.precision
        scoring = self.table if table is None else table
        if uniforms is None:
            return best_token(states, scoring, precision)
        return draw_token(uniforms, states, scoring, precision)

    def target_states(
        self,
        hidden: Float[Array, "*b D"],
        previous: Int[Array, "*b w"],
        latents: Float[Array, "S *b Z"],
        targets: Int[Array, "*b K"],
    ) -> Float[Array, "S *b K W"]:
        return self.autoencoder.decode_states(latents)


def token_log_probs(
    decoder: ChunkDecoder,
    hidden: Float[Array, "*b D"],
    previous: Int[Array, "*b w"],
    latents: Float[Array, "S *b Z"],
    targets: Int[Array, "*b K"],
    precision: Precision,
) -> Float[Array, "S *b K"]:
    """log p(token | latent, tokens before it) in nats of each token of the target, for each latent."""
    states = decoder.target_states(hidden, previous, latents, targets)
    wanted = jnp.broadcast_to(targets, states.shape[:-1])
    flat = target_log_prob(states.reshape(-1, states.shape[-1]), decoder.table, wanted.reshape(-1), precision)
    return flat.reshape(wanted.shape)
