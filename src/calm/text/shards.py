"""Prepared data: a folder of memory-mapped token shards with a manifest.

    DATA/manifest.json            origin, counts and checksums (`calm.text.manifest`)
         tokenizer.json
         train-00000.bin ...      little-endian uint16 (vocabularies up to 65,536) or uint32, nothing but ids
         train.documents.npy      uint64: where each document starts, in tokens from the start of the split
         train.prompts.npy        uint64: how many of its first tokens are a prompt, for each document, where there are any

The shards of a split are one long row of tokens; every document in it is followed by the end id.
"""

import bisect
import functools
import hashlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from calm.errors import UsageError
from calm.text.manifest import TOKENIZER, read_manifest
from calm.text.progress import Progress
from calm.text.tokenizer import Tokenizer, load_tokenizer, require_same_tokenizer

SMALL = 64 << 20  # bytes of data that are verified whenever they are opened
_READ = 1 << 22  # ids looked at together


class Split:
    """One split as one long row of tokens.

    Attributes:
      num_tokens: how many tokens, end ids included.
      has_prompts: whether documents have prompts (`calm.text.prompted_batches`).
    """

    def __init__(self, folder: Path, name: str, entry: dict[str, Any], dtype: str, vocab_size: int):
        self.name, self.folder, self.vocab_size = name, folder, vocab_size
        self.num_tokens: int = entry["tokens"]
        self.has_prompts = "prompt_tokens" in entry
        self._num_documents: int = entry["documents"]
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._paths = [folder / file for file in entry["shards"]]
        self._ends = list(itertools.accumulate(entry["shards"].values()))
        self._shards: list[np.ndarray | None] = [None] * len(self._paths)
        for path, tokens in zip(self._paths, entry["shards"].values(), strict=True):
            found = path.stat().st_size if path.is_file() else 0
            if found != tokens * self._dtype.itemsize:
                raise UsageError(
                    f"data {path}: {found} bytes, the manifest says {tokens * self._dtype.itemsize}; prepare the data again"
                )

    @functools.cached_property
    def documents(self) -> UInt[np.ndarray, "M"]:
        """First token of each document."""
        starts = self._read_numbers("documents")
        if starts[0] != 0 or starts[-1] >= self.num_tokens:
            raise UsageError(f"data {self._numbers('documents')}: documents start outside the split; prepare the data again")
        return starts

    @functools.cached_property
    def prompts(self) -> UInt[np.ndarray, "M"] | None:
        """Number of tokens at the start of each document that are its prompt; None for text without prompts."""
        return self._read_numbers("prompts") if self.has_prompts else None

    def read(self, start: int, length: int) -> Int[np.ndarray, "T"]:
        """Tokens start .. start + length, across shard files.

        Raises:
          IndexError: beyond the split.
          UsageError: an id is beyond the vocabulary.
        """
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(f"split {self.name}: tokens {start} to {start + length} of {self.num_tokens}")
        row = np.empty(length, np.int32)
        self.read_into(row, start)
        return row

    def read_into(self, row: Int[np.ndarray, "T"], start: int) -> None:
        """Fills `row` with the tokens from `start` on; after the last token comes the first again.

        Raises UsageError: an id is beyond the vocabulary.
        """
        filled, position = 0, start % self.num_tokens
        while filled < len(row):
            index = bisect.bisect_right(self._ends, position)
            begin = self._ends[index - 1] if index else 0
            take = min(len(row) - filled, self._ends[index] - position)
            row[filled : filled + take] = self._shard(index)[position - begin : position - begin + take]
            filled, position = filled + take, (position + take) % self.num_tokens
        # As unsigned numbers, since ids above 2^31 read as negative ones.
        if len(row) and row.view(np.uint32).max() >= self.vocab_size:
            raise UsageError(
                f"data {self.folder}: split {self.name!r} holds the id {int(row.view(np.uint32).max())} near token {start}, "
                f"the vocabulary has {self.vocab_size}; prepare the data again"
            )

    def check(self) -> None:
        """Reads everything. Raises UsageError: ids beyond the vocabulary, documents that overlap or have longer prompts."""
        for start in range(0, self.num_tokens, _READ):
            self.read(start, min(_READ, self.num_tokens - start))
        starts = np.asarray(self.documents)
        if (starts[1:] <= starts[:-1]).any():
            raise UsageError(f"data {self._numbers('documents')}: documents out of order; prepare the data again")
        if self.prompts is not None and (self.prompts > np.diff(starts, append=np.uint64(self.num_tokens))).any():
            raise UsageError(f"data {self._numbers('prompts')}: a prompt longer than its document; prepare the data again")

    def _numbers(self, kind: str) -> Path:
        return self.folder / f"{self.name}.{kind}.npy"

    def _read_numbers(self, kind: str) -> UInt[np.ndarray, "M"]:
        path = self._numbers(kind)
        try:
            numbers = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy reads the header as a Python literal, which fails in many ways
            raise UsageError(f"data {path}: missing or damaged ({_first_line(error)}); prepare the data again") from error
        if numbers.dtype != np.dtype("<u8") or numbers.shape != (self._num_documents,):
            raise UsageError(
                f"data {path}: {numbers.dtype} {numbers.shape}, need uint64 ({self._num_documents},); prepare the data again"
            )
        return numbers

    def _shard(self, index: int) -> np.ndarray:
        shard = self._shards[index]
        if shard is None:  # a plain view: slicing the memmap class itself costs several times more
            shard = np.asarray(np.memmap(self._paths[index], self._dtype, mode="r"))
            self._shards[index] = shard
        return shard


class Data:
    """A folder of prepared data whose tokenizer is the one that it was made with.

    Raises UsageError: no data there, not finished, or a manifest that cannot be.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        self.manifest = read_manifest(folder)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the folder. Raises UsageError: it is another one than the data was made with."""
        tokenizer = load_tokenizer(self.folder / TOKENIZER)
        expected = self.manifest.tokenizer["fingerprint"]
        require_same_tokenizer(tokenizer.fingerprint, expected, f"data {self.folder / TOKENIZER}")
        if tokenizer.vocab_size != self.manifest.tokenizer["vocab_size"]:
            raise UsageError(
                f"data {self.folder}: the manifest says {self.manifest.tokenizer['vocab_size']} ids, its tokenizer has "
                f"{tokenizer.vocab_size}; prepare the data again"
            )
        return tokenizer

    def split(self, name: str) -> Split:
        """The split called `name`. Raises UsageError: there is none, or a shard has not the size that the manifest says."""
        if name not in self.manifest.splits:
            raise UsageError(f"data {self.folder}: no split {name!r} (it has: {', '.join(self.manifest.splits)})")
        vocab_size = self.manifest.tokenizer["vocab_size"]
        return Split(self.folder, name, self.manifest.splits[name], self.manifest.dtype, vocab_size)

    @property
    def bytes(self) -> int:
        """Size of the shards on the disk, as the manifest has it."""
        return sum(entry["tokens"] for entry in self.manifest.splits.values()) * np.dtype(self.manifest.dtype).itemsize

    def verify(self, *, quiet: bool = True) -> None:
        """Compares every file with its checksum, and every id with the vocabulary.

        Data prepared before there were checksums has its sizes, ids and documents checked.

        Raises UsageError: a file is damaged or missing; the message names it.
        """
        splits = [self.split(name) for name in self.manifest.splits]
        paths = [self.folder / name for name in self.manifest.checksums]
        sizes = {path: path.stat().st_size if path.is_file() else 0 for path in paths}
        with Progress("verify", sum(sizes.values()), quiet=quiet) as progress, ThreadPoolExecutor(4) as pool:
            for path, digest in zip(paths, pool.map(checksum, paths), strict=True):
                if digest != self.manifest.checksums[path.name]:
                    found = "missing" if not digest else "damaged (not the bytes of the manifest's checksum)"
                    raise UsageError(f"data {path}: {found}; restore the file or prepare the data again")
                progress.advance(sizes[path])
        for split in splits:
            split.check()


def checksum(path: Path) -> str:
    """SHA-256 of a file in hexadecimal; empty where there is no such file."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_data(folder: str | Path, verify: bool | None = None) -> Data:
    """Opens prepared data for reading.

    Args:
      verify: reads everything and compares it with the checksums (`Data.verify`); None does so for at most `SMALL` bytes.

    Raises UsageError: no data there, not finished, damaged, or of another tokenizer.
    """
    data = Data(folder)
    _ = data.tokenizer  # refuse a mismatch here, not in the middle of a run
    if data.bytes <= SMALL if verify is None else verify:
        data.verify(quiet=data.bytes <= SMALL)
    return data


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
