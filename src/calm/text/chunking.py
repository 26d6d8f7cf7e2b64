"""Prompts -> chunks of K tokens. The end of a prompt is a chunk boundary: what is missing goes in front, as begin ids.

Training windows at document starts look the same (`calm.text.batches`), so a model has seen every number of begins, 1..K, as
often as its corpus has document starts. A prompt of whole chunks has none in front: a corpus of one long document hardly
teaches what a whole chunk of begins means, and at K = 8 such a chunk spoiled all that was written after it (docs/log.md).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from calm.errors import UsageError

NOTHING = -1
"""stands for a token where there is none, as before the beginning of a text"""


def chunk_prompt(ids: Int[np.ndarray, "T"] | Sequence[int], chunk_size: int, begin_id: int) -> Int[np.ndarray, "N K"]:
    """The first T mod K tokens, if any, behind K - (T mod K) begins, then whole chunks: N = ceil(T / K).

    The empty prompt is one chunk of begins, the unconditional start.
    """
    if chunk_size < 1:
        raise UsageError(f"chunk_size: need at least 1, got {chunk_size}")
    row = np.asarray(ids, np.int32)
    begins = np.full(num_begins(len(row), chunk_size), begin_id, np.int32)
    return np.concatenate([begins, row]).reshape(-1, chunk_size)


def num_begins(num_tokens: int, chunk_size: int) -> int:
    """How many begins stand in front of a prompt."""
    return -num_tokens % chunk_size if num_tokens else chunk_size


def num_chunks(num_tokens: int, chunk_size: int) -> int:
    """Of a prompt."""
    return (num_tokens + num_begins(num_tokens, chunk_size)) // chunk_size


def pad_prompts(
    prompts: Sequence[Int[np.ndarray, "_"] | Sequence[int]], chunk_size: int, begin_id: int
) -> tuple[Int[np.ndarray, "B N K"], Int[np.ndarray, "B"]]:
    """Prompts of any lengths as one batch, aligned at their ends.

    Returns the chunks, padded on the left with chunks of begins, and `starts`: each row's first chunk that is not padding.
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
