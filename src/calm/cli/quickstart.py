"""`calm quickstart`: from plain text to a measured, generating model in minutes."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Trains tokenizer, autoencoder and next-vector language model on text, measures them and writes three continuations.

    Without --source the text is the English documentation inside this Python, so nothing is downloaded.
    """

    out: str = "runs/quickstart"
    """The folder for data, runs, pictures and report; an interrupted quickstart goes on where it stopped."""
    source: str = "pydoc"
    """pydoc, a file or folder (.txt, .jsonl, .parquet), or hf:NAME with the data extra."""
    separator: str | None = None
    """Separator between the documents of a .txt file."""
    preset: str = "quickstart"
    """One of calm.runs.presets; the default takes five minutes on two cores."""
    split: str = "valid"
    """The split that is scored."""
    max_tokens: int = 128 * 1024
    """The most tokens that are scored."""
    seed: int = 0

    def run(self) -> dict[str, Any]:
        from calm.runs import quickstart as pipeline

        return pipeline.quickstart(
            self.out,
            preset=self.preset,
            source=self.source,
            separator=self.separator,
            seed=self.seed,
            split=self.split,
            max_tokens=self.max_tokens,
        )

    def show(self, result: dict[str, Any]) -> str:
        return result["summary"]
