"""What training of the token baseline minimises: cross-entropy of the next token, and nothing else."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from calm.losses import fused_cross_entropy
from calm.models.token_lm import TokenLM, TokenLMConfig
from calm.nn.dense import Precision
from calm.rng import PRNGKey
from calm.train.objective import Terms
from calm.train.response_mask import split_mask, target_weights


class TokenObjective:
    """Mean cross-entropy of the tokens that count but the first of their row, each given those before it, in nats."""

    def __init__(self, model: TokenLMConfig, *, context: int, precision: Precision = "float32"):
        self.model, self.context, self.precision = model, context, precision
        self.frozen: Any = {}
        self.graphdef = nnx.graphdef(nnx.eval_shape(lambda: model.build(rngs=nnx.Rngs(0), precision=precision)))

    def init(self, key: PRNGKey) -> Any:
        return nnx.state(self.model.build(rngs=nnx.Rngs(params=key), precision=self.precision))

    def module(self, params: Any) -> TokenLM:
        """The language model with these weights."""
        return nnx.merge(self.graphdef, params)

    def loss(
        self, params: Any, frozen: Any, tokens: Int[Array, "B T"], key: PRNGKey, step: int | Int[Array, ""] = 0
    ) -> tuple[Float[Array, ""], Terms]:
        tokens, counted = split_mask(tokens)
        lm, targets = self.module(params), tokens[:, 1:].reshape(-1)
        hidden, _ = lm.hidden(tokens[:, :-1, None])
        states = lm.head(hidden).reshape(targets.size, -1)
        weights = target_weights(counted, 1).reshape(-1)
        nats = fused_cross_entropy(states, lm.table, targets, weights, self.precision)
        return nats, {"cross_entropy": nats}

    def flops_per_token(self) -> float:
        """Forward and backward FLOPs per token; the backward pass counts twice the forward."""
        return 3.0 * self.model.flops(self.context)
