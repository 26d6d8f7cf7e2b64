"""Beginning from a model that is trained already: a run's best checkpoint, or an exported or imported folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from calm import config as configuration
from calm.core.autoencoder import Autoencoder
from calm.core.dense import Precision
from calm.core.latent_lm import LatentLMConfig
from calm.errors import CalmError, UsageError
from calm.rng import stream
from calm.runs.folders import LATENT_LM, TOKEN_LM, load_exported_autoencoder, load_exported_latent_lm, load_exported_token_lm
from calm.runs.weight_files import read_json
from calm.text.shards import Data
from calm.text.tokenizer import Tokenizer, load_tokenizer, require_same_tokenizer
from calm.token.model import TokenLMConfig


class StartingPoint(NamedTuple):
    """A trained language model, as training takes it."""

    where: str
    config: Any
    """of the model: `LatentLMConfig` or `TokenLMConfig`"""
    params: Any
    """its weights, or a dictionary of them (`lm`) and of what its loss trained beside it"""
    autoencoder: Autoencoder | None
    tokenizer: Tokenizer | None

    def model(self, asked: Any) -> Any:
        """The configuration to train: this model's. What was asked for may be the default or must be the same.

        Raises:
            UsageError: another kind of model, or another shape; names the first key that differs.
        """
        if type(asked) is not type(self.config):
            raise UsageError(f"init-from {self.where}: holds a {_kind(self.config)}, and a {_kind(asked)} is to be trained")
        if asked == type(asked)():
            return self.config
        there, here = (_flat(configuration.to_dict(config)) for config in (self.config, asked))
        for key, value in here.items():
            if value != there.get(key) and (value or key not in ("vocab_size", "chunk_size", "latent_dim")):
                raise UsageError(
                    f"init-from {self.where}: another shape, model.{key} is {there.get(key)} there and {value} here; "
                    "leave the model's options out to take its own"
                )
        return self.config

    def require_tokenizer_of(self, data: Data) -> None:
        """Raises UsageError where the data's tokenizer is not the model's (without one: has another size)."""
        if self.tokenizer is not None:
            require_same_tokenizer(data.tokenizer.fingerprint, self.tokenizer.fingerprint, f"data {data.folder}", self.where)
        elif data.tokenizer.vocab_size != self.config.vocab_size:
            raise UsageError(
                f"init-from {self.where}: the model has {self.config.vocab_size} ids and the data's tokenizer "
                f"{data.tokenizer.vocab_size}: another tokenizer"
            )

    def initial(self, objective: Any, seed: int) -> Any:
        """All the parameters of `objective`: the model's own weights, and fresh ones for what it does not have."""
        fresh = objective.init(stream(jax.random.key(seed), "init"))
        own = self.params if isinstance(self.params, dict) else {"lm": self.params}
        if not isinstance(fresh, dict):
            return _like(fresh, own["lm"], self.where)
        return {name: _like(part, own[name], self.where) if name in own else part for name, part in fresh.items()}


def open_exported(folder: Path, precision: Precision) -> StartingPoint:
    """The language model of a folder written by `calm export` or `calm import official`.

    Raises:
        UsageError: no language model there, or files that are missing, cut short or do not fit each other.
    """
    path = folder / "tokenizer.json"
    tokenizer = load_tokenizer(path) if path.is_file() else None
    kind = read_json(folder / "config.json").get("model_type")
    if kind == TOKEN_LM:
        model = load_exported_token_lm(folder, precision)
        return StartingPoint(str(folder), model.config, nnx.state(model), None, tokenizer)
    if kind != LATENT_LM:
        raise UsageError(f"init-from {folder}: holds no language model (model_type {kind!r})")
    model, autoencoder = load_exported_latent_lm(folder, precision), load_exported_autoencoder(folder, precision)
    return StartingPoint(str(folder), model.config, {"lm": nnx.state(model)}, autoencoder, tokenizer)


@contextlib.contextmanager
def readable(folder: str | Path) -> Iterator[None]:
    """A checkpoint that its reader cannot make sense of is one line, whatever the reader says."""
    try:
        yield
    except (CalmError, MemoryError):
        raise
    except Exception as error:
        words = " ".join(str(error).split())[:120]
        raise UsageError(
            f"init-from {folder}: its checkpoint is damaged or cut short ({type(error).__name__}: {words})"
        ) from error


def _like(fresh: Any, loaded: Any, where: str) -> Any:
    """The loaded weights in the tree of fresh ones, whose shapes they must have."""
    leaves, structure = jax.tree.flatten(fresh)
    found = jax.tree.leaves(loaded)
    if [leaf.shape for leaf in leaves] != [leaf.shape for leaf in found]:
        raise UsageError(f"init-from {where}: its weights have other shapes than the model to train")
    return jax.tree.unflatten(structure, found)


def _kind(config: LatentLMConfig | TokenLMConfig) -> str:
    return "token model" if isinstance(config, TokenLMConfig) else "latent language model"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
