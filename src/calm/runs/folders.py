"""A model as a folder that other programs read: config.json, model.safetensors, tokenizer.json and a model card. Never pickle.

A language model's folder also holds `autoencoder/`, the folder of its frozen autoencoder, so it is self-contained. Weights go
out and come back bit for bit, in float32, under the dotted names of `calm.runs.weights`; equal weights give equal bytes.
More than `LARGEST_SHARD` bytes of weights go to numbered files and an index of them, named as in the Hugging Face hub. All
files of an export, the autoencoder's with them, take their places together, so an interrupted export leaves what was there
before (`calm.runs.whole_folder`).
"""

import dataclasses
import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flax import nnx

from calm import config as configuration
from calm.core.autoencoder import Autoencoder, AutoencoderConfig
from calm.core.dense import Precision
from calm.core.latent_lm import LatentLM, LatentLMConfig
from calm.core.transformer import TransformerConfig
from calm.errors import CalmError, UsageError
from calm.runs import schema
from calm.runs.weight_files import read_json, read_safetensors, read_weights
from calm.runs.weights import build_with_weights, flat_weights
from calm.runs.whole_folder import Writer, replace_files
from calm.token.model import TokenLM, TokenLMConfig

AUTOENCODER, LATENT_LM, TOKEN_LM = "calm-autoencoder", "calm-latent-lm", "calm-token-lm"  # model_type in config.json
MODEL_TYPES = (AUTOENCODER, LATENT_LM, TOKEN_LM)
AUTOENCODER_FOLDER = "autoencoder"
WEIGHTS, CONFIG, TOKENIZER, CARD = "model.safetensors", "config.json", "tokenizer.json", "README.md"
INDEX = f"{WEIGHTS}.index.json"  # of the shards, where the weights are in several files
LARGEST_SHARD = 4_000_000_000  # bytes of weights in a file
Config = TypeVar("Config", AutoencoderConfig, LatentLMConfig, TokenLMConfig)
_UPGRADES = {AUTOENCODER: schema.autoencoder_model, LATENT_LM: schema.language_model, TOKEN_LM: schema.language_model}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Contents of the README.md of an exported model beyond its sizes. What is not given is not claimed."""

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


def export_autoencoder(
    autoencoder: Autoencoder,
    folder: str | Path,
    *,
    tokenizer: Writer | None = None,
    training: Mapping[str, int | float] | None = None,
    max_shard_bytes: int = LARGEST_SHARD,
) -> None:
    """Writes config.json, model.safetensors and tokenizer.json, if given, into `folder`, which is made if it is missing.

    Args:
        tokenizer: writes the tokenizer's file, such as `Tokenizer.save`.
        training: settings of its training, under the names of our loss configuration, for config.json.
        max_shard_bytes: size in bytes above which the weights go to several files.
    """
    files = _autoencoder_files(autoencoder, training, max_shard_bytes)
    _write(Path(folder), files | ({TOKENIZER: tokenizer} if tokenizer is not None else {}))


def _autoencoder_files(
    autoencoder: Autoencoder, training: Mapping[str, int | float] | None, max_shard_bytes: int
) -> dict[str, Writer]:
    config = autoencoder.config
    description = _description(AUTOENCODER, config, config) | ({"training": dict(training)} if training else {})
    return {CONFIG: _json(description), **_weights(autoencoder, max_shard_bytes)}


def export_latent_lm(
    lm: LatentLM,
    autoencoder: Autoencoder,
    folder: str | Path,
    tokenizer_path: str | Path | None = None,
    card: ModelCard | None = None,
    *,
    tokenizer: Writer | None = None,
    block_tokens: int | None = None,
    training: Mapping[str, int | float] | None = None,
    max_shard_bytes: int = LARGEST_SHARD,
) -> None:
    """Writes the language model, its autoencoder in `folder/autoencoder`, the tokenizer's file and the model card.

    `block_tokens` is the length of a training sequence, if known; `tokenizer` (in place of `tokenizer_path`), `training` and
    `max_shard_bytes` as in `export_autoencoder`. `folder` is made if it is missing. An earlier export in it is replaced; a
    config.json of another program is not.
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
    if training:
        description["training"] = dict(training)
    files: dict[str, Writer] = {CONFIG: _json(description), **_weights(lm, max_shard_bytes)}
    files[CARD] = _text(_card(card or ModelCard(), lm, autoencoder))
    if tokenizer_path is not None:
        data = Path(tokenizer_path).read_bytes()
        files[TOKENIZER] = lambda path: path.write_bytes(data)
    elif tokenizer is not None:
        files[TOKENIZER] = tokenizer
    inside = _autoencoder_files(autoencoder, None, max_shard_bytes)
    _write(folder, files | {f"{AUTOENCODER_FOLDER}/{name}": write for name, write in inside.items()})


def export_token_lm(
    lm: TokenLM,
    folder: str | Path,
    card: ModelCard | None = None,
    *,
    tokenizer: Writer | None = None,
    block_tokens: int | None = None,
    max_shard_bytes: int = LARGEST_SHARD,
) -> None:
    """Writes config.json, model.safetensors, tokenizer.json, if given, and the model card of a token model.

    The arguments are those of `export_latent_lm`.
    """
    description = _description(TOKEN_LM, lm.config, lm.config)
    if block_tokens is not None:
        description["block_tokens"] = block_tokens
    folder = Path(folder)
    text = _token_card(card or ModelCard(name="A token language model, the baseline of a continuous one"), lm)
    files: dict[str, Writer] = {CONFIG: _json(description), **_weights(lm, max_shard_bytes), CARD: _text(text)}
    _write(folder, files | ({TOKENIZER: tokenizer} if tokenizer is not None else {}))


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


def load_exported_token_lm(folder: str | Path, precision: Precision = "float32") -> TokenLM:
    """The token model that `export_token_lm` wrote."""
    return _load(Path(folder), TOKEN_LM, TokenLMConfig, precision)


def _load(folder: Path, model_type: str, config_type: type[Config], precision: Precision) -> Any:
    path = folder / CONFIG
    description = read_json(path)
    if description.get("model_type") != model_type:
        raise UsageError(f"{path}: model_type should be {model_type!r}, got {description.get('model_type')!r}")
    table, version = description.get("config", {}), description.get("schema_version", 1)
    table = _UPGRADES[model_type](table) if version == 1 else table
    config = configuration.from_dict(config_type, {"schema_version": configuration.SCHEMA_VERSION, **table}, where=str(path))
    sharded = (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file()
    weights = read_weights(folder) if sharded else read_safetensors(folder / WEIGHTS)
    return build_with_weights(config, weights, precision=precision, where=str(folder / (INDEX if sharded else WEIGHTS)))


# -- what the files say -----------------------------------------------------------------------------------------------


def _description(
    model_type: str,
    config: AutoencoderConfig | LatentLMConfig | TokenLMConfig,
    sizes: AutoencoderConfig | TokenLMConfig,
) -> dict[str, Any]:
    latent = {} if isinstance(sizes, TokenLMConfig) else {"latent_dim": sizes.latent_dim}
    return {
        "model_type": model_type,
        "library_name": "calm-lm",
        "library_version": _version(),
        "torch_dtype": "float32",  # the key that model hubs read
        "vocab_size": sizes.vocab_size,
        "chunk_size": sizes.chunk_size,
        **latent,
        "schema_version": configuration.SCHEMA_VERSION,
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
import calm

model = calm.load(folder)
print(model.generate("The history of", max_tokens=64)["texts"][0])
```
{results}{command}"""


_TOKEN_CARD = """---
{header}
---
# {name}

{summary}A decoder-only transformer over tokens, with the backbone of a continuous autoregressive language model
([CALM](https://arxiv.org/abs/2510.27688)): what that one is measured against.

| | |
|---|---|
| parameters | {parameters:,} |
| vocabulary V | {vocab_size} |
| width, layers, heads | {dim}, {num_layers}, {num_heads} |

## Use

```python
import calm

model = calm.load(folder)
print(model.generate("The history of", max_tokens=64)["texts"][0])
```
{results}{command}"""


def _card(card: ModelCard, lm: LatentLM, autoencoder: Autoencoder) -> str:
    return _CARD.format(
        **_common(card, lm.config.backbone),
        lm_parameters=lm.config.parameters(),
        autoencoder_parameters=autoencoder.config.parameters(),
        chunk_size=lm.config.chunk_size,
        latent_dim=lm.config.latent_dim,
        vocab_size=lm.config.vocab_size,
    )


def _token_card(card: ModelCard, lm: TokenLM) -> str:
    sizes = dict(parameters=lm.config.parameters(), vocab_size=lm.config.vocab_size)
    return _TOKEN_CARD.format(**_common(card, lm.config.backbone), **sizes)


def _common(card: ModelCard, backbone: TransformerConfig) -> dict[str, Any]:
    """The part that both cards share."""
    header: dict[str, Any] = {"library_name": "calm-lm", "pipeline_tag": "text-generation", "tags": ["calm", "jax", "flax"]}
    header |= {"license": card.license} if card.license else {}
    header |= {"language": list(card.languages)} if card.languages else {}
    header |= {"datasets": list(card.datasets)} if card.datasets else {}
    rows = "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in card.results)
    return dict(
        header="\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items()),  # JSON is YAML
        name=card.name,
        summary=f"{card.summary}\n\n" if card.summary else "",
        dim=backbone.dim,
        num_layers=backbone.num_layers,
        num_heads=backbone.num_heads,
        results=f"\n## Results\n\n| metric | value | protocol |\n|---|---|---|\n{rows}" if rows else "",
        command=f"\n## Training\n\n```\n{card.command}\n```\n" if card.command else "",
    )


# -- writing ----------------------------------------------------------------------------------------------------------


def _weights(model: nnx.Module, max_shard_bytes: int) -> dict[str, Writer]:
    """Files of the weights: one, or shards of at most `max_shard_bytes` (but at least one array) and their index."""
    if max_shard_bytes < 1:
        raise UsageError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    weights, shards, size = flat_weights(model), [{}], 0
    for name in sorted(weights):
        if shards[-1] and size + weights[name].nbytes > max_shard_bytes:
            shards, size = [*shards, {}], 0
        shards[-1][name], size = weights[name], size + weights[name].nbytes
    if len(shards) == 1:
        return {WEIGHTS: _safetensors(weights)}
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in weights.values())},
        "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
    }
    return {file: _safetensors(shard) for file, shard in zip(names, shards, strict=True)} | {INDEX: _json(index)}


def _safetensors(arrays: Mapping[str, np.ndarray]) -> Writer:
    from safetensors.numpy import save_file

    # One entry of metadata: the order of several in the file is random.
    return lambda path: save_file(dict(arrays), path, metadata={"format": "flax"})


def _json(values: dict[str, Any]) -> Writer:
    return _text(json.dumps(values, indent=2) + "\n")


def _text(text: str) -> Writer:
    return lambda path: path.write_text(text, encoding="utf-8")


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file; expected a folder to export to")
    if (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("model_type") not in MODEL_TYPES:
        raise UsageError(f"{folder / CONFIG}: belongs to another model; export to another folder")


def _is_ours(path: str) -> bool:
    """Whether a path inside an export is one that exports write."""
    name = path.removeprefix(f"{AUTOENCODER_FOLDER}/")
    named = name in (WEIGHTS, CONFIG, TOKENIZER, CARD, INDEX, AUTOENCODER_FOLDER)
    return named or re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name) is not None


def _write(folder: Path, files: dict[str, Writer]) -> None:
    """Makes `files` the export in `folder`, all at once."""
    from safetensors import SafetensorError

    _refuse_foreign(folder)
    try:
        replace_files(folder, files, marker=CONFIG, owned=_is_ours)
    except (OSError, SafetensorError) as error:
        raise CalmError(f"{folder}: cannot write the export ({error})") from error
