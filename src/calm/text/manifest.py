"""`manifest.json` of prepared data: counts, origin and checksums, checked when it is read.

A data folder may come from anybody, so nothing in the manifest is believed that could make numpy read anything but ids: dtypes
other than uint16 and uint32, file names that leave the folder and counts that cannot be are refused.
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from calm.errors import UsageError

FORMAT = 1
MANIFEST, TOKENIZER, JOURNAL = "manifest.json", "tokenizer.json", "prepare.journal.json"
DTYPES = ("uint16", "uint32")

_PREPARED_FILES = re.compile(
    rf"{re.escape(MANIFEST)}|{re.escape(TOKENIZER)}|{re.escape(JOURNAL)}"
    r"|\w+-\d+\.bin|\w+\.bin\.part|\w+\.(documents|prompts)\.(npy|part|tmp)"
)
_SPLIT_NAME = re.compile(r"\w+")
_SHARD_NAME = re.compile(r"[\w-]+\.bin")
_CHECKED_NAME = re.compile(r"[\w-]+(\.\w+)+")
_TEXTS = ("source.name", "source.sha256", "tokenizer.spec", "tokenizer.fingerprint", "held_out.rule")
_MOST = 1 << 62
"""tokens or bytes; more would not fit the integers that count them"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of `manifest.json`; docs/data.md shows one.

    source: name, kind, sha256 and bytes of the content, and whatever else identifies it. tokenizer: spec, vocab_size,
    fingerprint. splits: name -> documents, tokens, bytes (of text), shards (file name -> tokens). request: the options of the
    command. checksums: file name -> SHA-256, empty in data prepared before there were any. notes: what a reader of the corpus
    should know, such as records that were left out (`Manifest.remarks`).
    """

    format: int
    source: dict[str, Any]
    license: str
    tokenizer: dict[str, Any]
    dtype: str
    held_out: dict[str, Any]
    splits: dict[str, dict[str, Any]]
    request: dict[str, Any]
    checksums: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """Text of the file."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that are equal for equal tokens in equal splits, whatever the folder is called.

        Data prepared before there were checksums is told apart by its source, its request and its counts.
        """
        content: Any = [self.tokenizer["fingerprint"], self.dtype, self.splits]
        content += [self.checksums] if self.checksums else [self.source.get("sha256"), self.request]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def remarks(self) -> list[str]:
        """One line for each thing that was left out or lost, to be shown to a person."""
        lines = []
        if left_out := self.source.get("left_out"):
            lines.append(left_out_line(left_out))
        if records := self.notes.get("records_without_text"):
            lines.append(f"{records:,} record{'s' * (records > 1)} without text (null or empty) left out")
        if "unused_separator" in self.notes:
            lines.append(f"the separator {self.notes['unused_separator']!r} occurs nowhere: every .txt file is one document")
        if lost := self.notes.get("lost_characters"):
            lines.append(f"{lost:.2%} of the characters do not come back from the tokenizer (white space aside)")
        return lines


def left_out_line(names: list[str]) -> str:
    """Number and names of files that were left out."""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
    return f"{len(names):,} file{'s' * (len(names) > 1)} left out: {shown}"


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds prepared data, complete or not."""
    return (folder / JOURNAL).is_file() or ((folder / MANIFEST).is_file() and (folder / TOKENIZER).is_file())


def is_prepared_file(name: str) -> bool:
    """Whether preparing writes a file of this name."""
    return bool(_PREPARED_FILES.fullmatch(name))


def read_manifest(folder: str | Path) -> Manifest:
    """Reads and checks the manifest of prepared data.

    Raises UsageError: there is none, or what it says cannot be; the message names the file and the entry.
    """
    path = Path(folder).expanduser() / MANIFEST
    if not path.is_file():
        if (path.parent / JOURNAL).is_file():
            raise UsageError(f"data {folder}: not finished; run the same `calm data prepare` again and it goes on")
        missing = "holds no manifest.json" if path.parent.is_dir() else "local path not found"
        raise UsageError(f"data {folder}: {missing}; make it with `calm data prepare --source SOURCE --out {folder}`")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.get("format") != FORMAT:
            raise UsageError(f"data {path}: format {fields.get('format')}, this version reads {FORMAT}; prepare the data again")
    except (ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"data {path}: not a manifest ({error}); prepare the data again") from error
    wrong = _wrong(fields)
    if wrong:
        raise UsageError(f"data {path}: {wrong}; prepare the data again")
    return Manifest(**fields)


def _wrong(found: dict[str, Any]) -> str | None:
    """Names the first entry that cannot be, None where all can."""
    for field in dataclasses.fields(Manifest):
        kind = {"format": int, "license": str, "dtype": str}.get(field.name, dict)
        if field.name not in found and field.default_factory is dataclasses.MISSING:
            return f"there is no {field.name}"
        if not isinstance(found.get(field.name, kind()), kind):
            return f"{field.name} is no {kind.__name__}"
    if unknown := sorted(set(found) - {field.name for field in dataclasses.fields(Manifest)}):
        return f"unknown entry {unknown[0]!r}"
    for table, key in (name.split(".") for name in _TEXTS):
        if not isinstance(found[table].get(key), str):
            return f"{table}.{key} is no text"
    if found["dtype"] not in DTYPES:
        return f"dtype {found['dtype']!r}; ids are stored as {' or '.join(DTYPES)}"
    if not _is_count(found["tokenizer"].get("vocab_size"), least=1, most=2**31):
        return f"tokenizer.vocab_size {found['tokenizer'].get('vocab_size')!r} is no number of ids"
    if not found["splits"]:
        return "there is no split"
    wrong = next(filter(None, (_wrong_split(name, entry) for name, entry in found["splits"].items())), None)
    return wrong or _wrong_checksums(found.get("checksums", {}), found["splits"])


def _wrong_checksums(checksums: dict[str, Any], splits: dict[str, Any]) -> str | None:
    for name, digest in checksums.items():
        if not _CHECKED_NAME.fullmatch(name) or not isinstance(digest, str):
            return f"checksums: {name!r} is no file of this folder"
    shards = {file for entry in splits.values() for file in entry["shards"]}
    if checksums and (without := sorted(shards - set(checksums))):
        return f"checksums: there is none of {without[0]}"
    return None


def _wrong_split(name: str, entry: Any) -> str | None:
    if not _SPLIT_NAME.fullmatch(name) or not isinstance(entry, dict) or not isinstance(entry.get("shards"), dict):
        return f"split {name!r} is no split"
    for key, least in {"documents": 1, "tokens": 1, "bytes": 0, "prompt_tokens": 0}.items():
        if not _is_count(entry.get(key, 0 if key == "prompt_tokens" else None), least):
            return f"splits.{name}.{key} {entry.get(key)!r} is no count"
    for file, tokens in entry["shards"].items():
        if not _SHARD_NAME.fullmatch(file):
            return f"splits.{name}: {file!r} is no shard of this folder"
        if not _is_count(tokens, least=1):
            return f"splits.{name}: {tokens!r} tokens in {file} is no count"
    if sum(entry["shards"].values()) != entry["tokens"]:
        return f"splits.{name}: {entry['tokens']} tokens, and {sum(entry['shards'].values())} in its shards"
    if max(entry["documents"], entry.get("prompt_tokens", 0)) > entry["tokens"]:
        return f"splits.{name}: more documents or prompt tokens than tokens"
    return None


def _is_count(value: Any, least: int = 0, most: int = _MOST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
