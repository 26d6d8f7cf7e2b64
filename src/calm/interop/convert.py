"""A published checkpoint as one of our exported folders, which `calm.load` and every command read."""

from pathlib import Path
from typing import Any

from calm.errors import UsageError
from calm.interop import official
from calm.runs.folders import ModelCard, export_autoencoder, export_latent_lm
from calm.runs.weight_files import read_json
from calm.text.tokenizer import Tokenizer, load_tokenizer

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def import_official(
    folder: str | Path,
    out: str | Path,
    *,
    autoencoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> dict[str, Any]:
    """Reads a published model from `folder` and writes it to `out` in our layout, bit for bit. Both stages are understood.

    Args:
        autoencoder: the published folder of a language model's autoencoder. Without it, the frozen copy inside the language
            model's file is taken, else the folder that its config.json names as `ae_path`.
        tokenizer: a tokenizer.json or a tiktoken rank file, such as Llama 3's. Without it, the one in `folder`, if any. A
            model without a tokenizer can be loaded as arrays, but not with `calm.load`.
    Returns:
        kind, parameters, vocab_size, chunk_size, latent_dim, tokenizer (its path or None), training (settings under our
        names), out.
    Raises:
        UsageError: a folder that is not a published model, damaged files, code in a .bin, or a tokenizer with more ids than
            the model has.
    """
    folder, out = Path(folder), Path(out)
    _require_model(folder)
    source = _tokenizer_file(folder, tokenizer)
    words = load_tokenizer(source) if source is not None else None
    save = words.save if words is not None else None
    settings = official.training_settings(folder)
    if official.holds_language_model(folder):
        lm = official.load_latent_lm(folder)
        stage_1 = official.load_autoencoder(_autoencoder_folder(folder, autoencoder))
        _check_tokenizer(words, source, lm.config.vocab_size)
        card = ModelCard(summary=f"Imported from the published PyTorch checkpoint `{folder.resolve().name}`.")
        length = official.block_tokens(folder)
        export_latent_lm(lm, stage_1, out, card=card, block_tokens=length, training=settings, tokenizer=save)
        kind, config = "latent_lm", lm.config
    elif autoencoder is not None:
        raise UsageError(f"{folder}: holds an autoencoder itself; --autoencoder is for a language model")
    else:
        stage_1 = official.load_autoencoder(folder)
        _check_tokenizer(words, source, stage_1.config.vocab_size)
        export_autoencoder(stage_1, out, training=settings, tokenizer=save)
        kind, config = "autoencoder", stage_1.config
    return {
        "kind": kind,
        "parameters": config.parameters(),
        "vocab_size": config.vocab_size,
        "chunk_size": config.chunk_size,
        "latent_dim": config.latent_dim,
        "tokenizer": None if source is None else str(source),
        "training": settings,
        "out": str(out),
    }


def _require_model(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; name one that holds config.json and the weights of a published model")
    if not (folder / "config.json").is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f"; it holds the folders {', '.join(inside)}: name one of them" if inside else ""
        raise UsageError(f"{folder}: holds no config.json{hint}")


def _autoencoder_folder(folder: Path, autoencoder: str | Path | None) -> Path:
    if autoencoder is not None:
        return Path(autoencoder)
    if official.holds_autoencoder(folder):
        return folder
    named = read_json(folder / "config.json").get("ae_path")
    if isinstance(named, str) and (folder / named / "config.json").is_file():
        return folder / named
    raise UsageError(f"{folder}: holds no autoencoder, and ae_path in its config.json is {named!r}; name it with --autoencoder")


def _tokenizer_file(folder: Path, tokenizer: str | Path | None) -> Path | None:
    if tokenizer is not None:
        return Path(tokenizer)
    return next((folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()), None)


def _check_tokenizer(tokenizer: Tokenizer | None, source: Path | None, vocab_size: int) -> None:
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise UsageError(
            f"{source}: has {tokenizer.vocab_size} ids, the model {vocab_size}: not the tokenizer it was trained with"
        )
