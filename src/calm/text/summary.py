"""Summary of prepared data, in numbers and examples."""

from pathlib import Path
from typing import Any

import numpy as np

from calm.text.shards import Split, open_data
from calm.text.tokenizer import Tokenizer

_READ = 1 << 22


def summarize(folder: str | Path, *, examples: int = 2, length: int = 200, verify: bool | None = None) -> dict[str, Any]:
    """Summarizes prepared data: counts for each split, remarks, and the decoded starts of a few documents spread over it.

    Bytes per token counts text bytes over the tokens that are text (without the end ids). Of a tokenizer with an id for unknown
    words, `unknown` is its share of a split's tokens.

    Args:
      examples: documents shown for each split.
      length: tokens shown of each.
      verify: as in `open_data`.

    Raises UsageError: the folder is no prepared data, or is damaged.
    """
    data = open_data(folder, verify)
    splits: dict[str, dict[str, Any]] = {}
    for name, entry in data.manifest.splits.items():
        split = data.split(name)
        splits[name] = {
            "documents": entry["documents"],
            "tokens": entry["tokens"],
            "bytes": entry["bytes"],
            "bytes_per_token": entry["bytes"] / max(entry["tokens"] - entry["documents"], 1),
            "shards": len(entry["shards"]),
            "unknown": _unknown(split, data.tokenizer.unknown_id),
            "examples": _examples(split, data.tokenizer, examples, length),
        }
    manifest = data.manifest
    return {
        "folder": str(folder),
        "source": {key: value for key, value in manifest.source.items() if key not in ("files", "left_out")},
        "remarks": manifest.remarks(),
        "license": manifest.license,
        "tokenizer": manifest.tokenizer,
        "held_out": manifest.held_out,
        "splits": splits,
    }


def show_summary(summary: dict[str, Any]) -> str:
    """Formats a summary for a reader."""
    source, tokenizer, held_out = summary["source"], summary["tokenizer"], summary["held_out"]
    stamps = " ".join(str(source[key]) for key in ("python", "revision") if source.get(key))
    words = any(split["unknown"] is not None for split in summary["splits"].values())
    rows = [["split", "documents", "tokens", "bytes", "bytes/token", "shards", *(["unknown words"] if words else [])]]
    for name, split in summary["splits"].items():
        counts = [f"{split[key]:,}" for key in ("documents", "tokens", "bytes")]
        rows.append([name, *counts, f"{split['bytes_per_token']:.3f}", str(split["shards"])])
        rows[-1] += [f"{split['unknown']:.2%}"] if words else []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"data       {summary['folder']}",
        f"source     {source['name']} {stamps}".rstrip(),
        f"sha256     {source['sha256']}",
        f"license    {summary['license'] or 'not stated'}",
        f"tokenizer  {tokenizer['spec']}, {tokenizer['vocab_size']:,} ids, fingerprint {tokenizer['fingerprint']}",
        f"splits     by {held_out['rule']}: valid {held_out['valid']:g}, test {held_out['test']:g}"
        if held_out["rule"] != "named"
        else "splits     by file name",
        *(f"note       {remark}" for remark in summary["remarks"]),
        "",
        *(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ),
    ]
    for name, split in summary["splits"].items():
        for example in split["examples"]:
            lines += ["", f"--- {name}, document {example['document']}", example["text"]]
    return "\n".join(lines)


def _unknown(split: Split, unknown_id: int | None) -> float | None:
    """Share of tokens that are the unknown word, be it a word that the vocabulary lacks or `<unk>` in the text itself."""
    if unknown_id is None:
        return None
    starts = range(0, split.num_tokens, _READ)
    found = sum(np.count_nonzero(split.read(start, min(_READ, split.num_tokens - start)) == unknown_id) for start in starts)
    return found / split.num_tokens


def _examples(split: Split, tokenizer: Tokenizer, count: int, length: int) -> list[dict[str, Any]]:
    found = []
    documents = len(split.documents)
    for index in range(min(count, documents)):
        document = index * documents // min(count, documents)
        start = int(split.documents[document])
        end = int(split.documents[document + 1]) - 1 if document + 1 < documents else split.num_tokens - 1
        ids = split.read(start, min(length, end - start))
        found.append({"document": document, "text": tokenizer.decode(ids), "cut": end - start > length})
    return found
