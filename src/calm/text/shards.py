"""Prepared data: a folder of memory-mapped token shards with a manifest.

    DATA/manifest.json            what it is, where from, how many
         tokenizer.json
         train-00000.bin ...      little-endian uint16 (vocabularies up to 65,536) or uint32, nothing but ids
         train.documents.npy      uint64: where each document starts, in tokens from the start of the split
         train.prompts.npy        uint64: how many of its first tokens are a prompt, for each document, where there are any

The shards of a split are one long row of tokens; every document in it is followed by the end id.
"""

import bisect
import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from calm.errors import UsageError
from calm.text.tokenizer import Tokenizer, load_tokenizer, require_same_tokenizer

FORMAT = 1
JOURNAL = "prepare.journal.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` holds; docs/data.md shows one.

    source: name, kind, sha256 and bytes of the content, and what else identifies it. tokenizer: spec, vocab_size, fingerprint.
    splits: name -> documents, tokens, bytes (of text), shards (file name -> tokens). request: the options it was made with.
    """

    format: int
    source: dict[str, Any]
    license: str
    tokenizer: dict[str, Any]
    dtype: str
    held_out: dict[str, Any]
    splits: dict[str, dict[str, Any]]
    request: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of prepared data, or one line that says why there is none."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        if (Path(folder) / JOURNAL).is_file():
            raise UsageError(f"data {folder}: not finished; run the same `calm data prepare` again and it goes on")
        missing = "holds no manifest.json" if Path(folder).is_dir() else "local path not found"
        raise UsageError(f"data {folder}: {missing}; make it with `calm data prepare --source SOURCE --out {folder}`")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.get("format") != FORMAT:
            raise UsageError(f"data {path}: format {fields.get('format')}, this version reads {FORMAT}; prepare the data again")
        return Manifest(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"data {path}: not a manifest ({error}); prepare the data again") from error


class Split:
    """One split as one long row of tokens.

    `num_tokens` counts the end ids too; `documents` holds each document's first token.
    """

    def __init__(self, folder: Path, name: str, entry: dict[str, Any], dtype: str):
        self.name, self.folder = name, folder
        self.num_tokens: int = entry["tokens"]
        self.has_prompts = "prompt_tokens" in entry
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
        return np.load(self.folder / f"{self.name}.documents.npy", mmap_mode="r")

    @functools.cached_property
    def prompts(self) -> UInt[np.ndarray, "M"] | None:
        """How many tokens of each document are its prompt; None for text without prompts."""
        return np.load(self.folder / f"{self.name}.prompts.npy", mmap_mode="r") if self.has_prompts else None

    def read(self, start: int, length: int) -> Int[np.ndarray, "T"]:
        """Tokens start .. start + length, across shard files. Raises IndexError beyond the split."""
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(f"split {self.name}: tokens {start} to {start + length} of {self.num_tokens}")
        row = np.empty(length, np.int32)
        self.read_into(row, start)
        return row

    def read_into(self, row: Int[np.ndarray, "T"], start: int) -> None:
        """Fills `row` with the tokens from `start` on; behind the last token comes the first again."""
        filled, position = 0, start % self.num_tokens
        while filled < len(row):
            index = bisect.bisect_right(self._ends, position)
            begin = self._ends[index - 1] if index else 0
            take = min(len(row) - filled, self._ends[index] - position)
            row[filled : filled + take] = self._shard(index)[position - begin : position - begin + take]
            filled, position = filled + take, (position + take) % self.num_tokens

    def _shard(self, index: int) -> np.ndarray:
        shard = self._shards[index]
        if shard is None:  # a plain view: slicing the memmap class itself costs several times more
            shard = np.asarray(np.memmap(self._paths[index], self._dtype, mode="r"))
            self._shards[index] = shard
        return shard


class Data:
    """A folder of prepared data, checked: the tokenizer is the one that it was made with."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = load_tokenizer(self.folder / "tokenizer.json")
        expected = self.manifest.tokenizer["fingerprint"]
        require_same_tokenizer(tokenizer.fingerprint, expected, f"data {self.folder / 'tokenizer.json'}")
        return tokenizer

    def split(self, name: str) -> Split:
        if name not in self.manifest.splits:
            raise UsageError(f"data {self.folder}: no split {name!r} (it has: {', '.join(self.manifest.splits)})")
        return Split(self.folder, name, self.manifest.splits[name], self.manifest.dtype)


def open_data(folder: str | Path) -> Data:
    """Prepared data for reading. Raises UsageError: no data there, not finished, damaged, or of another tokenizer."""
    data = Data(folder)
    _ = data.tokenizer  # refuse a mismatch here, not in the middle of a run
    return data
