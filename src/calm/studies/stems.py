"""Input of the backbone: tokens, latents or both."""

from calm.heads.terms import AuxiliaryTerm
from calm.studies.base_runs import pure_run, with_model
from calm.studies.runner import Cell
from calm.studies.study import LanguageModelStudy, Place


class StemStudy(LanguageModelStudy):
    """One cell a stem, of pure CALM with the auxiliary cross-entropy."""

    def cells(self, place: Place, budget: float | None) -> list[Cell]:
        base = pure_run(place, 4, AuxiliaryTerm())
        stems = ("discrete", "both", "continuous")
        return [Cell(name=stem, run=with_model(base, stem=stem), budget=budget) for stem in stems]
