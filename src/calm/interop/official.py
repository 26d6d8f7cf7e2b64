"""The published PyTorch checkpoints of CALM (github.com/shaochenze/calm) as our models.

A folder holds config.json and either model.safetensors or pytorch_model.bin (or the shards that their index files list). The
stages of a model with the energy head then agree with the published code to 1e-5 in float32, and greedy tokens exactly:
tests/interop/test_official.py. Flow and diffusion heads follow the published layout, as read; numbers to compare with were not
published, so tests compare with the formulas written out a second time.

    published                                  ours
    patch_size                                 chunk_size K
    latent_size                                latent_dim Z
    num_mlp_layers, noise_size                 head.num_blocks, head.noise_dim
    num_samples                                head.num_draws, where the head has a loss of its own
    beta, num_samples, kl_clamp, ...           not part of a model: `training_settings`
    Linear.weight [out, in]                    kernel [in, out]
    q_proj, k_proj, v_proj                     qkv, columns in this order
    gate_proj, up_proj                         gate_up, gate first
    layers.0, layers.1, ...                    one array with a leading layer axis
    mlp_blocks.N.linears.0 on [LN(e); h]       from_sample and from_hidden, and the bias with the latter
    mlp_generator.*                            a second name of generative_head.*
    generative_head.net.*                      head.net: a flow head, or a diffusion head if its output has width 2Z
    ae_model.*                                 the frozen autoencoder inside a language model's file
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from calm.core.autoencoder import Autoencoder, AutoencoderConfig
from calm.core.energy_head import EnergyHeadConfig
from calm.core.head import HeadConfig
from calm.core.latent_lm import LatentLM, LatentLMConfig
from calm.core.transformer import TransformerConfig
from calm.errors import UsageError
from calm.heads.diffusion import DiffusionHeadConfig
from calm.heads.flow import FlowHeadConfig
from calm.heads.modulated_mlp import FREQUENCIES
from calm.interop.published_files import PublishedConfig, PublishedWeights, weight_names
from calm.runs.weights import build_with_weights

_TRAINING = {"beta": "alpha", "num_samples": "num_samples", "kl_weight": "kl_weight", "kl_clamp": "kl_clamp"}


def load_autoencoder(folder: str | Path) -> Autoencoder:
    """The autoencoder of a published folder, in float32: its own folder, or the frozen copy inside a language model's."""
    folder = Path(folder)
    config, weights = PublishedConfig(folder), PublishedWeights(folder)
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
    config, weights = PublishedConfig(folder), PublishedWeights(folder)
    std = config.number("initializer_range")
    weights.merge_aliases("mlp_generator.", "generative_head.")
    ours = LatentLMConfig(
        vocab_size=config.integer("vocab_size"),
        chunk_size=config.integer("patch_size"),
        latent_dim=config.integer("latent_size"),
        backbone=TransformerConfig(
            dim=config.integer("hidden_size"),
            num_layers=config.integer("num_hidden_layers"),
            num_heads=config.integer("num_attention_heads"),
            num_kv_heads=config.integer("num_key_value_heads", config.integer("num_attention_heads")),
            inner_dim=config.integer("intermediate_size"),
            rope_theta=config.number("rope_theta"),
            init_std=std,
        ),
        head=_head_config(config, weights),
        init_std=std,
    )
    for name in [name for name in weights.arrays if name.startswith("ae_model.") or name.endswith(".rotary_emb.inv_freq")]:
        del weights.arrays[name]
    head = _energy_head if isinstance(ours.head, EnergyHeadConfig) else _stepwise_head
    arrays = _stem(weights, ours) | _backbone(weights, ours.backbone) | head(weights, ours)
    weights.finish()
    return build_with_weights(ours, arrays, where=str(folder))


def training_settings(folder: str | Path) -> dict[str, int | float]:
    """Training settings of config.json, under the names of our loss configurations.

    A language model has alpha and num_samples; an autoencoder kl_weight, kl_clamp, and one dropout rate that serves both
    token_dropout and latent_dropout.
    """
    values = PublishedConfig(Path(folder)).values
    settings = {ours: values[theirs] for theirs, ours in _TRAINING.items() if theirs in values}
    if "ae_dropout" in values:
        settings |= {"token_dropout": values["ae_dropout"], "latent_dropout": values["ae_dropout"]}
    return settings


def holds_language_model(folder: str | Path) -> bool:
    """Whether a published folder holds a language model, and not an autoencoder."""
    return any(name.startswith("transformer.") for name in weight_names(Path(folder)))


def holds_autoencoder(folder: str | Path) -> bool:
    """Whether a published folder holds an autoencoder: alone, or frozen inside a language model's file."""
    return any(name.endswith("encoder.embed_tokens.weight") for name in weight_names(Path(folder)))


def block_tokens(folder: str | Path) -> int:
    """The longest text in tokens that a published language model is made for: its positions are chunks."""
    config = PublishedConfig(Path(folder))
    return config.integer("max_position_embeddings") * config.integer("patch_size")


def _head_config(config: PublishedConfig, weights: PublishedWeights) -> HeadConfig:
    """The kind of head shows in its weights; config.json of some published models does not name it."""
    blocks, last = config.integer("num_mlp_layers"), "generative_head.net.final_layer.linear.weight"
    if last not in weights.arrays:
        return EnergyHeadConfig(
            num_blocks=blocks, noise_dim=config.integer("noise_size"), init_std=config.number("initializer_range")
        )
    draws, latent_dim = config.integer("num_samples"), config.integer("latent_size")
    if weights.shape(last)[0] == 2 * latent_dim:
        return DiffusionHeadConfig(num_blocks=blocks, num_steps=100, num_draws=draws, prediction="noise")
    return FlowHeadConfig(num_blocks=blocks, solver="midpoint", num_steps=10, num_draws=draws)


# -- weights by name --------------------------------------------------------------------------------------------------


def _autoencoder(weights: PublishedWeights, config: AutoencoderConfig) -> dict[str, np.ndarray]:
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


def _stem(weights: PublishedWeights, config: LatentLMConfig) -> dict[str, np.ndarray]:
    dim = config.backbone.dim
    return {
        "stem.embedding": weights.take("transformer.embed_tokens.weight", config.vocab_size, dim),
        **_dense(weights, "stem.widen", "embed_proj.0", config.chunk_size * dim, 2 * dim),
        **_dense(weights, "stem.narrow", "embed_proj.2", 2 * dim, dim),
        **_norm(weights, "stem.norm", "embed_proj.3", dim),
    }


def _backbone(weights: PublishedWeights, config: TransformerConfig) -> dict[str, np.ndarray]:
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


def _energy_head(weights: PublishedWeights, config: LatentLMConfig) -> dict[str, np.ndarray]:
    dim = config.backbone.dim
    assert isinstance(config.head, EnergyHeadConfig)

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


def _stepwise_head(weights: PublishedWeights, config: LatentLMConfig) -> dict[str, np.ndarray]:
    """Parameters of the network of a flow or diffusion head, which is called at every step."""
    dim, net = config.backbone.dim, "generative_head.net"
    head: Any = config.head
    width = config.latent_dim * (2 if head.kind == "diffusion" else 1)

    def block(index: int) -> dict[str, np.ndarray]:
        at = f"{net}.res_blocks.{index}"
        return {
            **_norm(weights, "norm", f"{at}.in_ln", dim),
            **_dense(weights, "inner", f"{at}.mlp.0", dim, dim),
            **_dense(weights, "outer", f"{at}.mlp.2", dim, dim),
            **_dense(weights, "modulation", f"{at}.adaLN_modulation.1", dim, 3 * dim),
        }

    return {
        **_dense(weights, "head.net.embed_latent", f"{net}.input_proj", config.latent_dim, dim),
        **_dense(weights, "head.net.embed_hidden", f"{net}.cond_embed", dim, dim),
        **_dense(weights, "head.net.time_inner", f"{net}.time_embed.mlp.0", 2 * FREQUENCIES, dim),
        **_dense(weights, "head.net.time_outer", f"{net}.time_embed.mlp.2", dim, dim),
        **_stacked("head.net.blocks.layer", head.num_blocks, block),
        **_dense(weights, "head.net.modulation_out", f"{net}.final_layer.adaLN_modulation.1", dim, 2 * dim),
        **_dense(weights, "head.net.out", f"{net}.final_layer.linear", dim, width),
    }


def _stacked(ours: str, count: int, layer: Callable[[int], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    layers = [layer(index) for index in range(count)]
    return {f"{ours}.{name}": np.stack([arrays[name] for arrays in layers]) for name in layers[0]}


def _mlp(weights: PublishedWeights, theirs: str, dim: int, inner_dim: int) -> dict[str, np.ndarray]:
    gate, up = (weights.kernel(f"{theirs}.{name}_proj", dim, inner_dim) for name in ("gate", "up"))
    down = weights.kernel(f"{theirs}.down_proj", inner_dim, dim)
    return {"mlp.gate_up.kernel": np.concatenate([gate, up], axis=1), "mlp.down.kernel": down}


def _dense(weights: PublishedWeights, ours: str, theirs: str, in_dim: int, out_dim: int) -> dict[str, np.ndarray]:
    return {f"{ours}.kernel": weights.kernel(theirs, in_dim, out_dim), f"{ours}.bias": weights.take(f"{theirs}.bias", out_dim)}


def _norm(weights: PublishedWeights, ours: str, theirs: str, dim: int) -> dict[str, np.ndarray]:
    return {f"{ours}.scale": weights.take(f"{theirs}.weight", dim), f"{ours}.bias": weights.take(f"{theirs}.bias", dim)}
