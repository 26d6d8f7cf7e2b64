"""A model as a folder that other programs read: config.json, model.safetensors, tokenizer.json and a model card. Never pickle.

A language model's folder also holds `autoencoder/`, the folder of its frozen autoencoder, so it is self-contained. Weights go
out and come back bit for bit, in float32, under the dotted names of `calm.interop.weights`. Every file is written beside its
place first and renamed when all are complete, so an interrupted export leaves what was there before.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from flax import nnx

from calm import config as configuration
from calm.autoencoder import Autoencoder, AutoencoderConfig
from calm.errors import CalmError, UsageError
from calm.interop.published_files import read_json, read_safetensors
from calm.interop.weights import build_with_weights, flat_weights
from calm.models import LatentLM, LatentLMConfig
from calm.nn import Precision

AUTOENCODER, LATENT_LM = "calm-autoencoder", "calm-latent-lm"  # model_type in config.json
AUTOENCODER_FOLDER = "autoencoder"
WEIGHTS, CONFIG, TOKENIZER, CARD = "model.safetensors", "config.json", "tokenizer.json", "README.md"
Config = TypeVar("Config", AutoencoderConfig, LatentLMConfig)
Writer = Callable[[Path], object]  # writes one file at the path that it is given


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What the README.md of an exported model says beyond its sizes. What is not given is not claimed."""

    name: str = "A continuous autoregressive language model"
    summary: str = ""
    license: str = ""
    """identifier such as `mit`"""
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    """identifiers of the training data"""
    results: tuple[tuple[str, str, str], ...] = ()
    """rows of (metric, value with interval, protocol); a number without its protocol has no place here"""
    command: str = ""
    """the command that reproduces the model"""


def export_autoencoder(autoencoder: Autoencoder, folder: str | Path) -> None:
    """Writes config.json and model.safetensors into `folder`, which is made if it is missing."""
    config = autoencoder.config
    _write(Path(folder), {CONFIG: _json(_description(AUTOENCODER, config, config)), WEIGHTS: _weights(autoencoder)})


def export_latent_lm(
    lm: LatentLM,
    autoencoder: Autoencoder,
    folder: str | Path,
    tokenizer_path: str | Path | None = None,
    card: ModelCard | None = None,
    *,
    block_tokens: int | None = None,
) -> None:
    """Writes the language model, its autoencoder in `folder/autoencoder`, the tokenizer's file and the model card.

    `block_tokens` is the length of a training sequence, if known. `folder` is made if it is missing. An earlier export in it
    is replaced; a config.json of another program is not.
    """
    folder, config = Path(folder), lm.config
    for name in ("vocab_size", "chunk_size", "latent_dim"):
        ours, theirs = getattr(config, name), getattr(autoencoder.config, name)
        if ours != theirs:
            raise UsageError(f"export: {name} is {ours} in the language model and {theirs} in the autoencoder")
    if tokenizer_path is not None and not Path(tokenizer_path).is_file():
        raise UsageError(f"{tokenizer_path}: no such tokenizer file")
    description = _description(LATENT_LM, config, autoencoder.config) | {"autoencoder": AUTOENCODER_FOLDER}
    if block_tokens is not None:
        description["block_tokens"] = block_tokens
    files: dict[str, Writer] = {CONFIG: _json(description), WEIGHTS: _weights(lm)}
    files[CARD] = _text(_card(card or ModelCard(), lm, autoencoder))
    if tokenizer_path is not None:
        data = Path(tokenizer_path).read_bytes()
        files[TOKENIZER] = lambda path: path.write_bytes(data)
    _refuse_foreign(folder)
    export_autoencoder(autoencoder, folder / AUTOENCODER_FOLDER)
    _write(folder, files)


def load_exported_autoencoder(folder: str | Path, precision: Precision = "float32") -> Autoencoder:
    """The autoencoder that `export_autoencoder` wrote, or the one inside an exported language model's folder."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or read_json(folder / CONFIG).get("model_type") == LATENT_LM:
        inside = folder / AUTOENCODER_FOLDER
        folder = inside if inside.is_dir() else folder
    return _load(folder, AUTOENCODER, AutoencoderConfig, precision)


def load_exported_latent_lm(folder: str | Path, precision: Precision = "float32") -> LatentLM:
    """The language model that `export_latent_lm` wrote."""
    return _load(Path(folder), LATENT_LM, LatentLMConfig, precision)


def _load(folder: Path, model_type: str, config_type: type[Config], precision: Precision) -> Any:
    path = folder / CONFIG
    description = read_json(path)
    if description.get("model_type") != model_type:
        raise UsageError(f"{path}: model_type should be {model_type!r}, got {description.get('model_type')!r}")
    config = configuration.from_dict(config_type, description.get("config", {}), where=str(path))
    weights = read_safetensors(folder / WEIGHTS)
    return build_with_weights(config, weights, precision=precision, where=str(folder / WEIGHTS))


# -- what the files say -----------------------------------------------------------------------------------------------


def _description(model_type: str, config: AutoencoderConfig | LatentLMConfig, sizes: AutoencoderConfig) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "library_name": "calm-lm",
        "library_version": _version(),
        "torch_dtype": "float32",  # the key that model hubs read
        "vocab_size": sizes.vocab_size,
        "chunk_size": sizes.chunk_size,
        "latent_dim": sizes.latent_dim,
        "config": configuration.to_dict(config),
    }


def _version() -> str:
    try:
        return importlib.metadata.version("calm-lm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


_CARD = """---
{header}
---
# {name}

{summary}A continuous autoregressive language model ([CALM](https://arxiv.org/abs/2510.27688)): it predicts the next latent
vector, which a frozen autoencoder decodes to {chunk_size} tokens at once.

| | |
|---|---|
| parameters | {lm_parameters:,} (language model), {autoencoder_parameters:,} (autoencoder) |
| chunk size K, latent width Z, vocabulary V | {chunk_size}, {latent_dim}, {vocab_size} |
| width, layers, heads | {dim}, {num_layers}, {num_heads} |

## Use

```python
from calm.interop.export import load_exported_autoencoder, load_exported_latent_lm

lm = load_exported_latent_lm(folder)
autoencoder = load_exported_autoencoder(folder)
```
{results}{command}"""


def _card(card: ModelCard, lm: LatentLM, autoencoder: Autoencoder) -> str:
    header: dict[str, Any] = {"library_name": "calm-lm", "pipeline_tag": "text-generation", "tags": ["calm", "jax", "flax"]}
    header |= {"license": card.license} if card.license else {}
    header |= {"language": list(card.languages)} if card.languages else {}
    header |= {"datasets": list(card.datasets)} if card.datasets else {}
    rows = "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in card.results)
    return _CARD.format(
        header="\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items()),  # JSON is YAML
        name=card.name,
        summary=f"{card.summary}\n\n" if card.summary else "",
        lm_parameters=lm.config.parameters(),
        autoencoder_parameters=autoencoder.config.parameters(),
        chunk_size=lm.config.chunk_size,
        latent_dim=lm.config.latent_dim,
        vocab_size=lm.config.vocab_size,
        dim=lm.config.backbone.dim,
        num_layers=lm.config.backbone.num_layers,
        num_heads=lm.config.backbone.num_heads,
        results=f"\n## Results\n\n| metric | value | protocol |\n|---|---|---|\n{rows}" if rows else "",
        command=f"\n## Training\n\n```\n{card.command}\n```\n" if card.command else "",
    )


# -- writing ----------------------------------------------------------------------------------------------------------


def _weights(model: nnx.Module) -> Writer:
    from safetensors.numpy import save_file

    return lambda path: save_file(flat_weights(model), path, metadata={"format": "flax", "library": "calm-lm"})


def _json(values: dict[str, Any]) -> Writer:
    return _text(json.dumps(values, indent=2) + "\n")


def _text(text: str) -> Writer:
    return lambda path: path.write_text(text, encoding="utf-8")


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file; expected a folder to export to")
    if (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("model_type") not in (AUTOENCODER, LATENT_LM):
        raise UsageError(f"{folder / CONFIG}: belongs to another model; export to another folder")


def _write(folder: Path, files: dict[str, Writer]) -> None:
    """Writes every file under a temporary name, then renames them all, config.json last."""
    from safetensors import SafetensorError

    _refuse_foreign(folder)
    staged: dict[Path, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in sorted(files, key=lambda name: name == CONFIG):
            temporary = folder / f".{name}.{os.getpid()}.tmp"
            staged[temporary] = folder / name
            files[name](temporary)
            temporary.chmod(0o644)  # safetensors writes files that only their owner can read
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        for temporary, place in staged.items():
            temporary.replace(place)
    except (OSError, SafetensorError) as error:
        raise CalmError(f"{folder}: cannot write the export ({error})") from error
    finally:
        for temporary in staged:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
