"""Scoring trained models on blocks of held-out text. Everything per position happens on the device, in one compiled
function.

Blocks `[R T]` come from `calm.text.batches.evaluation_blocks`. Results keep the sums of every block, so that two models can be
compared on the same blocks (`calm.evaluate.scores.compare`).
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from calm.core.brier_lm import TextProtocol
from calm.core.intervals import BlockSums
from calm.errors import UsageError
from calm.text.shards import Data

# On CPU small batches stay in cache and are faster; an accelerator wants full ones.
TOKENS_PER_BATCH_CPU, TOKENS_PER_BATCH = 2048, 32768


def text_protocol(data: Data, split: str, *, block_tokens: int, chunk_size: int, seed: int = 0) -> TextProtocol:
    """The protocol of one split of prepared data, from its manifest."""
    source = data.manifest.source
    return TextProtocol(
        dataset=str(source["name"]),
        sha256=str(source["sha256"]),
        split=split,
        tokenizer=str(data.manifest.tokenizer["fingerprint"]),
        block_tokens=block_tokens,
        chunk_size=chunk_size,
        seed=seed,
    )


def checked(
    blocks: Int[np.ndarray, "R T"], document: Int[np.ndarray, "*r"], chunk_size: int, text: TextProtocol | None
) -> TextProtocol:
    """The protocol to stamp: `text`, or one that names nothing where `text` is None.

    Raises:
        UsageError: no blocks, blocks that are not at least two whole chunks, a protocol of other block or chunk sizes.
    """
    rows, block_tokens = blocks.shape
    if not rows or block_tokens % chunk_size or block_tokens < 2 * chunk_size:
        raise UsageError(
            f"evaluation needs blocks of at least 2 chunks of {chunk_size} tokens and a whole number of them, "
            f"got {rows} blocks of {block_tokens} tokens"
        )
    if document.shape != (rows,):
        raise UsageError(f"document must name the document of each block: {rows} blocks, {len(document)} entries")
    if text is None:
        return TextProtocol(
            dataset="unnamed",
            sha256="unknown",
            split="unknown",
            tokenizer="unknown",
            block_tokens=block_tokens,
            chunk_size=chunk_size,
        )
    if (text.block_tokens, text.chunk_size) != (block_tokens, chunk_size):
        raise UsageError(
            f"the protocol says blocks of {text.block_tokens} tokens and K={text.chunk_size}, "
            f"the data and model have {block_tokens} and K={chunk_size}"
        )
    return text


def _batches(blocks: Int[np.ndarray, "R T"], batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of one shape and the row numbers in them; the last one repeats its last row."""
    for start in range(0, len(blocks), batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), len(blocks) - 1)
        yield blocks[rows].astype(np.int32), rows.astype(np.int32)


def run_blocks(
    score: Callable[[np.ndarray, np.ndarray], Any], blocks: Int[np.ndarray, "R T"], batch_size: int | None
) -> tuple[Any, float]:
    """Applies `score(tokens [B T], row numbers [B])` to every block.

    Returns:
        the results (a pytree of arrays with one row a block, on the host) and tokens per second. The rate leaves out the first
        batch, which compiles, unless there is no other. Batches after it are queued without waiting.
    """
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    tokens_per_batch = TOKENS_PER_BATCH_CPU if jax.default_backend() == "cpu" else TOKENS_PER_BATCH
    batch_size = min(len(blocks), batch_size or max(1, tokens_per_batch // blocks.shape[1]))
    results, began, timed = [], time.perf_counter(), len(blocks)
    for number, (tokens, rows) in enumerate(_batches(blocks, batch_size)):
        results.append(score(tokens, rows))
        if number == 0 and len(blocks) > batch_size:
            jax.block_until_ready(results)
            began, timed = time.perf_counter(), len(blocks) - batch_size
    results = jax.device_get(results)
    rate = timed * blocks.shape[1] / max(time.perf_counter() - began, 1e-9)
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(blocks)], *results), rate


def sums_of(total: np.ndarray, count: int, document: np.ndarray, block_tokens: int) -> BlockSums:
    """Block sums of scores `total` [R F] (or [R]), each over `count` positions of its block."""
    total = np.asarray(total, np.float64).reshape(len(document), -1)
    full = np.full(len(document), float(count))
    return BlockSums(total=total, count=full, document=np.asarray(document, np.int64), block_tokens=block_tokens)
