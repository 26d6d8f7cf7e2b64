"""Recipes for CALM at small scale, at K = 4: the energy score alone, and each remedy added to it."""

import dataclasses

from calm.core.energy_head import EnergyHeadConfig
from calm.core.objective import EnergyTerm, LatentLossConfig
from calm.decoders.likelihood import LikelihoodTerm
from calm.heads.diffusion import DiffusionHeadConfig
from calm.heads.flow import FlowHeadConfig
from calm.heads.mixture import MixtureHeadConfig
from calm.heads.slot_energy import SlotEnergyTerm
from calm.heads.terms import AnchorTerm, AuxiliaryTerm, OwnTerm
from calm.runs import presets
from calm.studies.base_runs import context_decoder_run, flow_run, pure_run, with_model
from calm.studies.runner import Cell
from calm.studies.study import LanguageModelStudy, Place

OWN_LOSS_HEADS = {"flow": FlowHeadConfig(), "diffusion": DiffusionHeadConfig(), "mixture": MixtureHeadConfig()}
"""heads whose own loss replaces the energy score"""


PARTS = "autoencoder-parts"
"""cell of the autoencoder with one part a token"""


class RecipeStudy(LanguageModelStudy):
    """One cell a recipe. Steps at which loss terms change are scaled with the budget (`calm.studies.runner.sized`)."""

    def autoencoders(self, place: Place) -> list[Cell]:
        parts = dataclasses.replace(presets.get("wikitext2-tiny-vector").autoencoder, data=place.data)
        return [*super().autoencoders(place), Cell(name=PARTS, run=parts)]

    def cells(self, place: Place, budget: float | None) -> list[Cell]:
        energy, auxiliary = pure_run(place), pure_run(place, 4, AuxiliaryTerm())
        steps, no_energy = energy.train.steps, LatentLossConfig.of(OwnTerm(), AuxiliaryTerm())
        own_loss = {
            name: dataclasses.replace(with_model(auxiliary, head=head), loss=no_energy) for name, head in OWN_LOSS_HEADS.items()
        }
        runs = {
            "energy": energy,
            "auxiliary-1": auxiliary,
            "auxiliary-3-falling": pure_run(place, 4, AuxiliaryTerm(weight=3.0, decay_steps=steps)),
            "auxiliary-first": pure_run(place, 4, AuxiliaryTerm(decay_steps=steps), EnergyTerm(from_step=steps // 2)),
            "anchor": pure_run(place, 4, AuxiliaryTerm(), AnchorTerm(weight=0.03)),
            "likelihood": pure_run(place, 4, AuxiliaryTerm(), EnergyTerm(weight=0.1), LikelihoodTerm()),
            "slot-energy": pure_run(place, 4, AuxiliaryTerm(), SlotEnergyTerm()),
            "samples-16": pure_run(place, 4, AuxiliaryTerm(), num_samples=16),
            "head-4-blocks": with_model(auxiliary, head=EnergyHeadConfig(num_blocks=4)),
            **own_loss,
            "flow-clean": flow_run(place),
            "flow-clean-parts": flow_run(place, autoencoder=PARTS),
            "flow-clean-parts-last": flow_run(place, autoencoder=PARTS, head_reads_chunk=True),
            "written": context_decoder_run(place),
            "written-from-hidden": context_decoder_run(place, reads="hidden"),
            "written-from-both": context_decoder_run(place, reads="both"),
            "written-mean-of-4": context_decoder_run(place, num_samples=4, likelihood_samples=4),
        }
        return [Cell(name=name, run=run, budget=budget) for name, run in runs.items()]
