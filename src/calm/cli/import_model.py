"""`calm import official DIR`: a published checkpoint as a folder that every command reads."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from calm.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportOfficial:
    """Reads a published PyTorch checkpoint of CALM, without torch, and writes safetensors, config.json and tokenizer.json.

    Autoencoders and language models with an energy, flow or diffusion head are understood, from model.safetensors or
    pytorch_model.bin. A .bin with code in it is refused, never run.
    """

    folder: Annotated[str, tyro.conf.Positional]
    """The published folder: config.json beside the weights."""
    out: str
    """Where to write; a new folder, or an earlier export."""
    autoencoder: str | None = None
    """The published folder of the autoencoder; without it, the copy in the language model's file, or its ae_path."""
    tokenizer: str | None = None
    """The tokenizer's file (a tokenizer.json or a tiktoken rank file); without it, the one in the folder."""

    def run(self) -> dict[str, Any]:
        from calm.interop.convert import import_official

        if (Path(self.out) / "config.toml").exists():
            raise UsageError(f"{self.out}: holds a run; import into another folder")
        return import_official(self.folder, self.out, autoencoder=self.autoencoder, tokenizer=self.tokenizer)
