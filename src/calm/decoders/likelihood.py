"""The likelihood term: -log of the mean probability of the next chunk over samples of its latent."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calm.core.cross_entropy import fused_cross_entropy, target_log_prob
from calm.core.dense import Precision
from calm.core.objective import Term, TermContext, TermInputs
from calm.errors import UsageError


def log_mean_nats(
    states: Float[Array, "S *b K W"],
    table: Float[Array, "V W"],
    targets: Int[Array, "*b K"],
    precision: Precision,
    weights: Float[Array, "*b"],
    *,
    table_gradient: bool,
) -> Float[Array, ""]:
    """-log (1/S) sum_s p_s(chunk), in nats per token, added up over chunks by `weights`; p_s the product over K tokens.

    Its gradient is the cross-entropy's with every sample weighted by its share of that sum; so the shares are found
    first, keeping no logits, and one fused pass with known weights follows.
    """
    num_samples, width, chunk_size = len(states), states.shape[-1], targets.shape[-1]
    each = weights.reshape(-1) / chunk_size
    rows = jnp.broadcast_to(targets, states.shape[:-1]).reshape(-1)
    flat = states.reshape(-1, width)
    if num_samples == 1:
        return fused_cross_entropy(flat, table, rows, jnp.repeat(each, chunk_size), precision, table_gradient)
    chunk = target_log_prob(jax.lax.stop_gradient(flat), jax.lax.stop_gradient(table), rows, precision)
    chunk = chunk.reshape(num_samples, -1, chunk_size).sum(-1)
    value = -((jax.nn.logsumexp(chunk, axis=0) - math.log(num_samples)) * each).sum()
    shares = jnp.repeat((jax.nn.softmax(chunk, axis=0) * each).reshape(-1), chunk_size)
    weighted = fused_cross_entropy(flat, table, rows, shares, precision, table_gradient)
    return weighted + jax.lax.stop_gradient(value - weighted)


@Term.register("likelihood")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LikelihoodTerm(Term):
    """-log mean_s p(chunk | latent s), in nats per token, by the context decoder or the frozen autoencoder's; not in the paper.

    With few samples of the prior it teaches the decoder that the latent is noise (docs/log.md), so that the vector carries
    nothing. Its samples are to be decoded by drawing.
    """

    num_samples: int = 4
    """samples that the mean is over"""

    trains_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 1:
            raise UsageError(f"loss: likelihood.num_samples must be at least 1, got {self.num_samples}")

    def check(self, context: TermContext) -> None:
        if self.weight and self.num_samples > context.num_samples:
            raise UsageError(f"loss: likelihood.num_samples must lie in 1..num_samples={context.num_samples}")

    def samples_needed(self, context: TermContext) -> int:
        return self.num_samples if context.model.decoder_reads_latent else 0

    def flops(self, context: TermContext) -> int:
        codes, count = context.autoencoder, self.samples_needed(context)
        if context.model.context_decoder is None:
            return count * (codes.decoder_flops() + codes.vocabulary_flops())
        return context.model.writing_flops(max(1, count))

    def values(self, inputs: TermInputs) -> dict[str, Array]:
        decoder, samples = inputs.lm.context_decoder, inputs.samples[: self.num_samples]
        if decoder is None:
            states, table = inputs.autoencoder.decode_states(samples), jax.lax.stop_gradient(inputs.autoencoder.table)
        else:
            states = decoder.text_states(inputs.hidden, samples, inputs.chunks)
            table = decoder.table
        options = dict(table_gradient=decoder is not None)
        nats = log_mean_nats(states, table, inputs.targets, inputs.lm.precision, inputs.weights, **options)
        return {"likelihood": nats}
