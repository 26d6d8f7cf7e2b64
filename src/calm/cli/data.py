"""`calm data prepare` and `calm data inspect`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from calm.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataPrepare:
    """Turn text into a tokenizer and memory-mapped token shards. Run it again after an interruption and it goes on."""

    source: str = "pydoc"
    """pydoc (the documentation inside Python), a file or folder of .txt, .jsonl (also compressed) or .parquet,
    hf:NAME[:SUBSET], or a language of known distribution: world:markov, world:grammar, world:key-value, with settings as in
    world:markov:words=128,tokens=5M"""
    out: Path
    """the folder to fill"""
    tokenizer: str = "auto"
    """bytes; bpe:SIZE or words[:SIZE], trained on the train split (words as WikiText counts them; of a world, its own);
    a tokenizer.json; a tiktoken rank file; auto = words for a world, else bpe:8192"""
    field: str = "text"
    """where .jsonl, .parquet and hub records hold their text"""
    separator: str | None = None
    """what stands between the documents of a .txt, such as '<|endoftext|>'; \\n and \\t are understood"""
    prompt_field: str | None = None
    """where .jsonl records hold a prompt, to which --field is the response; training then predicts responses alone"""
    valid: float = 0.05
    """share held out for validation when no file name says the split"""
    test: float = 0.05
    """share held out for the final test, likewise"""
    shard_tokens: int = 100_000_000
    """tokens in one shard file"""
    license: str = ""
    """the licence of the text, stamped into the manifest"""
    overwrite: bool = False
    """replace what the folder holds"""

    def run(self) -> dict[str, Any]:
        from calm.text.prepare import prepare
        from calm.text.summary import summarize

        separator = self.separator
        if separator is not None:
            separator = separator.replace("\\n", "\n").replace("\\t", "\t")
            if not separator:
                raise UsageError("separator: need at least one character, or leave it out")
        prepare(
            self.source,
            self.out,
            self.tokenizer,
            field=self.field,
            separator=separator,
            prompt_field=self.prompt_field,
            valid=self.valid,
            test=self.test,
            shard_tokens=self.shard_tokens,
            license=self.license,
            overwrite=self.overwrite,
        )
        return summarize(self.out, examples=0)

    def show(self, result: dict[str, Any]) -> str:
        from calm.text.summary import show_summary

        return show_summary(result)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataInspect:
    """Show counts, bytes per token and decoded examples of prepared data."""

    folder: Annotated[Path, tyro.conf.Positional]
    """the folder that `calm data prepare` filled"""
    examples: int = 2
    """documents shown for each split"""
    length: int = 200
    """tokens shown of each"""
    verify: bool = False
    """read everything and compare it with the checksums; data of at most 64 MB always is"""

    def run(self) -> dict[str, Any]:
        from calm.text.summary import summarize

        return summarize(self.folder, examples=self.examples, length=self.length, verify=self.verify or None)

    def show(self, result: dict[str, Any]) -> str:
        from calm.text.summary import show_summary

        return show_summary(result)
