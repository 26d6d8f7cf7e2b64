"""Training batches of prompts and responses, laid out as in generation, with the loss on responses alone.

Axis letters: B rows of a batch, T tokens of a row, R rows.

Every document is laid out as generation lays it out: begin ids where they are needed, so that the prompt ends on a chunk
boundary; the prompt; the response and its end id; end ids up to the next boundary. A row starts at a document and continues
with those after it until it is full. Begin ids and prompts come as complements `~id`, negative numbers: they are read and not
predicted.

Row r of batch b is a function of (seed, b, r) alone, like those of `calm.text.batches`.
"""

from typing import Any

import numpy as np
from jaxtyping import Int

from calm.errors import UsageError
from calm.text.batches import Batches, shuffled
from calm.text.chunking import num_begins
from calm.text.shards import Split


class PromptedBatches(Batches):
    """Endless iterator of int32 [B T]; negative entries are complements of ids that are only conditioned on.

    Arguments as for `Batches`. Every document begins a row once in as many rows as there are documents; a prompt longer than
    half a row is cut in front, where only memory is lost.

    Raises UsageError: the split has no prompts.
    """

    def __init__(self, split: Split, **options: Any):
        super().__init__(split, **options)
        if split.prompts is None:
            raise UsageError(
                f"split {split.name!r} of {split.folder} has no prompts; prepare the data with --prompt-field NAME"
            )
        self._order = shuffled(len(split.documents), options["seed"])

    @property
    def epoch(self) -> float:
        """Number of times that every document has begun a row, in fractions."""
        return self._step * self._batch_size / len(self._split.documents)

    def __getitem__(self, step: int) -> Int[np.ndarray, "B T"]:
        """Batch number `step`; the iterator stays where it is."""
        first = [int(self._order[step * self._batch_size + number]) for number in self._rows]
        return np.stack([self._row(document) for document in first])

    def in_order(self, count: int) -> Int[np.ndarray, "R T"]:
        """At most `count` rows in the order of the documents, for evaluation; each begins after the last whole one before."""
        rows, document = [], 0
        while document < len(self._split.documents) and len(rows) < count:
            rows.append(self._row(document))
            used = 0
            while document < len(self._split.documents) and (used == 0 or used + self._length(document) <= self._num_tokens):
                used += self._length(document)
                document += 1
        return np.stack(rows)

    def _row(self, document: int) -> Int[np.ndarray, "T"]:
        parts, size = [], 0
        while size < self._num_tokens:
            parts.append(self._document(document % len(self._split.documents)))
            size, document = size + len(parts[-1]), document + 1
        return np.concatenate(parts)[: self._num_tokens]

    def _bounds(self, document: int) -> tuple[int, int, int]:
        """First token, number of tokens and number of prompt tokens; a prompt above half a row is cut in front."""
        starts, prompts = self._split.documents, self._split.prompts
        assert prompts is not None
        begin = int(starts[document])
        end = int(starts[document + 1]) if document + 1 < len(starts) else self._split.num_tokens
        prompt = min(int(prompts[document]), end - begin)
        cut = max(0, prompt - self._num_tokens // 2)
        return begin + cut, end - begin - cut, prompt - cut

    def _length(self, document: int) -> int:
        _, length, prompt = self._bounds(document)
        return -(-(self._fill(prompt) + length) // self._chunk_size) * self._chunk_size

    def _fill(self, prompt: int) -> int:
        return num_begins(prompt, self._chunk_size)

    def _document(self, document: int) -> Int[np.ndarray, "_"]:
        begin, length, prompt = self._bounds(document)
        fill = self._fill(prompt)
        row = np.empty(self._length(document), np.int32)
        row[:fill] = self._begin_id
        row[fill : fill + length] = self._split.read(begin, length)
        row[fill + length :] = row[fill + length - 1]  # the document's end id
        row[: fill + prompt] = ~row[: fill + prompt]
        return row
