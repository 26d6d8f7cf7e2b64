"""A token model and CALM at K = 1, 2, 4, 8, at equal training compute, autoencoders included."""

from calm.heads.terms import AuxiliaryTerm
from calm.studies.base_runs import RATES, context_decoder_run, pure_run, token_run
from calm.studies.runner import Cell
from calm.studies.study import LanguageModelStudy, Place


class ChunkSizeStudy(LanguageModelStudy):
    """The token baseline, CALM with a context decoder at every K, the same without a latent, and pure CALM."""

    chunk_sizes = (8, 4, 2, 1)

    def cells(self, place: Place, budget: float | None) -> list[Cell]:
        runs = {
            "token": token_run(place.data),
            "calm-k4": context_decoder_run(place, 4),
            "calm-k2": context_decoder_run(place, 2),
            "calm-k1": context_decoder_run(place, 1),
            "calm-k8": context_decoder_run(place, 8),
            "hidden-k4": context_decoder_run(place, 4, reads="hidden"),
            "hidden-k1": context_decoder_run(place, 1, reads="hidden", rate=RATES["token"]),
            "pure-k4": pure_run(place, 4, AuxiliaryTerm()),
        }
        return [Cell(name=name, run=run, budget=budget) for name, run in runs.items()]
