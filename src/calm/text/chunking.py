"""Prompts as chunks of K tokens. The end of a prompt is a chunk boundary: begin ids fill its front.

Axis letters: B batch, T tokens, N chunks, K tokens of a chunk.

Training windows at document starts look the same (`calm.text.batches`), so a model has seen every number of begins, 1..K, as
often as its corpus has document starts. A prompt of whole chunks has none in front: a corpus of one long document hardly
teaches what a whole chunk of begins means, and at K = 8 such a chunk spoiled all that was written after it (docs/log.md).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from calm.errors import UsageError

NOTHING = -1
"""number in place of a token where there is none, as before the beginning of a text"""


def chunk_prompt(ids: Int[np.ndarray, "T"] | Sequence[int], chunk_size: int, begin_id: int) -> Int[np.ndarray, "N K"]:
    """Chunks of a prompt: begins and the first T mod K tokens, if any, then whole chunks; N = ceil(T / K).

    The empty prompt is one chunk of begins, the unconditional start.

    Raises UsageError: `chunk_size` is below 1.
    """
    if chunk_size < 1:
        raise UsageError(f"chunk_size: need at least 1, got {chunk_size}")
    row = np.asarray(ids, np.int32)
    begins = np.full(num_begins(len(row), chunk_size), begin_id, np.int32)
    return np.concatenate([begins, row]).reshape(-1, chunk_size)


def num_begins(num_tokens: int, chunk_size: int) -> int:
    """Number of begin ids in front of a prompt of `num_tokens` tokens."""
    return -num_tokens % chunk_size if num_tokens else chunk_size


def num_chunks(num_tokens: int, chunk_size: int) -> int:
    """Number of chunks in a prompt of `num_tokens` tokens."""
    return (num_tokens + num_begins(num_tokens, chunk_size)) // chunk_size


def pad_prompts(
    prompts: Sequence[Int[np.ndarray, "_"] | Sequence[int]], chunk_size: int, begin_id: int
) -> tuple[Int[np.ndarray, "B N K"], Int[np.ndarray, "B"]]:
    """Prompts of any lengths as one batch, aligned at their ends.

    Returns:
      The chunks, padded on the left with chunks of begins, and the first chunk of each row that is not padding.

    Raises UsageError: there is no prompt.
    """
    if not prompts:
        raise UsageError("prompts: need at least one")
    rows = [chunk_prompt(prompt, chunk_size, begin_id) for prompt in prompts]
    longest = max(len(row) for row in rows)
    chunks = np.full((len(rows), longest, chunk_size), begin_id, np.int32)
    starts = np.array([longest - len(row) for row in rows], np.int32)
    for chunk_row, row, start in zip(chunks, rows, starts, strict=True):
        chunk_row[start:] = row
    return chunks, starts
