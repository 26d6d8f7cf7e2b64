"""Runs that the studies of language models vary.

All have the backbone of the presets `wikitext2-tiny` (4 layers of width 256), rows of 512 tokens, two rows a step, and
the learning rate that suits their kind best.
"""

import dataclasses
from typing import Any

from calm.core.energy_head import EnergyHeadConfig
from calm.core.objective import EnergyTerm, LatentLossConfig, Term
from calm.decoders.likelihood import LikelihoodTerm
from calm.runs import presets
from calm.runs.presets import SMALL_WRITER
from calm.runs.stages import LatentLMRun, TokenLMRun
from calm.studies.study import Place
from calm.train.settings import TrainConfig

ROWS, NUM_TOKENS = 2, 512
WORD_TABLE_DIM = 64
"""width of the token table on words; at full width the softmax over 33,278 words would take most of a small budget"""
RATES = {"token": 3e-3, "pure": 2e-3, "written": 6e-3}


def token_run(data: str, **model: Any) -> TokenLMRun:
    """The token baseline; `model` changes settings of its model."""
    base = presets.get("wikitext2-tiny-pure").token_lm
    return dataclasses.replace(
        base,
        data=data,
        model=dataclasses.replace(base.model, **model),
        train=_train(base.train, RATES["token"], base.train.best_metric),
    )


def pure_run(place: Place, chunk_size: int = 4, *terms: Term, num_samples: int = 8) -> LatentLMRun:
    """Pure CALM: the energy head, decoded by the frozen autoencoder, trained by the energy and further terms."""
    base = presets.get("wikitext2-tiny-pure").lm
    return dataclasses.replace(
        base,
        data=place.data,
        autoencoder=str(place.autoencoder(chunk_size)),
        model=dataclasses.replace(base.model, context_decoder=None),
        loss=LatentLossConfig.of(EnergyTerm(), num_samples=num_samples).with_terms(*terms),
        train=_train(base.train, RATES["pure"], "valid/objective"),
    )


def context_decoder_run(
    place: Place,
    chunk_size: int = 4,
    *,
    reads: str = "latent",
    rate: float = RATES["written"],
    num_samples: int = 2,
    likelihood_samples: int = 1,
) -> LatentLMRun:
    """CALM with a context decoder, which `reads` the sampled latent alone (kept near the autoencoder's by a light energy
    score over two samples), the hidden state alone (then there is no latent, and no autoencoder to pay for), or both.

    From the hidden state at K = 1 it is a token model with this decoder, including its window of recent tokens.
    """
    use_latent, use_hidden = reads in ("latent", "both"), reads in ("hidden", "both")
    terms = [LikelihoodTerm(num_samples=likelihood_samples), *([EnergyTerm(weight=0.1)] if use_latent else [])]
    loss = LatentLossConfig.of(*terms, num_samples=num_samples)
    decoder = dataclasses.replace(SMALL_WRITER, use_latent=use_latent, use_hidden=use_hidden)
    run = with_model(pure_run(place, chunk_size), head=EnergyHeadConfig(num_blocks=1), context_decoder=decoder)
    return dataclasses.replace(run, loss=loss, train=_train(run.train, rate, run.train.best_metric))


def flow_run(place: Place, *, autoencoder: str | None = None, head_reads_chunk: bool = False) -> LatentLMRun:
    """All text through the vector by the flow head of the presets `-vector`, on the latents of the autoencoder of K = 4, or of
    the study's cell of this name."""
    base = presets.get("wikitext2-tiny-vector").lm
    folder = place.autoencoder(4) if autoencoder is None else place.out / autoencoder / "seed-0"
    model = dataclasses.replace(base.model, head_reads_chunk=head_reads_chunk)
    train = _train(base.train, base.train.optimizer.learning_rate, "valid/objective")
    return dataclasses.replace(base, data=place.data, autoencoder=str(folder), model=model, train=train)


def with_model(run: LatentLMRun, **settings: Any) -> LatentLMRun:
    """The run with other settings of its model."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **settings))


def _train(base: TrainConfig, rate: float, best: str) -> TrainConfig:
    optimizer = dataclasses.replace(base.optimizer, learning_rate=rate)
    return dataclasses.replace(base, batch_size=ROWS, num_tokens=NUM_TOKENS, optimizer=optimizer, best_metric=best)
