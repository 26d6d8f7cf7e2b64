"""The token baseline: the same backbone between an embedding and a softmax. One token a step."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.dense import Dense, Precision, dense_flops, matmul, operand, product
from calm.core.predictor import Noise
from calm.core.transformer import BackboneState, TransformerConfig
from calm.core.vocabulary import ScoringTable
from calm.errors import UsageError
from calm.rng import PRNGKey, stream
from calm.token.softmax_head import SoftmaxHead, draw_tokens, nats_and_match


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLMConfig:
    """Embedding, backbone and softmax."""

    vocab_size: int = 0
    """V; 0 = taken from the data's tokenizer"""
    backbone: TransformerConfig = TransformerConfig()
    table_dim: int = 0
    """width W of the embedding table, with a linear map to D and back; 0 = D. A narrow table makes the logits cheap"""
    tied: bool = True
    """one table for embedding and logits; false = two"""
    init_std: float | None = None
    """standard deviation of tables and kernels; none = 1 / sqrt(width or fan-in)"""

    def __post_init__(self) -> None:
        if self.vocab_size < 0 or self.table_dim < 0:
            raise UsageError("token LM: vocab_size and table_dim must not be negative")

    @property
    def chunk_size(self) -> int:
        """K = 1: a token is a chunk."""
        return 1

    @property
    def width(self) -> int:
        """W."""
        return self.table_dim or self.backbone.dim

    def build(self, *, rngs: nnx.Rngs, precision: Precision = "float32") -> "TokenLM":
        return TokenLM(self, rngs=rngs, precision=precision)

    def parameters(self) -> int:
        """Number of weights, counted on shapes without allocating."""
        model = nnx.eval_shape(lambda: self.build(rngs=nnx.Rngs(0)))
        return sum(x.size for x in jax.tree.leaves(nnx.state(model)))

    def flops(self, context: int) -> int:
        """Forward FLOPs of one position: embedding, backbone over `context` tokens, logits."""
        return self._around_flops() + self.backbone.flops(context)

    def training_flops(self, context: int) -> int:
        """Forward and backward FLOPs of one position."""
        return 3 * self._around_flops() + self.backbone.training_flops(context)

    def _around_flops(self) -> int:
        """Forward, of what stands around the backbone."""
        dim = self.backbone.dim
        stem = dense_flops(self.width, dim) if self.width != dim else 0
        return stem + SoftmaxHead.flops(self.vocab_size, dim, self.width)


class TokenEmbedding(nnx.Module):
    """Tokens `[*b]` to hidden states `[*b D]`: a row of the table, widened if the table is narrower, then RMSNorm.

    The norm gives the residual stream the same scale whatever the table's, which the logits decide when it is shared.
    """

    def __init__(self, config: TokenLMConfig, *, rngs: nnx.Rngs, precision: Precision):
        width, dim = config.width, config.backbone.dim
        std = width**-0.5 if config.init_std is None else config.init_std
        # Not named `embedding`: generation rounds what bears that name to the precision of products, and this row is added.
        self.table = nnx.Param(std * jax.random.normal(rngs.params(), (config.vocab_size, width), jnp.float32))
        sizes = dict(init_std=config.init_std, precision=precision, rngs=rngs)
        self.widen = Dense(width, dim, **sizes) if width != dim else None
        self.norm = nnx.RMSNorm(dim, epsilon=1e-6, rngs=rngs)

    def __call__(self, tokens: Int[Array, "*b"]) -> Float[Array, "*b D"]:
        rows = self.table[...][tokens]
        return self.norm(rows if self.widen is None else self.widen(rows))


class TokenLM(nnx.Module):
    """A transformer over tokens with a softmax: what next-vector modelling is measured against.

    A `calm.core.predictor.Predictor` whose chunk is one token, so that the generation loop, the samplers and BrierLM treat it
    as they treat CALM. It is always drawn from its softmax; beyond a Predictor it knows its probabilities (`logits`,
    `nats_and_match`).
    """

    def __init__(self, config: TokenLMConfig, *, rngs: nnx.Rngs, precision: Precision = "float32"):
        if config.vocab_size < 1:
            raise UsageError("token LM: vocab_size must be set before the model is built")
        self.config, self.precision = config, precision
        self.stem = TokenEmbedding(config, rngs=rngs, precision=precision)
        self.backbone = config.backbone.build(rngs=rngs, precision=precision)
        self.head = SoftmaxHead(
            config.vocab_size,
            config.backbone.dim,
            config.width,
            tied=config.tied,
            init_std=config.init_std,
            precision=precision,
            rngs=rngs,
        )

    @property
    def decoding(self) -> Literal["drawn"]:
        """Tokens are drawn."""
        return "drawn"

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def chunk_size(self) -> int:
        return 1

    @property
    def reach(self) -> int:
        """The hidden state has read the tokens before; nothing else is asked of them."""
        return 0

    @property
    def num_layers(self) -> int:
        return self.config.backbone.num_periods

    @property
    def table(self) -> Float[Array, "V W"]:
        """The output table, with which the head's states are multiplied."""
        return (self.stem.table if self.head.table is None else self.head.table)[...]

    def init_state(
        self, batch: int, context: int, starts: Int[Array, "B"] | None = None, *, rewindable: bool = False
    ) -> BackboneState:
        """The state before the first token, with room for `context` tokens; row b begins at token `starts[b]`."""
        return self.backbone.init_state(batch, context, starts, rewindable=rewindable)

    def fork(self, state: BackboneState, ends: Int[Array, "A"], num_branches: int, capacity: int) -> BackboneState:
        """Branches of a rewindable state, each from after its first `ends[a]` tokens (`Backbone.fork`)."""
        return self.backbone.fork(state, ends, num_branches, capacity)

    def rewind(self, state: BackboneState, position: int | Int[Array, ""]) -> BackboneState:
        """A rewindable state as it was after `position` tokens."""
        return self.backbone.rewind(state, position)

    def hidden(self, chunks: Int[Array, "B N 1"], state: Any = None) -> tuple[Float[Array, "B N D"], Any]:
        """Position i has read tokens 0..i and predicts token i + 1. With a state, the tokens continue what it has read."""
        return self.backbone(self.stem(chunks[..., 0]), state)

    def draw_noise(self, key: PRNGKey, shape: tuple[int, ...], decoding: str = "drawn") -> Noise:
        """The uniform numbers of samples of leading shape `shape`, whatever the decoding."""
        return Noise(None, jax.random.uniform(stream(key, "tokens"), (*shape, 1, 2)))

    def write(
        self,
        hidden: Float[Array, "*b D"],
        previous: Int[Array, "*b w"],
        noise: Noise,
        *,
        decoding: str = "drawn",
        table: ScoringTable | None = None,
    ) -> Int[Array, "S *b 1"]:
        """One token for each pair of uniform numbers, by inverting the distribution function."""
        assert noise.uniforms is not None
        scoring = ScoringTable.of(self.table, self.precision) if table is None else table
        return draw_tokens(noise.uniforms[..., 0, :], self.head(hidden), scoring, self.precision)[..., None]

    def logits(self, hidden: Float[Array, "*b D"], table: ScoringTable | None = None) -> Float[Array, "*b V"]:
        """The logits of the next token; minus infinity for tokens that `table` leaves out."""
        states = self.head(hidden).reshape(-1, self.config.width)
        if table is None:
            logits = matmul(states, self.table.T, self.precision)
        else:
            columns = product(operand(states, self.precision), table.columns)
            # A gather, not a scatter: for that the CPU compiler transposes the product, and has no bfloat16 code for it then.
            place = jnp.full((self.vocab_size,), columns.shape[1], jnp.int32)
            place = place.at[table.ids].set(jnp.arange(columns.shape[1], dtype=jnp.int32))
            logits = jnp.pad(columns, ((0, 0), (0, 1)), constant_values=-jnp.inf)[:, place]
        return logits.reshape(*hidden.shape[:-1], -1)

    def nats_and_match(
        self, hidden: Float[Array, "*b D"], targets: Int[Array, "*b"]
    ) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
        """-log p(target), and sum_x p(x)^2, at every position."""
        return nats_and_match(self.head(hidden), self.table, targets, self.precision)
