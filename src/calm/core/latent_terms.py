"""What the terms of stage 2 are made of, and what is measured beside them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calm.core.autoencoder import Autoencoder
from calm.core.cross_entropy import fused_cross_entropy, target_log_prob
from calm.core.dense import Precision
from calm.core.energy_score import distance, diversity
from calm.heads.gated import GatedEnergyHead

GATE_BINS = 20


def gate_measures(head: Any, hidden: Float[Array, "B N D"]) -> dict[str, Array]:
    """Of a head with a gate: its mean, and the shares of its values in equal parts of [0, 1], over positions and dimensions."""
    if not isinstance(head, GatedEnergyHead):
        return {}
    gates = jax.lax.stop_gradient(head.gates(hidden))
    place = jnp.clip(gates * GATE_BINS, 0, GATE_BINS - 1).astype(jnp.int32)
    counts = jnp.zeros((GATE_BINS,), jnp.float32).at[place.reshape(-1)].add(1.0)
    return {"gate_mean": gates.mean(), "gate_histogram": counts / gates.size}


def head_loss(head: Any) -> Callable[..., Float[Array, "*b"]]:
    """The loss that a head defines for itself."""
    return head.loss


def slot_energy(
    autoencoder: Autoencoder, samples: Float[Array, "S *b Z"], target: Float[Array, "*b Z"], alpha: float
) -> Float[Array, "*b"]:
    """The energy loss of every token slot in the decoder's hidden states, against one draw of the target; summed over slots.

    A latent's energy score sees a chunk as one point; here each token has its own distance.
    """
    states = autoencoder.decode_states(samples)
    truth = autoencoder.decode_states(target)
    flat = states.reshape(len(states), -1, states.shape[-1])
    fidelity = distance(jnp.square(flat - truth.reshape(1, *flat.shape[1:])).sum(-1), alpha).mean(0)
    return (2 * fidelity - diversity(flat, alpha)).reshape(states.shape[1:-1]).sum(-1)


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
