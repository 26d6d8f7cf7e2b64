"""A memory of the text itself: what followed, earlier on, where the last tokens were the same.

A decoder inside the chunk knows a few tokens before a place and a plan that was made before its chunk began. Of the rest of the
text, such as how a name of three tokens went on a page ago, it knows what the plan could carry. Here it looks back by itself.
With e the unit rows of a token table, a place i and a token j of an earlier chunk are alike by

    s(i, j) = sum_{o = 1..w} a_o  e_{i-o} . e_{j-o}

a soft match of the w tokens before each, a_o learned. What comes back is the mean row of the tokens j, with shares softmax(s)
beside one learned score for "nothing like it", under which nothing comes back.

It has w + 1 weights and no keys to project, so a decoder may look back on hundreds of tokens at a small part of its cost, and
what it remembers is those tokens: no state has to be kept. Related: a continuous cache compares hidden states (Grave et al.
2017, arXiv:1612.04426), a pointer sentinel says how much to copy (Merity et al. 2017, arXiv:1609.07843), and attention learns
such matches by itself as induction heads (Olsson et al. 2022, arXiv:2209.11895).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from calm.core.dense import Precision, dense_flops, operand
from calm.text.chunking import NOTHING


class Memory(NamedTuple):
    """The last R + w tokens of a text, of which the last R can be recalled."""

    rows: Float[Array, "*b M W"]
    """of the table, as operands of products"""
    scale: Float[Array, "*b M"]
    """one over their length; 0 where there is no token"""
    known: Bool[Array, "*b R"]


class Recall(nnx.Module):
    """Two equal ways: places of a chunk after a `Memory`, or all chunks of a text at once (`over_text`)."""

    def __init__(self, window: int, length: int, precision: Precision):
        self.window, self.length, self.precision = window, length, precision
        self.match = nnx.Param(4.0 * 0.5 ** jnp.arange(window, dtype=jnp.float32))
        self.nothing = nnx.Param(jnp.float32(5.0))

    @staticmethod
    def flops(length: int, width: int) -> int:
        """Forward FLOPs of one place: its last token against R, and the mean of their rows."""
        return 2 * dense_flops(length, width)

    def remember(self, table: Float[Array, "V W"], tokens: Int[Array, "*b M"]) -> Memory:
        """The memory of the R + w tokens before a chunk; `NOTHING` before the first of a text."""
        return Memory(*self._rows(table, tokens), tokens[..., self.window :] != NOTHING)

    def likeness(self, memory: Memory, table: Float[Array, "V W"], tokens: Int[Array, "*b X"]) -> Float[Array, "*b X M"]:
        """Likeness of X tokens and those of the memory, one by one."""
        rows, scale = self._rows(table, tokens)
        alike = jnp.einsum("...xw,...mw->...xm", rows, memory.rows, preferred_element_type=jnp.float32)
        return alike * scale[..., None] * memory.scale[..., None, :]

    def read(self, memory: Memory, before: Sequence[Float[Array, "*b X M"]]) -> Float[Array, "*b X W"]:
        """Recalled vectors at X places, `before[o - 1]` being the likeness of the token o before each."""
        window, length = self.window, memory.known.shape[-1]
        match = self.match[...]
        scores = sum(match[o] * before[o][..., window - o - 1 : window - o - 1 + length] for o in range(window))
        scores = jnp.where(memory.known[..., None, :], scores, -jnp.inf)
        return self._mean(scores, memory.rows[..., window:, :])

    def read_behind(self, memory: Memory, table: Float[Array, "V W"], window: Int[Array, "*b w"]) -> Float[Array, "*b W"]:
        """Recalled vector at the place after a window of tokens."""
        likeness = self.likeness(memory, table, window)
        before = [likeness[..., self.window - o : self.window - o + 1, :] for o in range(1, self.window + 1)]
        return self.read(memory, before)[..., 0, :]

    def over_text(self, table: Float[Array, "V W"], chunks: Int[Array, "B M K"]) -> Float[Array, "B N K W"]:
        """Recalled vectors at the places of every chunk but the first: every likeness is worked out once."""
        batch, length, size = chunks.shape
        tokens, total = chunks.reshape(batch, -1), length * size
        rows, scale = self._rows(table, tokens)
        alike = jnp.einsum("btw,bsw->bts", rows, rows, preferred_element_type=jnp.float32)
        alike *= scale[:, :, None] * scale[:, None, :]
        match, scores = self.match[...], jnp.zeros(())
        for o in range(1, self.window + 1):  # the tokens o before both; before the text there is nothing alike
            scores += match[o - 1] * jnp.pad(alike, ((0, 0), (o, 0), (o, 0)))[:, size:total, :total]
        chunk_begins = jnp.arange(size, total) // size * size
        ago = chunk_begins[:, None] - jnp.arange(total)
        scores = jnp.where((ago > 0) & (ago <= self.length) & (tokens != NOTHING)[:, None], scores, -jnp.inf)
        return self._mean(scores, rows).reshape(batch, length - 1, size, -1)

    def _rows(self, table: Float[Array, "V W"], tokens: Int[Array, "*b"]) -> tuple[Float[Array, "*b W"], Float[Array, "*b"]]:
        """Rows of the table as operands, and one over their length. Lengths are taken by id: a branch of a text has hundreds of
        tokens to remember, and what is worked out for each is written to memory."""
        scale = jax.lax.rsqrt(jnp.square(table.astype(jnp.float32)).sum(-1) + 1e-6)
        return operand(table, self.precision)[tokens], jnp.where(tokens == NOTHING, 0.0, scale[tokens])

    def _mean(self, scores: Float[Array, "*b X R"], rows: Float[Array, "*b R W"]) -> Float[Array, "*b X W"]:
        nothing = jnp.broadcast_to(self.nothing[...], (*scores.shape[:-1], 1))
        shares = jax.nn.softmax(jnp.concatenate([scores, nothing], axis=-1), axis=-1)[..., :-1]
        products = dict(preferred_element_type=jnp.float32)
        return jnp.einsum("...xr,...rw->...xw", operand(shares, self.precision), rows, **products)
