"""A small autoregressive decoder inside the chunk, conditioned on latent, hidden state and the tokens before each place.

The tokens of a chunk share several nats that a latent cannot carry at small scale: the energy score gives little gradient for
them, and log-mean likelihood over S samples can gain at most log S (docs/log.md). A small network that sees the hidden state,
the sampled latent and the W tokens before each place carries that dependence at a fraction of a backbone's cost per token, and
has an exact likelihood given its latent; with `recall` it also looks back at what followed, earlier in the text, where the last
tokens were the same (`calm.decoders.recall`). Without a context decoder the frozen autoencoder reads the latent: pure CALM
(arXiv:2510.27688). Related: MegaByte (Yu et al. 2023, arXiv:2305.07185) puts a local transformer inside groups of bytes; here
the local model is a multilayer perceptron over a window of tokens that does not end with the chunk, and a latent may join it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.chunk_decoder import DecoderConfig, Decoding, recent_tokens
from calm.core.dense import Dense, Precision, dense_flops
from calm.core.mlp import ResidualSwiGLU, SwiGLU
from calm.core.stack import Stack
from calm.core.vocabulary import ScoringTable, best_token, draw_token
from calm.decoders.recall import Memory, Recall
from calm.errors import UsageError
from calm.text.chunking import NOTHING


@DecoderConfig.register("context")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextDecoderConfig(DecoderConfig):
    """Sizes of the decoder inside the chunk."""

    dim: int = 256
    inner_dim: int = 688
    num_layers: int = 2
    table_dim: int = 128
    """width W of its own token table, which embeds the tokens before a place and scores those that may follow"""
    window: int = 4
    """how many tokens before a place it reads, whatever K; the first of them belong to earlier chunks"""
    recall: int = 0
    """how many tokens before its chunk it may copy from, by what stands before them (`calm.decoders.recall`); 0 = none"""
    use_latent: bool = True
    """whether it reads the sampled latent; without, a chunk depends on the hidden state alone, and the head on no more than the
    loss"""
    use_hidden: bool = True
    """whether it reads the hidden state; without, what it knows of the text before the last chunk comes through the latent"""

    def __post_init__(self) -> None:
        if min(self.dim, self.inner_dim, self.num_layers, self.table_dim, self.window) < 1:
            raise UsageError("context decoder: dim, inner_dim, num_layers, table_dim and window must be at least 1")
        if self.recall < 0:
            raise UsageError(f"context decoder: recall must not be negative, got {self.recall}")
        if not (self.use_latent or self.use_hidden):
            raise UsageError("context decoder: it must read the latent (use_latent), the hidden state (use_hidden) or both")

    @property
    def reach(self) -> int:
        """Number of tokens before a chunk that are passed in: the window, and before it what can be recalled."""
        return self.window + self.recall

    @property
    def reads_latent(self) -> bool:
        return self.use_latent

    @property
    def reads_hidden(self) -> bool:
        return self.use_hidden

    def build(
        self,
        vocab_size: int,
        chunk_size: int,
        hidden_dim: int,
        latent_dim: int,
        *,
        rngs: nnx.Rngs,
        precision: Precision = "float32",
    ) -> "ContextDecoder":
        return ContextDecoder(self, vocab_size, chunk_size, hidden_dim, latent_dim, rngs=rngs, precision=precision)

    def flops(self, hidden_dim: int, latent_dim: int, chunk_size: int, vocab_size: int, num_samples: int) -> int:
        """Forward FLOPs of one chunk: the hidden state's share once, the rest for every sample of the latent."""
        place = dense_flops(self.window * self.table_dim, self.dim) + self.num_layers * SwiGLU.flops(self.dim, self.inner_dim)
        place += dense_flops(self.dim, self.table_dim) + dense_flops(self.table_dim, vocab_size)
        if self.recall:
            place += Recall.flops(self.recall, self.table_dim)
            place += dense_flops(self.table_dim, self.dim) + dense_flops(self.table_dim, self.table_dim)
        once = dense_flops(hidden_dim, self.dim) if self.use_hidden else 0
        return once + num_samples * ((dense_flops(latent_dim, self.dim) if self.use_latent else 0) + chunk_size * place)


class ContextDecoder(nnx.Module):
    """p(token k | hidden, latent, the w tokens before it, and what it recalls), k = 1..K, one network for all places."""

    def __init__(
        self,
        config: ContextDecoderConfig,
        vocab_size: int,
        chunk_size: int,
        hidden_dim: int,
        latent_dim: int,
        *,
        precision: Precision = "float32",
        rngs: nnx.Rngs,
    ):
        def dense(in_dim: int, out_dim: int, *, use_bias: bool = False) -> Dense:
            return Dense(in_dim, out_dim, use_bias=use_bias, precision=precision, rngs=rngs)

        self.config, self.precision, self.chunk_size = config, precision, chunk_size
        shape = (vocab_size, config.table_dim)
        self.embedding = nnx.Param(config.table_dim**-0.5 * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.from_hidden = dense(hidden_dim, config.dim, use_bias=True) if config.use_hidden else None
        self.from_window = dense(config.window * config.table_dim, config.dim)
        # rows of the table have about unit length; the window's projection would start a fan-in too small beside the others
        self.norm_window = nnx.RMSNorm(config.window * config.table_dim, epsilon=1e-6, rngs=rngs)
        self.from_latent = dense(latent_dim, config.dim) if config.use_latent else None
        self.recall = Recall(config.window, config.recall, precision) if config.recall else None
        self.from_recall = dense(config.table_dim, config.dim) if config.recall else None
        self.copy = dense(config.table_dim, config.table_dim) if config.recall else None
        self.from_place = nnx.Param(0.02 * jax.random.normal(rngs.params(), (chunk_size, config.dim), jnp.float32))
        self.layers = Stack(
            lambda rngs: ResidualSwiGLU(config.dim, config.inner_dim, precision=precision, rngs=rngs),
            config.num_layers,
            rngs=rngs,
        )
        self.norm = nnx.RMSNorm(config.dim, epsilon=1e-6, rngs=rngs)
        self.out = dense(config.dim, config.table_dim)

    @property
    def table(self) -> Float[Array, "V W"]:
        return self.embedding[...]

    @property
    def reach(self) -> int:
        return self.config.reach

    @property
    def reads_latent(self) -> bool:
        return self.config.use_latent

    @property
    def reads_hidden(self) -> bool:
        return self.config.use_hidden

    @property
    def decoding(self) -> Decoding:
        """Drawn: a decoder that is trained by its likelihood is to be sampled from."""
        return "drawn"

    def write_chunks(
        self,
        hidden: Float[Array, "*b D"],
        previous: Int[Array, "*b w"],
        latents: Float[Array, "S *b Z"],
        uniforms: Float[Array, "S *b K 2"] | None,
        table: ScoringTable | None = None,
    ) -> Int[Array, "S *b K"]:
        """K tokens one after the other for each latent, each drawn, or the most probable ones without uniforms."""
        plan = self.plan(hidden, latents)
        return self.write(jnp.broadcast_to(plan, (len(latents), *plan.shape[1:])), previous, uniforms, table)

    def target_states(
        self,
        hidden: Float[Array, "*b D"],
        previous: Int[Array, "*b w"],
        latents: Float[Array, "S *b Z"],
        targets: Int[Array, "*b K"],
    ) -> Float[Array, "S *b K W"]:
        states = self.teacher_forced(self.plan(hidden, latents), previous, targets)
        return jnp.broadcast_to(states, (len(latents), *states.shape[1:]))

    def plan(self, hidden: Float[Array, "*b D"], latents: Float[Array, "S *b Z"] | None) -> Float[Array, "X *b d"]:
        """The input that all places of the chunk share, for each latent; one for all where the decoder reads no latent."""
        parts = []
        if self.from_hidden is not None:
            parts.append(self.from_hidden(hidden)[None])
        if self.from_latent is not None:
            assert latents is not None
            parts.append(self.from_latent(latents))
        return sum(parts[1:], start=parts[0])

    def states(
        self,
        plan: Float[Array, "*b d"],
        window: Int[Array, "*b w"],
        place: Int[Array, "*b"] | Int[Array, ""],
        recalled: Float[Array, "*#b W"] | None = None,
    ) -> Float[Array, "*b W"]:
        """The state whose product with the table are the logits of the token at `place`, given the tokens before it and what
        they recall."""
        embedded = jnp.where(window[..., None] == NOTHING, 0.0, self.table[window]).reshape(*window.shape[:-1], -1)
        x = plan + self.from_window(self.norm_window(embedded)) + self.from_place[...][place]
        if self.from_recall is not None and recalled is not None:
            x += self.from_recall(recalled)
        x, _ = self.layers.scan(lambda layer, x, _: (layer(x), None), x)
        x = self.out(self.norm(x))
        return x if self.copy is None or recalled is None else x + self.copy(recalled)

    def remember(self, previous: Int[Array, "*b w"]) -> Memory | None:
        """Recall inside a chunk after these tokens; none where nothing is."""
        return None if self.recall is None else self.recall.remember(self.table, previous)

    def recalled_behind(self, memory: Memory | None, window: Int[Array, "*b w"]) -> Float[Array, "*b W"] | None:
        """Argument of `states` at the place after a window."""
        return None if self.recall is None or memory is None else self.recall.read_behind(memory, self.table, window)

    def teacher_forced(
        self, plan: Float[Array, "S *b d"], previous: Int[Array, "*b w"], chunks: Int[Array, "*b K"]
    ) -> Float[Array, "S *b K W"]:
        """The states of all places of known chunks: place k sees k tokens of its own chunk, and before them those of
        `previous`, the last `ContextDecoderConfig.reach`."""
        recalled = None
        if self.recall is not None:
            window, size = self.config.window, self.chunk_size
            memory = self.recall.remember(self.table, previous)
            before = jnp.concatenate([previous[..., -window:], chunks[..., :-1]], axis=-1)
            likeness = self.recall.likeness(memory, self.table, before)
            offsets = range(1, window + 1)
            recalled = self.recall.read(memory, [likeness[..., window - o : window - o + size, :] for o in offsets])
        return self._all_places(plan, previous[..., -self.config.window :], chunks, recalled)

    def over_text(self, plan: Float[Array, "S B N d"], chunks: Int[Array, "B M K"]) -> Float[Array, "S B N K W"]:
        """`teacher_forced` of every chunk of a text but the first, in which likenesses are worked out once."""
        recalled = None if self.recall is None else self.recall.over_text(self.table, chunks)
        return self._all_places(plan, recent_tokens(chunks[..., :-1, :], self.config.window), chunks[..., 1:, :], recalled)

    def text_states(
        self, hidden: Float[Array, "B N D"], latents: Float[Array, "S B N Z"], chunks: Int[Array, "B M K"]
    ) -> Float[Array, "X B N K W"]:
        """`target_states` of every chunk of a text but the first, for training; X = 1 where no latent is read."""
        return self.over_text(self.plan(hidden, latents), chunks)

    def _all_places(
        self,
        plan: Float[Array, "S *b d"],
        previous: Int[Array, "*b w"],
        chunks: Int[Array, "*b K"],
        recalled: Float[Array, "*b K W"] | None,
    ) -> Float[Array, "S *b K W"]:
        size = self.chunk_size
        tokens = jnp.concatenate([previous, chunks], axis=-1)
        windows = jnp.stack([tokens[..., k : k + self.config.window] for k in range(size)], axis=-2)
        windows = jnp.broadcast_to(windows, (len(plan), *windows.shape))
        plan = jnp.broadcast_to(plan[..., None, :], (*plan.shape[:-1], size, plan.shape[-1]))
        places = jnp.broadcast_to(jnp.arange(size), windows.shape[:-1])
        return self.states(plan, windows, places, None if recalled is None else recalled[None])

    def write(
        self,
        plan: Float[Array, "S *b d"],
        previous: Int[Array, "*b w"],
        uniforms: Float[Array, "S *b K 2"] | None,
        table: ScoringTable | None = None,
    ) -> Int[Array, "S *b K"]:
        """K tokens one after the other, each drawn from its distribution; without uniforms the most probable ones."""
        scoring = self.table if table is None else table
        window = self.config.window
        looking = None if self.recall is None else Looking(self.recall, self.table, previous, len(plan))
        tokens = jnp.broadcast_to(previous[..., -window:], (*plan.shape[:-1], window))
        for place in range(self.chunk_size):
            recalled = None if looking is None else looking.recalled()
            states = self.states(plan, tokens[..., place:], jnp.int32(place), recalled)
            if uniforms is None:
                token = best_token(states, scoring, self.precision)
            else:
                token = draw_token(uniforms[..., place, :], states, scoring, self.precision)
            tokens = jnp.concatenate([tokens, token[..., None]], axis=-1)
            if looking is not None:
                looking.saw(token)
        return tokens[..., window:]


class Looking:
    """Recall of S samples of one chunk, place by place: the memory and the tokens before the chunk are common to them."""

    def __init__(self, recall: Recall, table: Float[Array, "V W"], previous: Int[Array, "*b w"], num_samples: int):
        self.recall, self.table, window = recall, table, recall.window
        self.memory = recall.remember(table, previous)
        common = recall.likeness(self.memory, table, previous[..., -window:])
        shape = (*common.shape[:-2], num_samples, common.shape[-1])
        self.likeness = [jnp.broadcast_to(common[..., x, None, :], shape) for x in range(window)]  # oldest token first

    def saw(self, token: Int[Array, "S *b"]) -> None:
        """One more token of every sample."""
        likeness = self.recall.likeness(self.memory, self.table, jnp.moveaxis(token, 0, -1))
        self.likeness = [*self.likeness[1:], likeness]

    def recalled(self) -> Float[Array, "S *b W"]:
        return jnp.moveaxis(self.recall.read(self.memory, self.likeness[::-1]), -2, 0)
