"""Token shards while they are being written: whatever happens, everything that the journal counts is on the disk.

A shard grows as `NAME.bin.part` and gets its name when it is full. `flush` puts everything on the disk and returns counts; a
writer made from those counts cuts off whatever a killed run wrote after them, so the bytes do not depend on interruptions.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int

from calm.errors import UsageError
from calm.text.manifest import JOURNAL, MANIFEST, TOKENIZER
from calm.text.shards import checksum


def remove_prepared(folder: Path, names: Sequence[str]) -> None:
    """Removes all that preparing writes for splits of these names, and nothing else."""
    for name in names:
        for pattern in (f"{name}-[0-9]*.bin", f"{name}.bin.part", f"{name}.documents.*", f"{name}.prompts.*"):
            for path in folder.glob(pattern):
                path.unlink()
    for name in (MANIFEST, TOKENIZER, JOURNAL):
        (folder / name).unlink(missing_ok=True)


def _truncate(path: Path, size: int) -> None:
    found = path.stat().st_size if path.is_file() else 0
    if found < size:
        raise UsageError(f"data {path}: {found} bytes where {size} were written; start over with --overwrite")
    os.truncate(path, size)


class SplitWriter:
    """Appends the documents of one split.

    Args:
      end_id: written after every document.
      prompts: also writes how many tokens of each document are its prompt.
      counts: what `flush` returned before the run that is continued here was interrupted.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        dtype: str,
        shard_tokens: int,
        end_id: int,
        prompts: bool = False,
        counts: dict[str, Any] | None = None,
    ):
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._end = np.array([end_id], np.int32)
        counts = counts or {"tokens": 0, "documents": 0, "bytes": 0, "open": False}
        self.tokens, self.documents, self.bytes = counts["tokens"], counts["documents"], counts["bytes"]
        self.open = counts["open"]  # a document that has not ended yet
        self.prompts = prompts
        self.prompt, self.prompt_tokens = counts.get("prompt", 0), counts.get("prompt_tokens", 0)  # of that one, and of all
        self.checksums: dict[str, str] = dict(counts.get("checksums", {}))  # of files that are complete
        self._starts: list[int] = []
        self._lengths: list[int] = []
        self._cut_back()
        self._file: BinaryIO | None = None
        self._starts_file = self._starts_path.open("ab")
        self._prompts_file = self._prompts_path.open("ab") if prompts else None

    def append(self, ids: Int[np.ndarray, "T"], num_bytes: int, last: bool, prompt: bool = False) -> None:
        """Appends the next piece of the present document, or the first of a new one; pieces of its prompt come first."""
        if not self.open:
            if not len(ids):
                return
            self._starts.append(self.tokens)
            self.documents += 1
            self.open, self.prompt = True, 0
        self._put(ids)
        self.prompt += len(ids) * prompt
        self.bytes += num_bytes
        if last:
            self.end_document()

    def end_document(self) -> None:
        """Ends the present document, if there is one."""
        if self.open:
            self._put(self._end)
            self._lengths.append(self.prompt)
            self.prompt_tokens += self.prompt
            self.open, self.prompt = False, 0

    def flush(self) -> dict[str, Any]:
        """Brings everything onto the disk and returns the counts from which another writer can continue."""
        self._starts_file.write(np.array(self._starts, "<u8").tobytes())
        if self._prompts_file is not None:
            self._prompts_file.write(np.array(self._lengths, "<u8").tobytes())
        self._starts, self._lengths = [], []
        for file in (self._starts_file, self._prompts_file, self._file):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
        counts = {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes, "open": self.open}
        counts["checksums"] = dict(self.checksums)
        return counts | ({"prompt": self.prompt, "prompt_tokens": self.prompt_tokens} if self.prompts else {})

    def close(self) -> None:
        """Closes the files as they are."""
        for file in (self._starts_file, self._prompts_file, self._file):
            if file is not None:
                file.close()

    def finish(self) -> dict[str, Any]:
        """Names the last shard, writes the documents' starts, and returns the manifest's entry."""
        self.end_document()
        self.flush()
        self.close()
        if self._part.exists():
            self._complete(self._part, self._shard(self.tokens // self.shard_tokens))
        if not self.tokens:
            return {"documents": 0, "tokens": 0, "bytes": 0, "shards": {}}
        for path in (self._starts_path, *([self._prompts_path] if self.prompts else [])):
            temporary = path.with_suffix(".tmp")
            with temporary.open("wb") as file:
                np.save(file, np.memmap(path, "<u8", mode="r"))
                file.flush()
                os.fsync(file.fileno())
            self._complete(temporary, path.with_suffix(".npy"))
        sizes = [self.shard_tokens] * (self.tokens // self.shard_tokens)
        sizes += [self.tokens % self.shard_tokens] if self.tokens % self.shard_tokens else []
        shards = {self._shard(index).name: size for index, size in enumerate(sizes)}
        for name in set(shards) - set(self.checksums):  # completed by a version that took none
            self.checksums[name] = checksum(self.folder / name)
        counts = {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes, "shards": shards}
        return counts | ({"prompt_tokens": self.prompt_tokens} if self.prompts else {})

    # -- files --------------------------------------------------------------------------------------------------------

    def _put(self, ids: Int[np.ndarray, "T"]) -> None:
        position = 0
        while position < len(ids):
            room = self.shard_tokens - self.tokens % self.shard_tokens
            part = ids[position : position + room]
            if self._file is None:
                self._file = self._part.open("ab")
            self._file.write(part.astype(self._dtype).tobytes())
            self.tokens += len(part)
            position += len(part)
            if self.tokens % self.shard_tokens == 0:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                self._file = None
                self._complete(self._part, self._shard(self.tokens // self.shard_tokens - 1))

    def _complete(self, part: Path, path: Path) -> None:
        """Gives a complete file its name and takes its checksum."""
        os.replace(part, path)
        self.checksums[path.name] = checksum(path)

    def _cut_back(self) -> None:
        """Cuts the files back to the counts; a shard that was completed after them will be written over."""
        full, rest = divmod(self.tokens, self.shard_tokens)
        present = self._shard(full)
        if present.exists():  # it was completed after the counts were taken
            os.replace(present, self._part)
        if rest:
            _truncate(self._part, rest * self._dtype.itemsize)
        else:
            self._part.unlink(missing_ok=True)
        self._starts_path.touch()
        _truncate(self._starts_path, self.documents * 8)
        if self.prompts:
            self._prompts_path.touch()
            _truncate(self._prompts_path, (self.documents - self.open) * 8)

    def _shard(self, index: int) -> Path:
        return self.folder / f"{self.name}-{index:05d}.bin"

    @property
    def _part(self) -> Path:
        return self.folder / f"{self.name}.bin.part"

    @property
    def _starts_path(self) -> Path:
        return self.folder / f"{self.name}.documents.part"

    @property
    def _prompts_path(self) -> Path:
        return self.folder / f"{self.name}.prompts.part"
