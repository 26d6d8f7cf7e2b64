"""Repetition: chunks that would write the same few tokens a second time.

The rule of `no_repeat_ngram_size` in the transformers library, for chunks: no run of `length` tokens may occur twice in a row's
prompt and continuation. Runs are counted in tokens and may cross chunk boundaries, so a repetition is seen whatever its phase.
Without likelihoods a chunk cannot be down-weighted before it is drawn; it is rejected afterwards. The rest is distributed
as by the sampler, given that nothing repeats: exactly for the exact sampler, over the draws at hand for those that count.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from calm.text.chunking import NOTHING


def repeats(history: Int[Array, "B T"], chunks: Int[Array, "S B K"], length: int) -> Bool[Array, "S B"]:
    """Whether a chunk, put at the end of a row's history, ends a run of `length` tokens that the row already has.

    `history` is what each row has, right-aligned; `NOTHING` stands where it has no token and equals no token. The runs that a
    chunk ends are the K that end at its tokens; each is compared with all runs before it, those within the chunk included.
    """
    samples, _, width = chunks.shape
    front = jnp.pad(history, ((0, 0), (length, 0)), constant_values=NOTHING)
    tail = jnp.broadcast_to(front[:, front.shape[1] - (length - 1) :], (samples, history.shape[0], length - 1))
    ends = jnp.concatenate([tail, chunks], axis=-1)  # the runs are its windows: number j ends at the chunk's token j
    windows = [ends[..., offset : offset + width] for offset in range(length)]  # token `offset` of every run

    runs = history.shape[1] - length + 1
    found = jnp.zeros(chunks.shape[:2], bool)
    for place in range(width):
        equal = jnp.ones((samples, history.shape[0], max(runs, 0)), bool)
        for offset in range(length):
            token = windows[offset][..., place, None]
            equal &= (history[:, offset : offset + max(runs, 0)] == token) & (token != NOTHING)
        found |= equal.any(-1)
        for earlier in range(place):
            # also a run that begins in the history and ends in the chunk may come again within the chunk
            twice = jnp.ones(chunks.shape[:2], bool)
            for offset in range(length):
                twice &= (windows[offset][..., earlier] == windows[offset][..., place]) & (
                    windows[offset][..., place] != NOTHING
                )
            found |= twice
    return found
