"""Terms of the objective beside the energy score that concern hidden state and head: own loss, auxiliary predictor, anchor."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from calm.core.dense import Dense, Precision, dense_flops
from calm.core.objective import Term, TermContext, TermInputs
from calm.errors import UsageError
from calm.heads.chunk_predictor import ChunkPredictor
from calm.rng import stream


@Term.register("own")
@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnTerm(Term):
    """The loss that a head defines for itself (flow matching, diffusion, mixture); nothing for a head without one."""

    trains_head: ClassVar[bool] = True
    compares_latents: ClassVar[bool] = True

    def check(self, context: TermContext) -> None:
        if not context.model.head.has_own_loss:
            raise UsageError(f"loss.terms.own: a head of kind {context.model.head.kind!r} has no loss of its own; use energy")

    def samples_needed(self, context: TermContext) -> int:
        return 0

    def flops(self, context: TermContext) -> int:
        return context.model.head.loss_flops(context.model.backbone.dim, context.model.latent_dim)

    def values(self, inputs: TermInputs) -> dict[str, Array]:
        return {"own": inputs.mean(inputs.lm.head.loss(stream(inputs.key, "own"), inputs.hidden, inputs.posterior))}


@Term.register("auxiliary")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AuxiliaryTerm(Term):
    """Cross-entropy of the next chunk's K tokens from the hidden state (`calm.heads.chunk_predictor`); not in the paper."""

    def modules(self, context: TermContext, precision: Precision) -> dict[str, Callable[[nnx.Rngs], nnx.Module]]:
        if not self.weight:
            return {}
        sizes = (context.model.backbone.dim, context.model.chunk_size, context.autoencoder.dim)
        return {"auxiliary": lambda rngs: ChunkPredictor(*sizes, precision=precision, rngs=rngs)}

    def flops(self, context: TermContext) -> int:
        dim, codes = context.model.backbone.dim, context.autoencoder
        return dense_flops(dim, context.model.chunk_size * codes.dim) + codes.vocabulary_flops()

    def values(self, inputs: TermInputs) -> dict[str, Array]:
        if not self.weight:
            return {}
        table = jax.lax.stop_gradient(inputs.autoencoder.table)
        return {"auxiliary": inputs.modules["auxiliary"].loss(inputs.hidden, inputs.targets, table, inputs.weights)}


@Term.register("anchor")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AnchorTerm(Term):
    """Squared error, summed over Z, of a linear map from the hidden state to the next posterior mean."""

    compares_latents: ClassVar[bool] = True

    def modules(self, context: TermContext, precision: Precision) -> dict[str, Callable[[nnx.Rngs], nnx.Module]]:
        if not self.weight:
            return {}
        sizes = (context.model.backbone.dim, context.model.latent_dim)
        return {"anchor": lambda rngs: Dense(*sizes, use_bias=True, precision=precision, rngs=rngs)}

    def flops(self, context: TermContext) -> int:
        return dense_flops(context.model.backbone.dim, context.model.latent_dim)

    def values(self, inputs: TermInputs) -> dict[str, Array]:
        if not self.weight:
            return {}
        predicted = inputs.modules["anchor"](inputs.hidden)
        return {"anchor": inputs.mean(jnp.square(predicted - inputs.posterior.mean).sum(-1))}
