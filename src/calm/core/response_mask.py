"""Which tokens of a batch count in the loss: all, or of prompt-and-response data the responses alone.

Batches are int32 `[B T]` everywhere. A token that is only read, never predicted, is handed over as its complement `~id`, which
is negative as no id is (`calm.text.prompted_batches`); an objective takes the two apart before anything else.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def split_mask(tokens: Int[Array, "*b T"]) -> tuple[Int[Array, "*b T"], Bool[Array, "*b T"]]:
    """The ids, and which of them count."""
    counted = tokens >= 0
    return jnp.where(counted, tokens, ~tokens), counted


def target_weights(counted: Bool[Array, "B T"], chunk_size: int) -> Float[Array, "B N"]:
    """The weight of every chunk but the first of its row, as a target: they add up to 1 over the chunks that count, else are 0.

    A chunk counts if its first token does. Batches of prompt-and-response data let responses begin on a boundary, so that is
    every chunk with a token of a response in it, the one with its end included.
    """
    chunks = counted[:, chunk_size::chunk_size].astype(jnp.float32)
    return chunks / jnp.maximum(chunks.sum(), 1)
