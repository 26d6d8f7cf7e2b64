"""Sources of text, as the user names them, read as streams of documents in pieces.

    pydoc                      the documentation inside this Python (python_docs)
    a file or a folder         .txt, .jsonl, .parquet (files)
    hf:NAME or hf:NAME:SUBSET  a data set of the Hugging Face hub (hub)
    world:NAME                 a small language of known distribution (calm.worlds)

A source has parts (files, hub splits), each of which belongs to a split. A part can be read again from the start, always with
the same pieces, or from a document on.
"""

import abc
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from calm.config import parse_human_int
from calm.errors import UsageError
from calm.text import files, python_docs
from calm.text.compressed import Feed
from calm.text.document_pieces import Piece, cut_text
from calm.text.hub import HubDataset
from calm.worlds.registry import split_spec, world_of


class Part(NamedTuple):
    """A file or a hub split, with the split of its documents before any are held out, and its size."""

    name: str
    split: str
    bytes: int


class Source(abc.ABC):
    """Documents in a fixed order.

    Attributes:
      name: stamped on results; holds no local folder.
      kind: pydoc, files, hub or world.
      parts: files or hub splits, in order.
      named: whether the names of the parts gave the splits.
      scannable: whether reading it twice is cheap.
      license: of the text, where it is known.
      tokenizer: spec that suits it where the user names none.
      words: all words of its text, where they are known.
      left_out: names of files beside those that are read.
    """

    name: str
    kind: str
    parts: tuple[Part, ...]
    named: bool = False
    scannable: bool = True
    license: str = ""
    tokenizer: str = "bpe:8192"
    words: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @abc.abstractmethod
    def pieces(self, part: int, feed: Feed | None = None, found: Counter[str] | None = None) -> Iterator[Piece]:
        """Yields the documents of a part from its start.

        `feed` gets the bytes that the checksum is about; `found` counts "records without text" and "separators".
        """

    def pieces_from(self, part: int, document: int) -> Iterator[Piece]:
        """Yields the documents of a part from number `document` on (an empty document counts)."""
        pieces = self.pieces(part)
        for _ in range(document):
            while not next(pieces).last:
                pass
        return pieces

    def stamp(self) -> dict[str, Any]:
        """Entries of the manifest beyond name, kind and checksum."""
        return {}

    def state(self) -> Any:
        """JSON that changes when the source does; compared before an interrupted run continues."""
        return [[part.name, part.bytes] for part in self.parts]


def open_source(
    spec: str | Path,
    *,
    field: str = "text",
    separator: str | None = None,
    prompt_field: str | None = None,
    out: str | Path | None = None,
) -> Source:
    """Opens the source that the user named.

    Args:
      field: where .jsonl, .parquet and hub records hold their text.
      separator: what stands between the documents of a .txt, such as "<|endoftext|>"; None: the file is one document.
      prompt_field: where records of .jsonl files hold a prompt, which comes before their text and is only read.
      out: the folder that is prepared; what lies in it is no part of the source.

    Raises UsageError: there is no such source, or it holds no text for training.
    """
    if prompt_field is not None and (str(spec) == "pydoc" or str(spec).startswith(("hf:", "world:"))):
        raise UsageError(f"source {spec}: prompts (--prompt-field {prompt_field}) are read from .jsonl files only")
    if str(spec) == "pydoc":
        return PythonDocs()
    if str(spec).startswith("hf:"):
        return Hub(str(spec), field)
    if str(spec).startswith("world:"):
        return WorldText(str(spec).removeprefix("world:"))
    return Files(Path(spec).expanduser(), field, separator, prompt_field, None if out is None else Path(out).expanduser())


class PythonDocs(Source):
    """The documentation inside this Python."""

    kind = name = "pydoc"
    license = python_docs.LICENSE

    def __init__(self):
        self._documents = list(python_docs.python_documents())
        if not self._documents:
            raise UsageError("source pydoc: this Python comes without its standard library's sources; give a file or folder")
        self.parts = (Part("pydoc", "train", sum(len(text.encode()) for text in self._documents)),)

    def pieces(self, part: int, feed: Feed | None = None, found: Counter[str] | None = None) -> Iterator[Piece]:
        for text in self._documents:
            if feed:
                feed(text.encode())
            yield from cut_text(text)

    def stamp(self) -> dict[str, Any]:
        return {"python": python_docs.python_version()}

    def state(self) -> Any:
        return [python_docs.python_version(), self.parts[0].bytes]


class Files(Source):
    """A file, or a folder in which names of files may give the splits.

    With train files present, files of no split are left out.
    """

    kind = "files"

    def __init__(self, path: Path, field: str, separator: str | None, prompt_field: str | None = None, out: Path | None = None):
        found, others = files.list_files(path, out)
        self.name = path.resolve().name
        self._options = dict(field=field, separator=separator, prompt_field=prompt_field)
        splits = {file: files.split_of(file, path) if path.is_dir() else None for file in found}
        self.named = any(splits.values())
        unnamed = "left out" if "train" in splits.values() else "train"
        self._paths = [file for file in found if (splits[file] or unnamed) != "left out"]
        others += [file for file in found if (splits[file] or unnamed) == "left out"]
        self.left_out = tuple(file.relative_to(path).as_posix() for file in sorted(others))
        self.parts = tuple(
            Part(
                file.relative_to(path).as_posix() if path.is_dir() else file.name,
                splits[file] or "train",
                file.stat().st_size,
            )
            for file in self._paths
        )
        if all(part.split != "train" for part in self.parts):
            raise UsageError(f"source {path}: every file is named valid or test; name one train, or give a single file")

    def pieces(self, part: int, feed: Feed | None = None, found: Counter[str] | None = None) -> Iterator[Piece]:
        return files.read_pieces(self._paths[part], feed=feed, found=found, **self._options)

    def stamp(self) -> dict[str, Any]:
        listed = [{"file": part.name, "split": part.split, "bytes": part.bytes} for part in self.parts]
        return {"files": listed, "left_out": list(self.left_out)}

    def state(self) -> Any:
        return [[part.name, part.bytes, path.stat().st_mtime_ns] for part, path in zip(self.parts, self._paths, strict=True)]


class Hub(Source):
    """A data set of the Hugging Face hub."""

    kind = "hub"
    scannable = False

    def __init__(self, spec: str, field: str):
        self._dataset = HubDataset(spec, field)
        # hf: also takes a local folder, whose path is nobody's business
        local = Path(spec.removeprefix("hf:")).expanduser()
        self.name = f"hf:{local.name}" if local.exists() else spec
        self.named = len(self._dataset.splits) > 1
        self.parts = tuple(Part(self._dataset.splits[ours], ours, 0) for ours in self._dataset.splits)
        self._revision = self._dataset.revision()

    def pieces(self, part: int, feed: Feed | None = None, found: Counter[str] | None = None) -> Iterator[Piece]:
        return self._cut(part, 0)

    def pieces_from(self, part: int, document: int) -> Iterator[Piece]:
        return self._cut(part, document)

    def _cut(self, part: int, document: int) -> Iterator[Piece]:
        texts = self._dataset.documents(self.parts[part].split, skip=document)
        return itertools.chain.from_iterable(map(cut_text, texts))

    def stamp(self) -> dict[str, Any]:
        return {"revision": self._revision}

    def state(self) -> Any:
        return [self.name, self._revision, *super().state()]


class WorldText(Source):
    """Text drawn from a world: `world:markov`, or with settings, `world:markov:words=128,tokens=5M`.

    Settings besides those of the world: `tokens`, the number to train on (2M, at most 1G; the other splits get a twentieth
    each, at least 16k), and `draw`, the seed of the text. A world's own `seed` decides the language.
    """

    kind = "world"
    named = True
    tokenizer = "words"

    def __init__(self, spec: str):
        settings = split_spec(spec)[1]
        tokens, self._draw = (parse_human_int(settings.get(key, default)) for key, default in (("tokens", "2M"), ("draw", "0")))
        if not 1 <= tokens <= 10**9 or self._draw < 0:
            raise UsageError(
                f"source world:{spec}: need tokens >= 1, at most 1G, and draw >= 0, got tokens={tokens}, draw={self._draw}"
            )
        self.name = f"world:{spec}"
        world = world_of(self.name)
        assert world is not None
        self._world, self.words = world, world.words
        held_out = max(tokens // 20, 2**14)
        self._tokens = {"train": tokens, "valid": held_out, "test": held_out}
        self._texts: dict[int, list[str]] = {}
        self.parts = tuple(Part(split, split, self._written(number)) for number, split in enumerate(self._tokens))

    def _written(self, part: int) -> int:
        words = np.array(self.words)
        tokens = list(self._tokens.values())[part]
        documents = self._world.documents(tokens, seed=[self._draw, part])
        self._texts[part] = [" ".join(words[document].tolist()) for document in documents]
        return sum(map(len, self._texts[part]))

    def pieces(self, part: int, feed: Feed | None = None, found: Counter[str] | None = None) -> Iterator[Piece]:
        for text in self._texts[part]:
            if feed:
                feed(text.encode())
            yield from cut_text(text)

    def stamp(self) -> dict[str, Any]:
        return {"entropy_rate": self._world.entropy_rate, "brier_ceilings": self._world.ceilings().tolist()}
