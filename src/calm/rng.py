"""Named random streams: a key is a root key, a name and a step, never a position in a chain of splits.

Two streams of different names are independent, and adding one does not move another, so a change in one place of a training
step leaves the randomness of every other place as it was. Idea: kauldron's `rngs_lib`.
"""

import zlib

import jax
from jaxtyping import Array, Int, Key, UInt32

PRNGKey = Key[Array, ""] | UInt32[Array, "2"]


def stream(key: PRNGKey, name: str, step: int | Int[Array, ""] = 0) -> PRNGKey:
    """The key of stream `name` at `step`: fold_in(fold_in(key, crc32(name)), step)."""
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), step)


def row_keys(key: PRNGKey, rows: int) -> Key[Array, "B"]:
    """One key a row, by its number: row i has the same key whatever the size of the batch."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jax.numpy.arange(rows))
