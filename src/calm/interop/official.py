"""The published PyTorch checkpoints of CALM (github.com/shaochenze/calm) as our models.

A folder holds config.json and either model.safetensors or pytorch_model.bin (or the shards that their index files list). The
stages then agree with the published code to 1e-5 in float32, and greedy tokens exactly: tests/interop/test_official.py.

    published                                  ours
    patch_size                                 chunk_size K
    latent_size                                latent_dim Z
    num_mlp_layers, noise_size                 head.num_blocks, head.noise_dim
    beta, num_samples, kl_clamp, ...           not part of a model: `training_settings`
    Linear.weight [out, in]                    kernel [in, out]
    q_proj, k_proj, v_proj                     qkv, columns in this order
    gate_proj, up_proj                         gate_up, gate first
    layers.0, layers.1, ...                    one array with a leading layer axis
    mlp_blocks.N.linears.0 on [LN(e); h]       from_sample and from_hidden, and the bias with the latter
    mlp_generator.*                            a second name of generative_head.*
    ae_model.*                                 the frozen autoencoder inside a language model's file
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from calm.autoencoder import Autoencoder, AutoencoderConfig
from calm.errors import UsageError
from calm.heads import EnergyHeadConfig
from calm.interop.restricted_pickle import load_torch
from calm.interop.weights import build_with_weights
from calm.models import LatentLM, LatentLMConfig
from calm.nn import BackboneConfig

_FIXED = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "mlp_bias": False, "attention_bias": False, "rope_scaling": None}
_TRAINING = {"beta": "alpha", "num_samples": "num_samples", "kl_weight": "kl_weight", "kl_clamp": "kl_clamp"}


def load_autoencoder(folder: str | Path) -> Autoencoder:
    """The autoencoder of a published folder, in float32: its own folder, or the frozen copy inside a language model's."""
    folder = Path(folder)
    config, weights = _Config(folder), _Weights(folder)
    if any(name.startswith("ae_model.") for name in weights.arrays):
        weights = weights.below("ae_model.")
    table = weights.shape("encoder.embed_tokens.weight")
    ours = AutoencoderConfig(
        vocab_size=table[0],
        chunk_size=config.integer("patch_size"),
        latent_dim=config.integer("latent_size"),
        dim=table[1],
        inner_dim=weights.shape("encoder.encoder_layers.0.mlp.gate_proj.weight")[0],
        encoder_layers=weights.count("encoder.encoder_layers"),
        decoder_layers=weights.count("decoder.decoder_layers"),
        embedding_std=config.number("initializer_range"),
        init_std=config.number("initializer_range"),
    )
    arrays = _autoencoder(weights, ours)
    weights.finish()
    return build_with_weights(ours, arrays, where=str(folder))


def load_latent_lm(folder: str | Path) -> LatentLM:
    """The next-vector language model of a published folder, in float32. The autoencoder inside the file is left alone."""
    folder = Path(folder)
    config, weights = _Config(folder), _Weights(folder)
    std, blocks = config.number("initializer_range"), config.integer("num_mlp_layers")
    ours = LatentLMConfig(
        vocab_size=config.integer("vocab_size"),
        chunk_size=config.integer("patch_size"),
        latent_dim=config.integer("latent_size"),
        backbone=BackboneConfig(
            dim=config.integer("hidden_size"),
            num_layers=config.integer("num_hidden_layers"),
            num_heads=config.integer("num_attention_heads"),
            num_kv_heads=config.integer("num_key_value_heads", config.integer("num_attention_heads")),
            inner_dim=config.integer("intermediate_size"),
            rope_theta=config.number("rope_theta"),
            init_std=std,
        ),
        head=EnergyHeadConfig(num_blocks=blocks, noise_dim=config.integer("noise_size"), init_std=std),
        init_std=std,
    )
    for name in [name for name in weights.arrays if name.startswith("ae_model.") or name.endswith(".rotary_emb.inv_freq")]:
        del weights.arrays[name]
    weights.merge_aliases("mlp_generator.", "generative_head.")
    arrays = _stem(weights, ours) | _backbone(weights, ours.backbone) | _head(weights, ours)
    weights.finish()
    return build_with_weights(ours, arrays, where=str(folder))


def training_settings(folder: str | Path) -> dict[str, int | float]:
    """What config.json says of training, under the names of our loss configurations.

    A language model has alpha and num_samples; an autoencoder kl_weight, kl_clamp, and one dropout rate that serves both
    token_dropout and latent_dropout.
    """
    values = _Config(Path(folder)).values
    settings = {ours: values[theirs] for theirs, ours in _TRAINING.items() if theirs in values}
    if "ae_dropout" in values:
        settings |= {"token_dropout": values["ae_dropout"], "latent_dropout": values["ae_dropout"]}
    return settings


# -- weights by name --------------------------------------------------------------------------------------------------


def _autoencoder(weights: "_Weights", config: AutoencoderConfig) -> dict[str, np.ndarray]:
    dim, inner = config.dim, config.inner_dim
    arrays = {"embedding": weights.take("encoder.embed_tokens.weight", config.vocab_size, dim)}
    if "decoder.lm_head_weight" in weights.arrays:
        head = weights.take("decoder.lm_head_weight", config.vocab_size, dim)
        if not np.array_equal(head, arrays["embedding"]):
            raise UsageError(
                f"{weights.where}: decoder.lm_head_weight must equal encoder.embed_tokens.weight (tied), it differs"
            )

    def layers(ours: str, theirs: str, start: int, count: int) -> None:
        def layer(index: int) -> dict[str, np.ndarray]:
            at = f"{theirs}.{start + index}"
            return {"norm.scale": weights.take(f"{at}.layernorm.weight", dim)} | _mlp(weights, f"{at}.mlp", dim, inner)

        arrays.update(_stacked(f"{ours}.layer", count, layer))

    def dense(ours: str, theirs: str, in_dim: int, out_dim: int) -> None:
        arrays.update(_dense(weights, ours, theirs, in_dim, out_dim))

    half = config.encoder_layers // 2
    layers("encoder.token_layers", "encoder.encoder_layers", 0, half)
    dense("encoder.squeeze", "encoder.squeeze_layer", config.chunk_size * dim, dim)
    layers("encoder.chunk_layers", "encoder.encoder_layers", half, half)
    arrays["encoder.norm.scale"] = weights.take("encoder.norm.weight", dim)
    dense("encoder.to_latent", "encoder.hidden_to_latent", dim, 2 * config.latent_dim)
    half = config.decoder_layers // 2
    dense("decoder.from_latent", "decoder.latent_to_hidden", config.latent_dim, dim)
    layers("decoder.chunk_layers", "decoder.decoder_layers", 0, half)
    dense("decoder.expand", "decoder.expand_layer", dim, config.chunk_size * dim)
    layers("decoder.token_layers", "decoder.decoder_layers", half, half)
    arrays["decoder.norm.scale"] = weights.take("decoder.norm.weight", dim)
    return arrays


def _stem(weights: "_Weights", config: LatentLMConfig) -> dict[str, np.ndarray]:
    dim = config.backbone.dim
    return {
        "stem.embedding": weights.take("transformer.embed_tokens.weight", config.vocab_size, dim),
        **_dense(weights, "stem.widen", "embed_proj.0", config.chunk_size * dim, 2 * dim),
        **_dense(weights, "stem.narrow", "embed_proj.2", 2 * dim, dim),
        **_norm(weights, "stem.norm", "embed_proj.3", dim),
    }


def _backbone(weights: "_Weights", config: BackboneConfig) -> dict[str, np.ndarray]:
    dim, kv_dim = config.dim, config.dim // config.num_heads * config.num_kv_heads

    def layer(index: int) -> dict[str, np.ndarray]:
        at = f"transformer.layers.{index}"
        widths = {"q_proj": dim, "k_proj": kv_dim, "v_proj": kv_dim}
        qkv = [weights.kernel(f"{at}.self_attn.{name}", dim, width) for name, width in widths.items()]
        return {
            "norm_attention.scale": weights.take(f"{at}.input_layernorm.weight", dim),
            "attention.qkv.kernel": np.concatenate(qkv, axis=1),
            "attention.out.kernel": weights.kernel(f"{at}.self_attn.o_proj", dim, dim),
            "norm_mlp.scale": weights.take(f"{at}.post_attention_layernorm.weight", dim),
            **_mlp(weights, f"{at}.mlp", dim, config.inner_dim),
        }

    blocks = _stacked("backbone.blocks.layer", config.num_layers, layer)
    return blocks | {"backbone.norm.scale": weights.take("transformer.norm.weight", dim)}


def _head(weights: "_Weights", config: LatentLMConfig) -> dict[str, np.ndarray]:
    dim = config.backbone.dim

    def block(index: int) -> dict[str, np.ndarray]:
        at = f"generative_head.mlp_blocks.{index}"
        first = weights.kernel(f"{at}.linears.0", 2 * dim, dim)
        return {
            **_norm(weights, "norm", f"{at}.in_ln", dim),
            "from_sample.kernel": first[:dim],
            "from_hidden.kernel": first[dim:],
            "from_hidden.bias": weights.take(f"{at}.linears.0.bias", dim),
            **_dense(weights, "inner", f"{at}.linears.2", dim, dim),
            **_dense(weights, "gate_up", f"{at}.linears.4", dim, 2 * dim),
            **_dense(weights, "down", f"{at}.down_proj", dim, dim),
        }

    final = "generative_head.final_layer"
    return {
        **_dense(weights, "head.embed_hidden", "generative_head.hidden_embd", dim, dim),
        **_norm(weights, "head.norm_hidden", "generative_head.norm_hidden", dim),
        **_dense(weights, "head.embed_noise", "generative_head.noise_embd", config.head.noise_dim, dim),
        **_norm(weights, "head.norm_noise", "generative_head.norm_noise", dim),
        **_stacked("head.blocks.layer", config.head.num_blocks, block),
        **_norm(weights, "head.norm_out", f"{final}.in_ln", dim),
        **_dense(weights, "head.inner_out", f"{final}.linears.0", dim, dim),
        **_dense(weights, "head.out", f"{final}.linears.2", dim, config.latent_dim),
    }


def _stacked(ours: str, count: int, layer: Callable[[int], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    layers = [layer(index) for index in range(count)]
    return {f"{ours}.{name}": np.stack([arrays[name] for arrays in layers]) for name in layers[0]}


def _mlp(weights: "_Weights", theirs: str, dim: int, inner_dim: int) -> dict[str, np.ndarray]:
    gate, up = (weights.kernel(f"{theirs}.{name}_proj", dim, inner_dim) for name in ("gate", "up"))
    down = weights.kernel(f"{theirs}.down_proj", inner_dim, dim)
    return {"mlp.gate_up.kernel": np.concatenate([gate, up], axis=1), "mlp.down.kernel": down}


def _dense(weights: "_Weights", ours: str, theirs: str, in_dim: int, out_dim: int) -> dict[str, np.ndarray]:
    return {f"{ours}.kernel": weights.kernel(theirs, in_dim, out_dim), f"{ours}.bias": weights.take(f"{theirs}.bias", out_dim)}


def _norm(weights: "_Weights", ours: str, theirs: str, dim: int) -> dict[str, np.ndarray]:
    return {f"{ours}.scale": weights.take(f"{theirs}.weight", dim), f"{ours}.bias": weights.take(f"{theirs}.bias", dim)}


# -- files ------------------------------------------------------------------------------------------------------------


class _Config:
    """config.json of a folder, read with types; settings that our models cannot express are refused."""

    def __init__(self, folder: Path):
        self.path = folder / "config.json"
        self.values = read_json(self.path)
        for key, value in _FIXED.items():
            if self.values.get(key, value) != value:
                raise UsageError(f"{self.path}: {key} is {self.values[key]!r}; only {value!r} is supported")

    def number(self, key: str) -> float:
        return float(self._value(key, None))

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if not isinstance(value, int) or value < 1:
            raise UsageError(f"{self.path}: {key} should be a whole number of at least 1, got {value!r}")
        return value

    def _value(self, key: str, default: int | None) -> int | float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(f"{self.path}: {key} should be a number, {'is missing' if value is None else f'got {value!r}'}")
        return value


class _Weights:
    """The arrays of a folder by published name. Each is taken once, with its shape; what is left over is an error."""

    def __init__(self, folder: Path, arrays: dict[str, np.ndarray] | None = None):
        self.folder, self.where = folder, str(folder)
        self.arrays = _read_weights(folder) if arrays is None else arrays

    def below(self, prefix: str) -> "_Weights":
        return _Weights(self.folder, {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)})

    def shape(self, name: str) -> tuple[int, int]:
        array = self.arrays.get(name)
        if array is None or array.ndim != 2:
            raise UsageError(f"{self.where}: weight {name!r} is {'missing' if array is None else 'not a matrix'}")
        return array.shape[0], array.shape[1]

    def count(self, prefix: str) -> int:
        """How many layers `prefix.0`, `prefix.1`, ... there are."""
        return len({name.removeprefix(f"{prefix}.").split(".")[0] for name in self.arrays if name.startswith(f"{prefix}.")})

    def take(self, name: str, *shape: int) -> np.ndarray:
        if name not in self.arrays:
            raise UsageError(f"{self.where}: weight {name!r} is missing")
        array = self.arrays.pop(name)
        if array.shape != shape:
            raise UsageError(f"{self.where}: weight {name!r} has shape {array.shape}, config.json needs {shape}")
        return array

    def kernel(self, name: str, in_dim: int, out_dim: int) -> np.ndarray:
        return self.take(f"{name}.weight", out_dim, in_dim).T

    def merge_aliases(self, alias: str, prefix: str) -> None:
        """`alias*` and `prefix*` are two names of the same weights; a file may hold either or both."""
        for name in [name for name in self.arrays if name.startswith(alias)]:
            array, twin = self.arrays.pop(name), prefix + name.removeprefix(alias)
            if not np.array_equal(self.arrays.setdefault(twin, array), array):
                raise UsageError(f"{self.where}: weights {name!r} and {twin!r} differ; they must be the same")

    def finish(self) -> None:
        if self.arrays:
            first = min(self.arrays)
            raise UsageError(f"{self.where}: {len(self.arrays)} weights that this model does not have, the first is {first!r}")


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; one that is missing or malformed is a `UsageError`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected a JSON object")
    return values


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors file; one that is missing or damaged is a `UsageError`."""
    import safetensors
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    except safetensors.SafetensorError as error:
        raise UsageError(f"{path}: damaged or cut short ({error})") from error


def _read_weights(folder: Path) -> dict[str, np.ndarray]:
    """model.safetensors, else pytorch_model.bin, each whole or in the shards of its index file."""
    readers: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
        "model.safetensors": read_safetensors,
        "pytorch_model.bin": load_torch,
    }
    for name, read in readers.items():
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return read(folder / name)
        if index.is_file():
            files = read_json(index).get("weight_map", {})
            shards = sorted(set(files.values())) if isinstance(files, dict) else []
            if not all(isinstance(shard, str) and Path(shard).name == shard for shard in shards):
                raise UsageError(f"{index}: weight_map should map names of weights to files of this folder")
            return {key: array for shard in shards for key, array in read(folder / shard).items()}
    raise UsageError(f"{folder}: no weights here; expected {' or '.join(readers)}")
