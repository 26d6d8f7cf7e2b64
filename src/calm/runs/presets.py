"""The presets: frozen configurations that a file or an option can build on.

The small ones train on two cores in minutes. Against the published recipe they differ where a small model needs it
(docs/log.md has the runs): kernels start at 1 / sqrt(fan-in) instead of .02, embeddings of the autoencoder at .1, learning
rates are ten times higher with a cosine, a third of the autoencoder's chunks is random, and a decoder inside the chunk,
trained by its likelihood, writes what the latent plans. The presets `-pure` have no such decoder: there the auxiliary
cross-entropy is on. The presets `-vector` have none either, and learn by other latents and another head (`_vector`).

The published ones cite CALM, arXiv:2510.27688. `calm-on-z` and `calm-seal` are after descriptions by J. Adam, 2025
(docs/calm-on-z.md): steps, batches, contexts, kernel, slots and weights are theirs; widths, layers and learning rates, which
they do not give, are ours.
"""

import dataclasses
from typing import Literal

from calm.core.autoencoder import AutoencoderConfig
from calm.core.energy_head import EnergyHeadConfig
from calm.core.head import HeadConfig
from calm.core.latent_lm import LatentLMConfig
from calm.core.objective import AutoencoderLossConfig, EnergyTerm, LatentLossConfig, Term
from calm.core.transformer import TransformerConfig
from calm.decoders.context_decoder import ContextDecoderConfig
from calm.decoders.likelihood import LikelihoodTerm
from calm.errors import UsageError
from calm.heads.diffusion import DiffusionHeadConfig
from calm.heads.direction import DirectionTerm
from calm.heads.flow import FlowHeadConfig
from calm.heads.gated import GatedEnergyHeadConfig
from calm.heads.mixture import MixtureHeadConfig
from calm.heads.terms import AuxiliaryTerm, OwnTerm
from calm.hybrid.backbone import of_pattern
from calm.hybrid.convolution import ConvSSMConfig
from calm.hybrid.hopfield import HopfieldConfig
from calm.posteriors.parts import PartsAutoencoderConfig
from calm.registry import suggestion
from calm.runs.hybrid_presets import hybrids
from calm.runs.preset import Preset
from calm.runs.stages import AutoencoderRun, LatentLMRun
from calm.train.optim import OptimizerConfig
from calm.train.settings import TrainConfig

SMALL_WRITER = ContextDecoderConfig(num_layers=1, inner_dim=344, recall=512)
"""the decoder inside the chunk of the small presets: what it looks back on is worth more than more layers (docs/log.md)"""


def get(name: str) -> Preset:
    """The preset of that name."""
    if name not in _PRESETS:
        raise UsageError(f"unknown preset {name!r}{suggestion(name, _PRESETS)}; there are: {', '.join(_PRESETS)}")
    return _PRESETS[name]


def names() -> tuple[str, ...]:
    """All presets' names."""
    return tuple(_PRESETS)


def _cosine(learning_rate: float, warmup_steps: int, weight_decay: float = 0.1) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        schedule="cosine",
        final_fraction=0.03,
        weight_decay=weight_decay,
    )


def _small(
    name: str,
    summary: str,
    *,
    tokenizer: str,
    width: int,
    latent_dim: int,
    dim: int,
    inner_dim: int,
    layers: int,
    head_blocks: int,
    rows: int,
    autoencoder_steps: int,
    lm_steps: int,
    learning_rate: float,
) -> Preset:
    autoencoder = AutoencoderRun(
        model=AutoencoderConfig(latent_dim=latent_dim, dim=width, inner_dim=5 * width // 2),
        train=TrainConfig(
            steps=autoencoder_steps,
            batch_size=4,
            optimizer=_cosine(6e-3 if width <= 128 else 4e-3, min(100, autoencoder_steps // 5), weight_decay=0.01),
            evaluate_every=max(1, autoencoder_steps // 4),
            save_every=max(1, autoencoder_steps // 4),
            best_metric="valid/token_accuracy",
            best_is="highest",
        ),
    )
    lm = LatentLMRun(
        model=LatentLMConfig(
            backbone=TransformerConfig(
                dim=dim, num_layers=layers, num_heads=dim // 64, num_kv_heads=dim // 64, inner_dim=inner_dim
            ),
            head=EnergyHeadConfig(num_blocks=head_blocks),
        ),
        loss=LatentLossConfig.of(EnergyTerm(), AuxiliaryTerm()),
        train=TrainConfig(
            steps=lm_steps,
            batch_size=rows,
            optimizer=_cosine(learning_rate, min(100, lm_steps // 5)),
            evaluate_every=max(1, lm_steps // 8),
            sample_every=max(1, lm_steps // 4),
            save_every=max(1, lm_steps // 8),
            best_metric="valid/energy_loss",  # a proper score, and above the floor at which young models share BrierLM 0
            best_is="lowest",
        ),
    )
    return Preset(name=name, summary=summary, tokenizer=tokenizer, autoencoder=autoencoder, lm=lm)


def _written(pure: Preset, name: str, summary: str, *, steps: int, learning_rate: float) -> Preset:
    """`pure` with the recipe that learns most at this scale (docs/log.md): a context decoder writes the chunk from the
    sampled latent alone, trained by its likelihood; a light energy score over two samples keeps the latents near the
    autoencoder's.
    """
    writer = dataclasses.replace(SMALL_WRITER, use_hidden=False)
    model = dataclasses.replace(pure.lm.model, head=EnergyHeadConfig(num_blocks=1), context_decoder=writer)
    loss = LatentLossConfig.of(EnergyTerm(weight=0.1), LikelihoodTerm(num_samples=1), num_samples=2)
    train = dataclasses.replace(
        pure.lm.train,
        steps=steps,
        batch_size=2,
        num_tokens=512,
        optimizer=_cosine(learning_rate, min(100, steps // 5)),
        evaluate_every=max(1, steps // 4),
        sample_every=max(1, steps // 4),
        save_every=max(1, steps // 4),
        best_metric="valid/objective",
    )
    lm = dataclasses.replace(pure.lm, model=model, loss=loss, train=train)
    rate = pure.lm.train.optimizer.learning_rate  # what a decoder inside the chunk likes is too much for a token model
    return dataclasses.replace(pure, name=name, summary=summary, lm=lm, token_learning_rate=rate)


VECTOR_HEAD = FlowHeadConfig(
    num_blocks=3,
    solver="euler",
    num_steps=8,
    num_draws=1,
    prediction="clean",
    last_time=0.62,
    trained_until=0.7,
    start_share=0.15,
    network="residual",
)
"""the flow head of the presets `-vector`: on parts of one token, most tokens are decided well before time .7"""


def _vector(pure: Preset, name: str, summary: str, *, steps: int) -> Preset:
    """`pure` with all text going through the vector and a recipe that learns it at this scale: latents of one part a token, a
    flow head that predicts the clean latent, and the tokens of the last chunk given to the head directly.

    At these budgets the head then reads that chunk alone, and the backbone's output becomes a constant (docs/heads.md);
    `head_reads_chunk` off makes the backbone read, at a lower BrierLM.
    """
    autoencoder = dataclasses.replace(
        pure.autoencoder,
        model=PartsAutoencoderConfig(latent_dim=pure.autoencoder.model.latent_dim),
        train=dataclasses.replace(
            pure.autoencoder.train,
            steps=300,
            optimizer=_cosine(6e-3, 60, weight_decay=0.01),
            evaluate_every=300,
            save_every=300,
        ),
    )
    model = dataclasses.replace(pure.lm.model, head=VECTOR_HEAD, head_reads_chunk=True)
    train = dataclasses.replace(
        pure.lm.train,
        steps=steps,
        batch_size=2,
        num_tokens=512,
        optimizer=_cosine(4e-3, min(100, steps // 5)),
        evaluate_every=max(1, steps // 2),
        sample_every=max(1, steps // 2),
        save_every=max(1, steps // 2),
        best_metric="valid/objective",
    )
    lm = dataclasses.replace(pure.lm, model=model, loss=LatentLossConfig.of(OwnTerm()), train=train)
    return dataclasses.replace(
        pure,
        name=name,
        summary=summary,
        autoencoder=autoencoder,
        lm=lm,
        token_learning_rate=pure.lm.train.optimizer.learning_rate,
    )


def _with_head(preset: Preset, suffix: str, head: HeadConfig) -> Preset:
    """`preset` with a head that has a loss of its own, which takes the place of the energy score; all else alike."""
    model = dataclasses.replace(preset.lm.model, head=head)
    loss = preset.lm.loss.without("energy").with_terms(OwnTerm())
    lm = dataclasses.replace(preset.lm, model=model, loss=loss)
    name = preset.name.replace("pure", suffix)
    return dataclasses.replace(preset, name=name, summary=f"{preset.name} with a {suffix} head", lm=lm)


LossKind = Literal["calm", "rf", "calm_rf"]


def loss_of_kind(kind: LossKind, rf_weight: float = 0.1, *others: Term) -> LatentLossConfig:
    """The loss types of "Hybrid CALM-on-Z" as terms: calm, the energy score; rf, the direction term; calm_rf, their sum.

    A term of weight 0 is measured beside the others.
    """
    energy, direction = {"calm": (1.0, 0.0), "rf": (0.0, 1.0), "calm_rf": (1.0, rf_weight)}[kind]
    return LatentLossConfig.of(EnergyTerm(weight=energy), DirectionTerm(weight=direction), *others)


def _on_z(
    base: Preset, name: str, summary: str, *, num_tokens: int, head: GatedEnergyHeadConfig, loss: LatentLossConfig
) -> Preset:
    """`base` as a model on latents: it reads the last chunk's latent, passes convolutions (kernel 7) and Hopfield memories (64
    slots) by turns, and ends in a gated energy head."""
    heads = max(1, base.lm.model.backbone.dim // 64)
    mixers = {"C": ConvSSMConfig(kernel=7), "H": HopfieldConfig(memory="slots", num_slots=64, num_heads=heads)}
    backbone = of_pattern(base.lm.model.backbone, "C,H", mixers=mixers)
    model = dataclasses.replace(base.lm.model, stem="continuous", backbone=backbone, head=head)
    train = dataclasses.replace(base.lm.train, num_tokens=num_tokens, best_metric="valid/objective", log_every=10)
    lm = dataclasses.replace(base.lm, model=model, loss=loss, train=train)
    return dataclasses.replace(base, name=name, summary=summary, lm=lm)


def _published(name: str, dim: int, inner_dim: int) -> Preset:
    """Layers 16, heads of width 64, a head block for every four layers."""
    optimizer = OptimizerConfig(learning_rate=3e-4, warmup_steps=1000)
    autoencoder = AutoencoderRun(
        model=AutoencoderConfig(latent_dim=128, dim=512, inner_dim=1280, embedding_std=0.02, init_std=0.02),
        loss=AutoencoderLossConfig(random_chunks=0.0),
        train=TrainConfig(steps=30_000, batch_size=256, num_tokens=2048, optimizer=optimizer),
    )
    lm = LatentLMRun(
        model=LatentLMConfig(
            backbone=TransformerConfig(
                dim=dim, num_layers=16, num_heads=16, num_kv_heads=16, inner_dim=inner_dim, init_std=0.02
            ),
            head=EnergyHeadConfig(num_blocks=4, init_std=0.02),
            init_std=0.02,
        ),
        loss=LatentLossConfig.of(EnergyTerm(fidelity="shared_draws")),
        train=TrainConfig(
            steps=250_000,
            batch_size=256,
            num_tokens=8192,
            optimizer=dataclasses.replace(optimizer, warmup_steps=2000),
            evaluate_every=5000,
            save_every=5000,
        ),
    )
    summary = f"{name.upper()} of the paper; wants the Llama-3 tokenizer's file"
    return Preset(
        name=name,
        summary=summary,
        tokenizer="tokenizer.json",
        autoencoder=autoencoder,
        lm=lm,
    )


_TINY = dict(width=128, latent_dim=64, dim=256, inner_dim=688, layers=4, head_blocks=2)

_PURE_QUICKSTART = _small(
    "quickstart-pure",
    "quickstart as CALM is published: the frozen autoencoder reads the latent",
    tokenizer="bpe:4096",
    **_TINY,
    rows=4,
    autoencoder_steps=300,
    lm_steps=650,
    learning_rate=2e-3,
)
_PURE_TINY = _small(
    "wikitext2-tiny-pure",
    "wikitext2-tiny as CALM is published, with the auxiliary cross-entropy",
    tokenizer="bpe:8192",
    **_TINY,
    rows=4,
    autoencoder_steps=1000,
    lm_steps=3000,
    learning_rate=2e-3,
)
_PURE_SMALL = _small(
    "wikitext2-small-pure",
    "wikitext2-small as CALM is published, with the auxiliary cross-entropy",
    tokenizer="bpe:8192",
    width=256,
    latent_dim=128,
    dim=512,
    inner_dim=1376,
    layers=8,
    head_blocks=4,
    rows=2,
    autoencoder_steps=1200,
    lm_steps=1400,
    learning_rate=1e-3,
)
_HEADS: dict[str, HeadConfig] = {
    "flow": FlowHeadConfig(num_draws=4),
    "diffusion": DiffusionHeadConfig(num_steps=25, num_draws=4),
    "mixture": MixtureHeadConfig(),
}

_Z = _small(
    "z",
    "",
    tokenizer="bpe:8192",
    width=256,
    latent_dim=128,
    dim=512,
    inner_dim=1376,
    layers=8,
    head_blocks=2,
    rows=8,
    autoencoder_steps=2000,
    lm_steps=4000,
    learning_rate=1e-3,
)
_Z = dataclasses.replace(
    _Z,
    autoencoder=dataclasses.replace(
        _Z.autoencoder, train=dataclasses.replace(_Z.autoencoder.train, batch_size=8, precision="bfloat16")
    ),
    lm=dataclasses.replace(_Z.lm, train=dataclasses.replace(_Z.lm.train, precision="bfloat16")),
)
_Z_TINY = _small(
    "z-tiny",
    "",
    tokenizer="bpe:4096",
    **_TINY,
    rows=8,
    autoencoder_steps=600,
    lm_steps=1200,
    learning_rate=2e-3,
)

_PRESETS = {
    preset.name: preset
    for preset in (
        _written(_PURE_QUICKSTART, "quickstart", "a model in under five minutes on two cores", steps=2000, learning_rate=6e-3),
        _written(_PURE_TINY, "wikitext2-tiny", "WikiText-2, 12 M tokens of training", steps=12_000, learning_rate=6e-3),
        _written(
            _PURE_SMALL,
            "wikitext2-small",
            "WikiText-2 with a wider, deeper model, 6 M tokens of training",
            steps=6000,
            learning_rate=3e-3,
        ),
        _PURE_QUICKSTART,
        _PURE_TINY,
        _PURE_SMALL,
        _vector(_PURE_QUICKSTART, "quickstart-vector", "quickstart with all text through the vector, by a flow", steps=3000),
        _vector(
            _PURE_TINY,
            "wikitext2-tiny-vector",
            "wikitext2-tiny with all text through the vector, by a flow; 2.7 M tokens of training",
            steps=2650,
        ),
        *(_with_head(_PURE_TINY, kind, head) for kind, head in _HEADS.items()),
        _on_z(
            _Z,
            "calm-on-z",
            "a model on latents: convolution and Hopfield memory, gated energy head, direction term",
            num_tokens=256,
            head=GatedEnergyHeadConfig(gate="dimension", noise_std=2.0),
            loss=loss_of_kind("calm_rf", 0.1),
        ),
        _on_z(
            _Z,
            "calm-seal",
            "calm-on-z with 128 latents, a heavy direction term and a gate that the hidden state sets",
            num_tokens=512,
            head=GatedEnergyHeadConfig(gate="dynamic", noise_std=2.0),
            loss=loss_of_kind("calm_rf", 2.0),
        ),
        _on_z(
            _Z_TINY,
            "z-tiny",
            "calm-on-z for two cores, with the auxiliary cross-entropy",
            num_tokens=256,
            head=GatedEnergyHeadConfig(num_blocks=1, noise_std=2.0),
            loss=loss_of_kind("calm_rf", 0.1, AuxiliaryTerm()),
        ),
        _published("calm-m", 1024, 2752),
        _published("calm-l", 1536, 4096),
        _published("calm-xl", 2560, 6880),
    )
}
_PRESETS |= {
    preset.name: preset
    for preset in hybrids(_PRESETS["quickstart"], _PRESETS["wikitext2-tiny"], _PRESETS["wikitext2-small-pure"])
}
