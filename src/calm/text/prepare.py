"""Preparing a source as a folder of token shards: any size in bounded memory, on all cores, continued after a kill.

Steps, each recorded in a journal when it is done:
  1. scan     read the source once: checksum, counts, is it text (a hub data set is streamed and not scanned)
  2. train    byte-level BPE on an even sample of the train split, at most SAMPLE characters; a word vocabulary on all of it
  3. encode   pieces in batches; every few batches the shards are synced and the journal says how far they count
The manifest is written last: a folder with a manifest is complete. The tokens of a piece depend on nothing but the piece, so
an interrupted and resumed run ends in the same bytes as one that was left alone.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calm.errors import CalmError, UsageError
from calm.text.atomic_write import write_whole
from calm.text.folder_lock import FolderLock
from calm.text.manifest import FORMAT, JOURNAL, MANIFEST, TOKENIZER, Manifest, left_out_line, read_manifest
from calm.text.progress import Progress
from calm.text.round_trip import RoundTrip
from calm.text.shard_writer import SplitWriter, remove_prepared
from calm.text.shards import checksum
from calm.text.source_walk import Cursor, batches, num_bytes, walk
from calm.text.sources import Source, open_source
from calm.text.splits import NAMES, Labelled, SplitPlan, check_shares, describe, make_plan
from calm.text.tokenizer import Tokenizer, load_tokenizer, require_same_tokenizer
from calm.text.tokenizer_spec import WORDS, bpe_size, is_trained, tokenizer_path, words_size
from calm.text.tokenizer_training import train_bpe, train_words, word_tokenizer

AUTO = "auto"
SAMPLE = 50_000_000  # characters a BPE is trained on
BATCH = 1 << 21  # characters encoded at once: enough for every core, little enough for memory
CHECKPOINT = 4  # batches between two entries of the journal
MOST_LOST, MEASURED = 0.2, 100_000  # share of characters a given tokenizer may lose; characters by which that is known


def prepare(
    source: str | Path,
    out: str | Path,
    tokenizer: str | Path = "auto",
    *,
    field: str = "text",
    separator: str | None = None,
    prompt_field: str | None = None,
    valid: float = 0.05,
    test: float = 0.05,
    shard_tokens: int = 100_000_000,
    license: str = "",
    overwrite: bool = False,
    quiet: bool = False,
) -> Manifest:
    """Prepares `source` in the folder `out`, continuing where an interrupted run stopped.

    Args:
      source: pydoc, a file, a folder, hf:NAME[:SUBSET], world:NAME[:SETTINGS] (`calm.text.sources`).
      tokenizer: bytes, bpe:SIZE (trained on the train split), words or words:SIZE (all words of the train split, or the most
        frequent ones; of a world, its own), a tokenizer.json, a tiktoken rank file; auto is words for a world, else bpe:8192.
      field, separator, prompt_field: where records hold their text; what separates documents in a .txt; where .jsonl records
        hold a prompt before their text (it is stored, and marked as such: `calm.text.prompted_batches`).
      valid, test: shares held out when no file name says the split.
      shard_tokens: tokens in a shard file.
      license: stamped into the manifest.
      overwrite: replaces what `out` holds, whatever it was made from.

    Raises:
      UsageError: the source is missing, empty or not text; `out` was made from something else.
      FolderInUse: another process prepares data in `out`.
      CalmError: the disk is full (what was written stays, and the same call continues).
    """
    out = Path(out).expanduser()
    try:
        if shard_tokens < 1:
            raise UsageError(f"shard_tokens: need at least 1, got {shard_tokens}")
        if not _made(tokenizer):
            load_tokenizer(tokenizer)  # a wrong path shows here, not after the source was read
        check_shares(valid, test)
        opened = open_source(source, field=field, separator=separator, prompt_field=prompt_field, out=out)
        tokenizer = opened.tokenizer if str(tokenizer) == AUTO else tokenizer
        request = {
            "source": opened.name,
            "tokenizer": tokenizer_path(tokenizer).name if _is_file(tokenizer) else str(tokenizer),
            "field": field,
            "separator": separator,
            "prompt_field": prompt_field,
            "valid": valid,
            "test": test,
            "shard_tokens": shard_tokens,
            "license": license or opened.license,
        }
        out.mkdir(parents=True, exist_ok=True)
        job = _Job(opened, out, tokenizer, request, quiet)
        if (out / MANIFEST).is_file() and not overwrite:
            return job.already_done()  # nothing is written, so it may be a folder that others read
        with FolderLock(out, "calm data prepare"):
            if overwrite:
                remove_prepared(out, NAMES)
            return job.run()
    except FileExistsError as error:
        raise UsageError(f"out {out}: a file is in the way of the folder") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CalmError(f"out {out}: the disk is full; make room and run the same command again, it goes on") from error
        raise


class _Job:
    def __init__(self, source: Source, out: Path, tokenizer: str | Path, request: dict[str, Any], quiet: bool):
        self.source, self.out, self.spec, self.request, self.quiet = source, out, tokenizer, request, quiet
        self.journal: dict[str, Any] = {"request": request, "state": source.state()}

    def run(self) -> Manifest:
        """Does what is left to do; the folder is locked."""
        if (self.out / MANIFEST).is_file():
            return self.already_done()
        if (self.out / JOURNAL).is_file():
            self._go_on()
        elif next(self.out.glob("*.bin"), None) is not None:
            raise UsageError(f"out {self.out}: holds .bin files but no manifest; choose another folder or --overwrite")
        if self.source.left_out:
            self._say(f"source {self.source.name}: {left_out_line(list(self.source.left_out))}")
        scanned = self._scanned()
        plan = make_plan(self.source, self.request["valid"], self.request["test"], scanned["documents"], scanned["characters"])
        tokenizer = self._tokenizer(plan, scanned)
        entries, checksums, cursor, round_trip = self._encode(plan, tokenizer, scanned["text_bytes"])
        if not entries["train"]["tokens"]:
            raise UsageError(f"source {self.source.name}: no text for the train split")
        content = {"sha256": scanned["sha256"] or cursor.checksum, "bytes": scanned["bytes"] or cursor.bytes}
        manifest = Manifest(
            format=FORMAT,
            source={"name": self.source.name, "kind": self.source.kind, **content, **self.source.stamp()},
            license=self.request["license"],
            tokenizer={
                "spec": self.request["tokenizer"],
                "vocab_size": tokenizer.vocab_size,
                "fingerprint": tokenizer.fingerprint,
            },
            dtype=_dtype(tokenizer),
            held_out=describe(plan),
            splits={name: entry for name, entry in entries.items() if entry["tokens"]},
            request=self.request,
            checksums={TOKENIZER: checksum(self.out / TOKENIZER), **checksums},
            notes=self._notes(scanned, cursor, round_trip),
        )
        write_whole(self.out / MANIFEST, manifest.to_json())
        self._clean_up()
        for remark in Manifest.remarks(dataclasses.replace(manifest, source={})):  # files left out were named before
            self._say(f"source {self.source.name}: {remark}")
        return manifest

    # -- what is there already ----------------------------------------------------------------------------------------

    def _notes(self, scanned: dict[str, Any], cursor: Cursor, round_trip: RoundTrip) -> dict[str, Any]:
        """Entries of the manifest about what was left out or lost; none where nothing was."""
        notes: dict[str, Any] = {}
        without_text = (scanned.get("records_without_text") or 0) + cursor.without_text
        if without_text:
            notes["records_without_text"] = without_text
        if self.request["separator"] is not None and self.source.scannable and not scanned.get("separators", 1):
            notes["unused_separator"] = self.request["separator"]
        if round_trip.lost:
            notes["lost_characters"] = round_trip.share
        return notes

    def already_done(self) -> Manifest:
        """Manifest of the same request of the same content, which was finished. Raises UsageError: it was another one."""
        manifest = read_manifest(self.out)
        self._require_same_request(manifest.request)
        self._require_given_tokenizer(manifest.tokenizer["fingerprint"])
        content = self._scan()["sha256"] if self.source.scannable else manifest.source["sha256"]
        if content != manifest.source["sha256"]:
            raise UsageError(
                f"out {self.out}: was prepared from other content of {self.source.name}; give --overwrite to redo it"
            )
        self._say(f"{self.out}: already prepared")
        self._clean_up()
        return manifest

    def _go_on(self) -> None:
        try:
            journal = json.loads((self.out / JOURNAL).read_text(encoding="utf-8"))
            if "cursor" not in journal and (
                journal["request"] != self.request or journal["state"] != _plain(self.journal["state"])
            ):
                return  # nothing was encoded yet: another request may take the folder
            self._require_same_request(journal["request"])
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"out {self.out / JOURNAL}: damaged; start over with --overwrite") from error
        if journal["state"] != _plain(self.journal["state"]):
            raise UsageError(f"out {self.out}: the source changed since the interrupted run; start over with --overwrite")
        self.journal = journal
        if "tokenizer" in journal:
            self._require_given_tokenizer(journal["tokenizer"])
        self._say(f"{self.out}: going on where the last run stopped")

    def _require_same_request(self, before: dict[str, Any]) -> None:
        for key, value in self.request.items():
            if key == "tokenizer" and _is_file(value) and _is_file(str(before.get(key))):
                continue  # their contents are compared, not their names
            if before.get(key) != value:
                raise UsageError(
                    f"out {self.out}: was prepared with {key}={before.get(key)!r}, now asked {value!r}; "
                    "choose another folder or give --overwrite"
                )

    def _require_given_tokenizer(self, before: str) -> None:
        """Compares a given tokenizer with the one before: a file of the same name may hold another one now."""
        if not _made(self.spec) and load_tokenizer(self.spec).fingerprint != before:
            raise UsageError(
                f"out {self.out}: was prepared with another tokenizer than {self.spec}; give --overwrite to redo it"
            )

    def _record(self, **entries: Any) -> None:
        self.journal.update(entries)
        write_whole(self.out / JOURNAL, json.dumps(self.journal))

    def _clean_up(self) -> None:
        for name in NAMES:
            for kind in ("documents", "prompts"):
                (self.out / f"{name}.{kind}.part").unlink(missing_ok=True)
        (self.out / JOURNAL).unlink(missing_ok=True)

    def _say(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    # -- 1. scan ------------------------------------------------------------------------------------------------------

    def _scanned(self) -> dict[str, Any]:
        if "scan" not in self.journal:
            nothing = dict.fromkeys(("sha256", "bytes", "documents", "characters", "text_bytes"))
            self._record(scan=self._scan() if self.source.scannable else nothing)
        return self.journal["scan"]

    def _scan(self) -> dict[str, Any]:
        """Checksum and bytes of the content; documents and characters of the train parts; what was left out."""
        digest = hashlib.sha256()
        counts = {"bytes": 0, "documents": 0, "characters": 0, "text_bytes": 0}
        found: Counter[str] = Counter()
        with Progress("scan", sum(part.bytes for part in self.source.parts), quiet=self.quiet) as progress:

            def feed(block: bytes) -> None:
                digest.update(block)
                counts["bytes"] += len(block)
                progress.advance(len(block))

            for index, part in enumerate(self.source.parts):
                for piece in self.source.pieces(index, feed, found):
                    counts["text_bytes"] += num_bytes(piece.text)
                    if part.split == "train":
                        counts["documents"] += piece.last
                        counts["characters"] += len(piece.text)
        if not counts["characters"]:
            raise UsageError(f"source {self.source.name}: no text for the train split")
        left_out = {"records_without_text": found["records without text"], "separators": found["separators"]}
        return {"sha256": digest.hexdigest(), **counts, **left_out}

    # -- 2. tokenizer -------------------------------------------------------------------------------------------------

    def _tokenizer(self, plan: SplitPlan, scanned: dict[str, Any]) -> Tokenizer:
        path = self.out / TOKENIZER
        if "tokenizer" in self.journal:
            tokenizer = load_tokenizer(path)
            require_same_tokenizer(tokenizer.fingerprint, self.journal["tokenizer"], f"data {path}")
            return tokenizer
        if str(self.spec) == WORDS and self.source.words:
            tokenizer = word_tokenizer(self.source.words)
        else:
            tokenizer = self._train(plan, scanned["characters"]) if is_trained(self.spec) else load_tokenizer(self.spec)
        tokenizer.save(path)
        self._record(tokenizer=tokenizer.fingerprint)
        return tokenizer

    def _train(self, plan: SplitPlan, characters: int | None) -> Tokenizer:
        """Trains a BPE on an even sample of the train split, or collects words from the whole of it."""
        merges, words = bpe_size(self.spec), words_size(self.spec)
        most = SAMPLE if merges is not None else sys.maxsize
        share = min(1.0, most / characters) if characters else 1.0
        with Progress("train", min(most, characters) if characters else None, quiet=self.quiet) as progress:

            def texts() -> Iterator[str]:
                taken = 0
                for index, item in enumerate(
                    item for _, items in walk(self.source, plan, Cursor()) for item in items if item.split == "train"
                ):
                    if int((index + 1) * share) > int(index * share):
                        taken += len(item.text)
                        progress.advance(len(item.text))
                        yield item.text
                    if taken >= most:
                        return

            trained = train_words(texts(), words) if merges is None else train_bpe(texts(), merges)
        size = merges or words
        if size is not None and trained.vocab_size < size:
            what = "merges" if merges else "words"
            self._say(f"tokenizer: the text holds {what} for {trained.vocab_size} of {size} ids")
        return trained

    # -- 3. encode ----------------------------------------------------------------------------------------------------

    def _encode(
        self, plan: SplitPlan, tokenizer: Tokenizer, total: int | None
    ) -> tuple[dict[str, Any], dict[str, str], Cursor, RoundTrip]:
        """Entries of the splits, checksums of their files, and the counts at the end of the source."""
        cursor, round_trip = Cursor(**self.journal.get("cursor", {})), RoundTrip(**self.journal.get("round_trip", {}))
        counts = self.journal.get("splits", {})
        writers = {
            name: SplitWriter(
                self.out,
                name,
                dtype=_dtype(tokenizer),
                shard_tokens=self.request["shard_tokens"],
                end_id=tokenizer.end_id,
                prompts=self.request["prompt_field"] is not None,
                counts=counts.get(name),
            )
            for name in NAMES
        }
        with contextlib.ExitStack() as stack, Progress("encode", total, quiet=self.quiet) as progress:
            for writer in writers.values():
                stack.callback(writer.close)
            progress.skip(cursor.bytes)
            for number, batch in enumerate(batches(walk(self.source, plan, cursor), BATCH), 1):
                before = cursor.bytes
                cursor = self._write(batch, tokenizer, writers, round_trip)
                if round_trip.measured >= MEASURED:
                    self._require_little_lost(round_trip, tokenizer)
                progress.advance(cursor.bytes - before)
                if number % CHECKPOINT == 0:
                    flushed = {name: writer.flush() for name, writer in writers.items()}
                    self._record(cursor=dataclasses.asdict(cursor), splits=flushed, round_trip=dataclasses.asdict(round_trip))
            self._require_little_lost(round_trip, tokenizer)
            entries = {name: writer.finish() for name, writer in writers.items()}
        checksums = {file: digest for writer in writers.values() for file, digest in writer.checksums.items()}
        return entries, dict(sorted(checksums.items())), cursor, round_trip

    def _require_little_lost(self, round_trip: RoundTrip, tokenizer: Tokenizer) -> None:
        """Refuses a given tokenizer that loses much of the text; a word level one marks what it lacks as unknown."""
        if round_trip.share > MOST_LOST and not _made(self.spec) and tokenizer.level != "word":
            raise UsageError(
                f"tokenizer {self.spec}: {round_trip.share:.0%} of the characters of {self.source.name} do not come back "
                f"from it (at most {MOST_LOST:.0%} may be lost); choose one that was made for such text, or bpe:8192"
            )

    def _write(
        self,
        batch: list[tuple[Cursor, list[Labelled]]],
        tokenizer: Tokenizer,
        writers: dict[str, SplitWriter],
        round_trip: RoundTrip,
    ) -> Cursor:
        items = [item for _, items in batch for item in items]
        rows = tokenizer.encode_batch([item.text for item in items])
        for item, row in zip(items, rows, strict=True):
            for name, writer in writers.items():
                if name != item.split:
                    writer.end_document()  # a document that was cut by the edge between two splits
            writers[item.split].append(row, num_bytes(item.text), item.last, item.prompt)
            round_trip.add(tokenizer, item.text, row)
        return batch[-1][0]


# -- parts ------------------------------------------------------------------------------------------------------------


def _made(tokenizer: str | Path) -> bool:
    """Whether the tokenizer comes from the source, not from a file."""
    return str(tokenizer) == AUTO or is_trained(tokenizer)


def _is_file(tokenizer: str | Path) -> bool:
    return not _made(tokenizer) and str(tokenizer) != "bytes"


def _plain(value: Any) -> Any:
    """Value as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(value))


def _dtype(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
