"""A row's text in compiled programs that let two models write it: what stands before a place, and before the text."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from calm.text.chunking import NOTHING


def tokens_before(text: Int[Array, "T"], at: Int[Array, ""], number: int, first: Int[Array, ""]) -> Int[Array, "X"]:
    """The last tokens before a place; `NOTHING` before `first`."""
    index = at - number + jnp.arange(number)
    return jnp.where(index < first, NOTHING, text[index])


def begins_before(prompt: Int[Array, ""], num_tokens: Int[Array, ""], chunk_size: int) -> Int[Array, ""]:
    """How many begin ids stand in front of `num_tokens`, of which the first `prompt` are the prompt: as many as fill the first
    chunk (`calm.text.chunking.num_begins`), and before an empty prompt the chunk of them that it is.
    """
    fill = -num_tokens % chunk_size
    return jnp.where((prompt == 0) & (fill == 0), chunk_size, fill)
