"""Objective of the token baseline: cross-entropy of the next token, and regularisers that are off by default."""

import dataclasses
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.cross_entropy import fused_cross_entropy
from calm.core.dense import Precision
from calm.core.objective import Terms
from calm.core.response_mask import split_mask, target_weights
from calm.errors import UsageError
from calm.rng import PRNGKey, stream
from calm.token.hidden_flow import FlowGradient, HiddenFlow
from calm.token.label_smoothing import smoothing_term
from calm.token.model import TokenLM, TokenLMConfig
from calm.token.z_loss import fused_z_cross_entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLossConfig:
    """Regularisers of the token baseline's training. A term of weight 0 costs nothing; validation has none of them."""

    label_smoothing: float = 0.0
    """share e of the target that goes evenly to all ids (calm.token.label_smoothing)"""
    z_weight: float = 0.0
    """weight of log^2 of the softmax's normaliser (calm.token.z_loss); published: 1e-4"""
    flow_weight: float = 0.0
    """weight of a rectified flow to the next hidden state, told this one (calm.token.hidden_flow)"""
    flow_gradient: FlowGradient = "condition"
    """which hidden states that flow trains: the one it is told, or its target too, which pulls states together"""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f"loss: label_smoothing must lie in [0, 1), got {self.label_smoothing:g}")
        for name in ("z_weight", "flow_weight"):
            if getattr(self, name) < 0:
                raise UsageError(f"loss: {name} must not be negative, got {getattr(self, name):g}")


class TokenObjective:
    """Mean cross-entropy of the tokens that count but the first of their row, each given those before it, in nats; and the
    regularisers of `loss`.

    The trained weights are the model's; with a flow a dictionary of `lm` and `flow`, which inference drops.
    """

    def __init__(
        self,
        model: TokenLMConfig,
        loss: TokenLossConfig | None = None,
        *,
        context: int,
        precision: Precision = "float32",
    ):
        self.model, self.context, self.precision = model, context, precision
        self.terms = loss or TokenLossConfig()
        self.frozen: Any = {}
        self.graphdef = nnx.graphdef(nnx.eval_shape(lambda: self._lm(nnx.Rngs(0))))
        self.flow_graphdef = nnx.graphdef(nnx.eval_shape(lambda: self._flow(nnx.Rngs(0))))

    def _lm(self, rngs: nnx.Rngs) -> TokenLM:
        return self.model.build(rngs=rngs, precision=self.precision)

    def _flow(self, rngs: nnx.Rngs) -> HiddenFlow:
        return HiddenFlow(self.model.backbone.dim, precision=self.precision, rngs=rngs)

    def init(self, key: PRNGKey) -> Any:
        lm = nnx.state(self._lm(nnx.Rngs(params=key)))
        if not self.terms.flow_weight:
            return lm
        return {"lm": lm, "flow": nnx.state(self._flow(nnx.Rngs(params=stream(key, "flow"))))}

    def lm_params(self, params: Any) -> Any:
        """The language model's part of the trained weights."""
        return params["lm"] if self.terms.flow_weight else params

    def module(self, params: Any) -> TokenLM:
        """The language model with these weights."""
        return nnx.merge(self.graphdef, self.lm_params(params))

    def loss(
        self, params: Any, frozen: Any, tokens: Int[Array, "B T"], key: PRNGKey, step: int | Int[Array, ""] = 0
    ) -> tuple[Float[Array, ""], Terms]:
        tokens, counted = split_mask(tokens)
        lm, targets, weigh = self.module(params), tokens[:, 1:].reshape(-1), self.terms
        hidden, _ = lm.hidden(tokens[:, :-1, None])
        states, table = lm.head(hidden).reshape(targets.size, -1), lm.table
        weights = target_weights(counted, 1)
        flat, terms = weights.reshape(-1), {}
        if weigh.z_weight:
            loss, nats, squares = fused_z_cross_entropy(states, table, targets, flat, weigh.z_weight, self.precision)
            terms["z"] = squares
        else:
            loss = nats = fused_cross_entropy(states, table, targets, flat, self.precision)
        terms["cross_entropy"] = nats
        if weigh.label_smoothing:
            terms["smoothing"] = (smoothing_term(states, table, targets) * flat).sum()
            loss += weigh.label_smoothing * terms["smoothing"]
        if weigh.flow_weight:
            flow = nnx.merge(self.flow_graphdef, params["flow"])
            # Position n has read token n and is weighed as the target of position n - 1, as its token is.
            of_position = flow.loss(stream(key, "flow"), hidden, gradient=weigh.flow_gradient)
            among = weights[:, :-1]
            terms["flow"] = (of_position * among).sum() / among.sum().clip(1e-9)
            loss += weigh.flow_weight * terms["flow"]
        return loss, terms

    def flops_per_token(self) -> float:
        """Forward and backward FLOPs per token."""
        flow = HiddenFlow.flops(self.model.backbone.dim) if self.terms.flow_weight else 0
        return float(self.model.training_flops(self.context) + 3 * flow)
