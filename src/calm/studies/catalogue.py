"""The studies that there are, by name. Most are a list of language models at one budget of training FLOPs.

All language models have the backbone of the presets `wikitext2-tiny` (4 layers of width 256), rows of 512 tokens, two rows a
step, and their own best learning rate; a cell's autoencoder is trained first, once for each K, and paid for from the cell's
budget.
"""

import dataclasses
import functools

from calm.config import suggestion
from calm.core.energy_head import EnergyHeadConfig
from calm.core.latent_lm import LatentLMConfig
from calm.core.objective import LatentLossConfig
from calm.errors import UsageError
from calm.heads import HeadConfig
from calm.heads.diffusion import DiffusionHeadConfig
from calm.heads.flow import FlowHeadConfig
from calm.heads.mixture import MixtureHeadConfig
from calm.runs import presets
from calm.runs.presets import SMALL_WRITER
from calm.runs.stages import LatentLMRun, TokenLMRun
from calm.studies import reasoner_on_z
from calm.studies.alignment import AlignmentStudy
from calm.studies.gates import ProbeStudy
from calm.studies.hybrids import HybridStudy
from calm.studies.latent_spaces import LatentSpaceStudy
from calm.studies.loss_kinds import LossKindStudy
from calm.studies.memory import MemoryStudy
from calm.studies.path_ablation import AblationStudy
from calm.studies.regularisers import RegulariserStudy
from calm.studies.runner import Cell
from calm.studies.study import LanguageModelStudy, Place, Study
from calm.train.settings import TrainConfig

ROWS, NUM_TOKENS = 2, 512
OTHER_HEADS: dict[str, HeadConfig] = {
    "flow": FlowHeadConfig(),
    "diffusion": DiffusionHeadConfig(),
    "mixture": MixtureHeadConfig(),
}
"""heads with a loss of their own, which takes the place of the energy score"""
RATES = {"token": 3e-3, "pure": 2e-3, "written": 6e-3}


def get(name: str) -> Study:
    """The study of that name."""
    if name not in STUDIES:
        raise UsageError(f"unknown experiment {name!r}{suggestion(name, STUDIES)}; there are: {', '.join(STUDIES)}")
    return STUDIES[name]


# -- cells ------------------------------------------------------------------------------------------------------------


def _train(base: TrainConfig, rate: float, best: str) -> TrainConfig:
    optimizer = dataclasses.replace(base.optimizer, learning_rate=rate)
    return dataclasses.replace(base, batch_size=ROWS, num_tokens=NUM_TOKENS, optimizer=optimizer, best_metric=best)


def token_run(place: Place) -> TokenLMRun:
    """The token baseline."""
    base = presets.get("wikitext2-tiny-pure").token_lm
    return dataclasses.replace(base, data=place.data, train=_train(base.train, RATES["token"], base.train.best_metric))


def pure_run(place: Place, chunk_size: int = 4, **loss: object) -> LatentLMRun:
    """Pure CALM: the energy head, read by the frozen autoencoder; other terms by name."""
    base = presets.get("wikitext2-tiny-pure").lm
    train = _train(base.train, RATES["pure"], "valid/objective")
    terms = LatentLossConfig(**{"auxiliary_weight": 0.0, **loss})  # type: ignore[arg-type]
    return dataclasses.replace(
        base,
        data=place.data,
        autoencoder=str(place.autoencoder(chunk_size)),
        model=dataclasses.replace(base.model, context_decoder=None),
        loss=terms,
        train=train,
    )


def written_run(
    place: Place, chunk_size: int = 4, *, reads: str = "latent", rate: float = RATES["written"], **loss: object
) -> LatentLMRun:
    """CALM whose chunks a context decoder writes. It `reads` the sampled latent alone, which a light energy score over two
    samples keeps near the autoencoder's; or the hidden state alone, and then there is no latent, and no autoencoder to pay for;
    or both. From the hidden state at K = 1 it is a token model with this decoder, what it looks back on included.
    """
    pure = pure_run(place, chunk_size)
    use_latent, use_hidden = reads in ("latent", "both"), reads in ("hidden", "both")
    light: dict[str, object] = dict(num_samples=2, energy_weight=0.1 if use_latent else 0.0, likelihood_weight=1.0)
    terms = LatentLossConfig(**{**light, "likelihood_samples": 1, **loss})  # type: ignore[arg-type]
    writer = dataclasses.replace(SMALL_WRITER, use_latent=use_latent, use_hidden=use_hidden)
    model = _with(pure.model, head=EnergyHeadConfig(num_blocks=1), context_decoder=writer)
    optimizer = dataclasses.replace(pure.train.optimizer, learning_rate=rate)
    return dataclasses.replace(pure, model=model, loss=terms, train=dataclasses.replace(pure.train, optimizer=optimizer))


def _with(model: LatentLMConfig, **parts: object) -> LatentLMConfig:
    return dataclasses.replace(model, **parts)  # type: ignore[arg-type]


def _chunk_sizes(place: Place, budget: float | None) -> list[Cell]:
    runs = {
        "token": token_run(place),
        "calm-k4": written_run(place, 4),
        "calm-k2": written_run(place, 2),
        "calm-k1": written_run(place, 1),
        "calm-k8": written_run(place, 8),
        "hidden-k4": written_run(place, 4, reads="hidden"),
        "hidden-k1": written_run(place, 1, reads="hidden", rate=RATES["token"]),
        "pure-k4": pure_run(place, 4, auxiliary_weight=1.0),
    }
    return [Cell(name=name, run=run, budget=budget) for name, run in runs.items()]


def _recipes(place: Place, budget: float | None) -> list[Cell]:
    def model(**parts: object) -> LatentLMRun:
        run = pure_run(place, auxiliary_weight=1.0)
        return dataclasses.replace(run, model=_with(run.model, **parts))

    steps = pure_run(place).train.steps  # what hangs on them moves with a budget
    runs = {
        "energy": pure_run(place),
        "auxiliary-1": pure_run(place, auxiliary_weight=1.0),
        "auxiliary-3-falling": pure_run(place, auxiliary_weight=3.0, auxiliary_decay_steps=steps),
        "auxiliary-first": pure_run(place, auxiliary_weight=1.0, auxiliary_decay_steps=steps, energy_from_step=steps // 2),
        "anchor": pure_run(place, auxiliary_weight=1.0, anchor_weight=0.03),
        "likelihood": pure_run(place, auxiliary_weight=1.0, energy_weight=0.1, likelihood_weight=1.0),
        "slot-energy": pure_run(place, auxiliary_weight=1.0, slot_energy_weight=1.0),
        "samples-16": pure_run(place, auxiliary_weight=1.0, num_samples=16),
        "head-4-blocks": model(head=EnergyHeadConfig(num_blocks=4)),
        **{
            name: dataclasses.replace(model(head=head), loss=LatentLossConfig(energy_weight=0.0, auxiliary_weight=1.0))
            for name, head in OTHER_HEADS.items()
        },
        "written": written_run(place),
        "written-from-hidden": written_run(place, reads="hidden"),
        "written-from-both": written_run(place, reads="both"),
        "written-mean-of-4": written_run(place, num_samples=4, likelihood_samples=4),
    }
    return [Cell(name=name, run=run, budget=budget) for name, run in runs.items()]


def _stems(place: Place, budget: float | None) -> list[Cell]:
    cells = []
    for stem in ("discrete", "both", "continuous"):
        run = pure_run(place, auxiliary_weight=1.0)
        cells.append(Cell(name=stem, run=dataclasses.replace(run, model=_with(run.model, stem=stem)), budget=budget))
    return cells


STUDIES: dict[str, Study] = {
    "chunk-sizes": LanguageModelStudy(
        summary="a token model and CALM at K = 1, 2, 4, 8, at equal training compute",
        chunk_sizes=(8, 4, 2, 1),
        cells=_chunk_sizes,
    ),
    "recipes": LanguageModelStudy(summary="what makes CALM learn at small scale, at K = 4", chunk_sizes=(4,), cells=_recipes),
    "stems": LanguageModelStudy(summary="what the backbone reads: tokens, latents or both", chunk_sizes=(4,), cells=_stems),
    "reasoner-on-z": LanguageModelStudy(
        summary="a model on latents whose backbone runs 1, 2, 3 times", chunk_sizes=(4,), cells=reasoner_on_z.cells
    ),
    "memory": MemoryStudy(),
    "align": AlignmentStudy(),
    "losses": LossKindStudy(),
    "regularisers": RegulariserStudy(),
    "hybrids": HybridStudy(recipe=written_run),
    "ablation": AblationStudy(),
    "probes": ProbeStudy(),
    "latent-spaces": LatentSpaceStudy(recipe=functools.partial(pure_run, auxiliary_weight=1.0)),
}
