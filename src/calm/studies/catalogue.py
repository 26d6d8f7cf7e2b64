"""Studies by name. Importing this module imports none of them; each is imported when it is used.

A study of this package is one file and one line of `STUDIES`. A study of another package registers itself on import:

    @register("depths", "how many layers a small CALM needs")
    class DepthStudy(LanguageModelStudy):
        ...
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from calm.errors import UsageError
from calm.registry import suggestion


@runtime_checkable
class Study(Protocol):
    """A question answered by many short runs; built without arguments."""

    @property
    def options(self) -> frozenset[str]:
        """Options of `calm experiment` that the study reads, besides out, seeds and only. Others are refused; data is
        required where it is among them."""
        ...

    def run(self, request: Any) -> dict[str, Any]:
        """Runs the cells that are missing for a `calm.studies.study.Request` and returns `request.written(...)`."""
        ...


class Listing(NamedTuple):
    """One line of the catalogue."""

    summary: str
    """the question, in a line"""
    source: str | Callable[[], Study]
    """class of the study, or `module:Class` below `calm.studies`"""


STUDIES: dict[str, Listing] = {
    "chunk-sizes": Listing("a token model and CALM at K = 1, 2, 4, 8, at equal training compute", "chunk_sizes:ChunkSizeStudy"),
    "recipes": Listing("what makes CALM learn at small scale, at K = 4", "recipes:RecipeStudy"),
    "stems": Listing("what the backbone reads: tokens, latents or both", "stems:StemStudy"),
    "reasoner-on-z": Listing("a model on latents whose backbone runs 1, 2, 3 times", "reasoner_on_z:ReasonerStudy"),
    "memory": Listing(
        "which mixer remembers what: copying, selective copying, induction, associative recall", "memory:MemoryStudy"
    ),
    "align": Listing("weight updates for a prompt against the same FLOPs spent otherwise", "alignment:AlignmentStudy"),
    "losses": Listing(
        "the energy score, the direction term, and both, under a gated head that reads latents", "loss_kinds:LossKindStudy"
    ),
    "regularisers": Listing(
        "do label smoothing, z-loss, a hidden flow or averaged weights keep a token model from collapsing?",
        "regularisers:RegulariserStudy",
    ),
    "hybrids": Listing(
        "patterns of mixers under one latent language model, at equal compute and at equal size", "hybrids:HybridStudy"
    ),
    "ablation": Listing(
        "what the paths, the segments and the controller of a hybrid token model are worth, masked and retrained",
        "path_ablation:PathAblationStudy",
    ),
    "probes": Listing("which paths the gates of a hybrid token model hear, by layer and position", "gates:GateStudy"),
    "latent-spaces": Listing(
        "a spherical latent beside the Gaussian, a hierarchical autoencoder beside a flat one, and BrierLM on each",
        "latent_spaces:LatentSpaceStudy",
    ),
}

T = TypeVar("T", bound=type)


def register(name: str, summary: str) -> Callable[[T], T]:
    """Decorator that adds a class of `Study` to the catalogue.

    Raises:
        UsageError: the name is taken.
    """

    def add(cls: T) -> T:
        if name in STUDIES:
            raise UsageError(f"study {name!r}: the name is taken; choose another")
        STUDIES[name] = Listing(summary, cls)
        return cls

    return add


def get(name: str) -> Study:
    """Imports and builds the study called `name`. Raises UsageError for an unknown one."""
    if name not in STUDIES:
        raise UsageError(f"unknown experiment {name!r}{suggestion(name, STUDIES)}; there are: {', '.join(STUDIES)}")
    source = STUDIES[name].source
    if isinstance(source, str):
        module, _, attribute = source.partition(":")
        source = getattr(importlib.import_module(f"calm.studies.{module}"), attribute)
    return source()


def title(name: str) -> str:
    """`NAME: SUMMARY`, the first words of a study's report."""
    return f"{name}: {STUDIES[name].summary}" if name in STUDIES else name
