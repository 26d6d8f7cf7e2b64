"""Families of configurations whose members are chosen by name, and to which other packages can add members.

A family is a base class and a member is a frozen dataclass that registers under a name:

    @HeadConfig.register("flow")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class FlowHeadConfig(HeadConfig):
        ...

A configuration file names the member: `kind = "flow"`. Members that come with calm are also listed in `PROVIDED`, so that a
name imports its module when it is first used, and the room that defines a family imports none of its members. The idea is
that of levanter's registered configurations (draccus `ChoiceRegistry`), without its dependence on import order.

Nothing here imports jax.
"""

import difflib
import importlib
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

from calm.errors import UsageError

PROVIDED: dict[str, dict[str, str]] = {
    "head": {
        "energy": "calm.core.energy_head:EnergyHeadConfig",
        "flow": "calm.heads.flow:FlowHeadConfig",
        "diffusion": "calm.heads.diffusion:DiffusionHeadConfig",
        "mixture": "calm.heads.mixture:MixtureHeadConfig",
        "gated": "calm.heads.gated:GatedEnergyHeadConfig",
    },
    "backbone": {
        "transformer": "calm.core.transformer:TransformerConfig",
        "hybrid": "calm.hybrid.backbone:HybridConfig",
    },
    "mixer": {
        "A": "calm.core.attention:AttentionConfig",
        "S": "calm.hybrid.state_space:SSMConfig",
        "C": "calm.hybrid.convolution:ConvSSMConfig",
        "H": "calm.hybrid.hopfield:HopfieldConfig",
        "G": "calm.hybrid.gru:GRUConfig",
    },
    "decoder": {
        "context": "calm.decoders.context_decoder:ContextDecoderConfig",
    },
    "autoencoder": {
        "flat": "calm.core.autoencoder:AutoencoderConfig",
        "hierarchical": "calm.posteriors.hierarchical:HierarchicalAutoencoderConfig",
        "parts": "calm.posteriors.parts:PartsAutoencoderConfig",
    },
    "posterior": {
        "gaussian": "calm.core.gaussian:Gaussian",
        "power_spherical": "calm.posteriors.power_spherical:PowerSpherical",
    },
    "term": {
        "energy": "calm.core.objective:EnergyTerm",
        "direction": "calm.heads.direction:DirectionTerm",
        "own": "calm.heads.terms:OwnTerm",
        "auxiliary": "calm.heads.terms:AuxiliaryTerm",
        "anchor": "calm.heads.terms:AnchorTerm",
        "slot_energy": "calm.heads.slot_energy:SlotEnergyTerm",
        "likelihood": "calm.decoders.likelihood:LikelihoodTerm",
    },
    "run": {
        "autoencoder": "calm.runs.stages:AutoencoderRun",
        "latent_lm": "calm.runs.stages:LatentLMRun",
        "token_lm": "calm.runs.stages:TokenLMRun",
    },
}
"""family -> name -> module and class of the members that come with calm"""

Member = TypeVar("Member", bound=type)


def suggestion(word: str, options: Iterable[str]) -> str:
    """` (did you mean 'layers'?)` for the option nearest to `word`, or the empty string when none is near."""
    near = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


class Registered:
    """Base class of a family: `class HeadConfig(Registered, family="head")`."""

    family: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    """name of a member; empty for the family itself"""
    _members: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, *, family: str = "", **others: Any) -> None:
        super().__init_subclass__(**others)
        if family:
            cls.family, cls._members = family, {}

    @classmethod
    def register(cls, name: str) -> Callable[[Member], Member]:
        """Class decorator that makes a class the member of this name.

        Raises:
            ValueError: another class has the name already.
        """

        def decorate(member: Member) -> Member:
            taken = cls._members.get(name)
            path = f"{member.__module__}:{member.__qualname__}"
            if PROVIDED.get(cls.family, {}).get(name, path) != path:
                raise ValueError(f"{cls.family} {name!r} comes with calm; register {path} under another name")
            if taken is not None and f"{taken.__module__}:{taken.__qualname__}" != path:
                raise ValueError(f"{cls.family} {name!r} is registered already, by {taken.__module__}")
            cls._members[name] = member
            setattr(member, "kind", name)  # noqa: B010  a class variable of any class
            return member

        return decorate

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of all members: those that come with calm, then those registered from outside."""
        provided = PROVIDED.get(cls.family, {})
        return (*provided, *(name for name in cls._members if name not in provided))

    @classmethod
    def member(cls, name: str) -> Any:
        """The member of a name; its module is imported if need be.

        Names of classes are understood as well, since configuration files before schema 2 held them.

        Raises:
            UsageError: no member has that name.
        """
        provided = PROVIDED.get(cls.family, {})
        if name not in provided and name not in cls._members:
            named = {place.split(":")[1]: known for known, place in provided.items()}
            if name not in named:
                options = cls.names()
                raise UsageError(
                    f"expected one of {', '.join(map(repr, options))}, got {name!r}{suggestion(str(name), options)}"
                )
            name = named[name]
        if name not in cls._members:
            module, _, attribute = provided[name].partition(":")
            found = getattr(importlib.import_module(module), attribute)
            if cls._members.get(name) is not found:
                raise RuntimeError(f"{provided[name]} does not register as {cls.family} {name!r}")
        return cls._members[name]
