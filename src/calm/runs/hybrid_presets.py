"""Hybrid backbones as presets: state space, Hopfield memory and attention side by side, after J. Adam 2025.

"Hybrid Hopfield-SSM Language Model" gives: 8 layers, about 107 M weights at word level on WikiText-103 (267,735 words) and
about 97 M with byte-pair tokens, three paths under a softmax gate, refinements 3, 2, 2, 1 ..., three segments under a
controller, 25 k steps, an average of the weights, label smoothing and a z-loss. It does not give widths, heads, slots, the
byte-pair vocabulary, batch, context, rates, or the weights of the losses: those are ours. So many words leave room for a narrow
table only: at width 256 it has 68.5 M weights, with a linear map to the model's 512 and back. Its flow regulariser is left out,
since what flows is not said; `--loss.flow-weight` is ours. Neither large one has been trained here.

The small ones are for two cores.
"""

import dataclasses

from calm.core.transformer import TransformerConfig
from calm.hybrid.backbone import HybridConfig, of_pattern
from calm.hybrid.hopfield import HopfieldConfig
from calm.runs.preset import Preset
from calm.runs.stages import TokenLMRun
from calm.token.model import TokenLMConfig
from calm.token.objective import TokenLossConfig
from calm.train.optim import OptimizerConfig
from calm.train.settings import TrainConfig

DEPTHS = (3, 2, 2, 1)


def hybrids(token_base: Preset, latent_base: Preset, large_base: Preset) -> tuple[Preset, ...]:
    """The presets; each base gives what has nothing to do with its backbone: autoencoder, head, losses, small schedules."""
    words, pieces = _large(dim=512, inner_dim=1024, table_dim=256), _large(dim=640, inner_dim=2240, table_dim=0)
    return (
        _on(token_base, "hybrid-tiny", "quickstart on a hybrid backbone, SHA; meant for the token model", _small(token_base)),
        _on(latent_base, "wikitext2-tiny-hybrid", "wikitext2-tiny on a hybrid backbone, SHA", _small(latent_base)),
        dataclasses.replace(
            _on(large_base, "hybrid-107m", "word-level token model of 107 M weights, SHA", words.model.backbone),
            tokenizer="words",
            token=words,
        ),
        dataclasses.replace(
            _on(large_base, "hybrid-97m", "its variant on 32,768 byte-pair tokens", pieces.model.backbone),
            tokenizer="bpe:32768",
            token=pieces,
        ),
    )


def _on(base: Preset, name: str, summary: str, backbone: TransformerConfig) -> Preset:
    lm = dataclasses.replace(base.lm, model=dataclasses.replace(base.lm.model, backbone=backbone))
    return dataclasses.replace(base, name=name, summary=summary, lm=lm)


def _small(base: Preset) -> TransformerConfig:
    """Its backbone with three paths a layer; the memory is one of learned slots."""
    memory = HopfieldConfig(num_slots=64, num_heads=4, refinements=DEPTHS)
    return of_pattern(base.lm.model.backbone, "SHA", mixers={"H": memory})


def _large(*, dim: int, inner_dim: int, table_dim: int) -> TokenLMRun:
    backbone = HybridConfig(
        dim=dim,
        num_layers=8,
        pattern="SHA",
        num_heads=8,
        num_kv_heads=8,
        inner_dim=inner_dim,
        num_segments=3,
        mixers={"H": HopfieldConfig(num_slots=64, num_heads=8, refinements=DEPTHS)},
    )
    train = TrainConfig(
        steps=25_000,
        batch_size=64,
        num_tokens=512,
        precision="bfloat16",
        ema_decay=0.999,
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=1000, schedule="cosine", final_fraction=0.03),
        evaluate_every=1000,
        save_every=1000,
        best_metric="valid/nats_per_token",
        best_is="lowest",
    )
    model = TokenLMConfig(backbone=backbone, table_dim=table_dim)
    return TokenLMRun(model=model, loss=TokenLossConfig(label_smoothing=0.05, z_weight=1e-4), train=train)
