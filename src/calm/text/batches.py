"""Training batches: seeded, resumable to the exact batch, shared between hosts; and blocks for evaluation.

Axis letters: B rows of a batch, T tokens of a row, R blocks.

An epoch cuts the split, taken as a ring, into windows of T tokens from a random phase on, and visits them in random order:
every token once (but for a rest below T), the chunk boundaries somewhere else each time. A share of the rows starts at a
document instead, after 1..K begin ids, as prompts do. Row r of batch b is a function of (seed, b, r) alone; grain's
index shuffle gives the order without holding it.
"""

import functools
from typing import Any

import numpy as np
from jaxtyping import Int

from calm.errors import UsageError
from calm.text.shards import Split

_PHASE, _STARTS = 1, 2  # separate streams of random numbers


class Batches:
    """Endless iterator of int32 [B T] with T = num_tokens.

    Args:
      batch_size: rows of the global batch. With several hosts each gets its batch_size / host_count of them, in order: the
        hosts' arrays, stacked, are what one host would get.
      chunk_size, begin_id: K and the id in front of a document start.
      document_starts: share of the rows that start at a document, drawn evenly from all documents; less where the
        documents are few, so that none is drawn more than about once in an epoch.

    Raises UsageError: the split is shorter than one row, or the sizes do not divide.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        num_tokens: int,
        chunk_size: int,
        begin_id: int,
        seed: int,
        host_index: int = 0,
        host_count: int = 1,
        document_starts: float = 0.1,
    ):
        if batch_size < 1 or batch_size % host_count:
            raise UsageError(f"batch_size: need a positive multiple of the {host_count} hosts, got {batch_size}")
        if not 0 <= host_index < host_count:
            raise UsageError(f"host_index: need 0 <= host_index < host_count={host_count}, got {host_index}")
        if num_tokens < 1 or num_tokens % chunk_size:
            raise UsageError(f"num_tokens: need a positive multiple of chunk_size={chunk_size}, got {num_tokens}")
        if not 0 <= document_starts <= 1:
            raise UsageError(f"document_starts: need a share between 0 and 1, got {document_starts:g}")
        if not 0 <= seed < 2**32:
            raise UsageError(f"seed: need 0 <= seed < 2**32, got {seed}")
        _require_length(split, num_tokens)
        self._split, self._batch_size, self._num_tokens = split, batch_size, num_tokens
        self._chunk_size, self._begin_id, self._seed = chunk_size, begin_id, seed
        # One long file is one document: a tenth of the rows would be its first page, again and again.
        self._document_starts = min(document_starts, len(split.documents) / (split.num_tokens // num_tokens))
        rows = batch_size // host_count
        self._rows = range(host_index * rows, (host_index + 1) * rows)
        self._windows = split.num_tokens // num_tokens
        self._order = shuffled(self._windows, seed)
        self._step = 0

    @property
    def state(self) -> dict[str, int]:
        """Number of the next batch, and the settings that `restore` requires to be equal."""
        return {"step": self._step, "seed": self._seed, "batch_size": self._batch_size, "num_tokens": self._num_tokens}

    def restore(self, state: dict[str, int]) -> None:
        """Continues with the batch before which `state` was taken. Raises UsageError: it has other settings than these."""
        for key, value in self.state.items():
            if key != "step" and state.get(key, value) != value:
                raise UsageError(f"resume: the run's batches had {key}={state[key]}, now it is {value}; keep it as it was")
        self._step = int(state["step"])

    @property
    def epoch(self) -> float:
        """Number of passes over the split so far, in fractions."""
        return self._step * self._batch_size / self._windows

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Int[np.ndarray, "B T"]:
        batch = self[self._step]
        self._step += 1
        return batch

    def __getitem__(self, step: int) -> Int[np.ndarray, "B T"]:
        """Batch number `step`; the iterator stays where it is."""
        random = np.random.default_rng([_STARTS, self._seed, step])
        at_document = random.random(self._batch_size) < self._document_starts
        document = random.integers(len(self._split.documents), size=self._batch_size)
        begins = random.integers(1, self._chunk_size + 1, size=self._batch_size)
        batch = np.empty((len(self._rows), self._num_tokens), np.int32)
        for row, number in zip(batch, self._rows, strict=True):
            if at_document[number]:
                row[: begins[number]] = self._begin_id
                self._split.read_into(row[begins[number] :], int(self._split.documents[document[number]]))
            else:
                self._split.read_into(row, self._window(step * self._batch_size + number))
        return batch

    def _window(self, number: int) -> int:
        """First token of window `number`, counted from the start of training."""
        return self._phase(number // self._windows) + int(self._order[number]) * self._num_tokens

    @functools.lru_cache(maxsize=2)  # noqa: B019 - two integers; the split outlives it
    def _phase(self, epoch: int) -> int:
        return int(np.random.default_rng([_PHASE, self._seed, epoch]).integers(self._split.num_tokens))


def evaluation_blocks(
    split: Split, *, num_tokens: int, max_blocks: int | None = None
) -> tuple[Int[np.ndarray, "R T"], Int[np.ndarray, "R"]]:
    """Blocks of a split in order, without overlap.

    The rest at the end, shorter than T, is left out.

    Returns:
      The blocks, and the number of the document in which each one starts.

    Raises UsageError: the split is shorter than one block.
    """
    _require_length(split, num_tokens)
    count = split.num_tokens // num_tokens
    count = count if max_blocks is None else min(count, max_blocks)
    blocks = split.read(0, count * num_tokens).reshape(count, num_tokens)
    starts = np.arange(count, dtype=np.uint64) * np.uint64(num_tokens)
    return blocks, np.searchsorted(split.documents, starts, side="right").astype(np.int64) - 1


def _require_length(split: Split, num_tokens: int) -> None:
    if split.num_tokens < num_tokens:
        raise UsageError(
            f"split {split.name!r} of {split.folder} has {split.num_tokens} tokens, fewer than one block of {num_tokens}; "
            "use more text or shorter blocks"
        )


def shuffled(size: int, seed: int) -> Any:
    """Endless sequence of 0..size-1 in random order, then in another order, and so on; item i costs constant time."""
    import grain  # here, since it brings jax along, and text that is not trained on needs neither

    return grain.MapDataset.range(size).seed(seed).shuffle().repeat()
