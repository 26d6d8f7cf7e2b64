"""A world from its name and settings in words: "markov", "markov:words=128,seed=3"."""

import inspect
from collections.abc import Callable

from calm.config import parse_human_float, parse_human_int
from calm.errors import UsageError
from calm.worlds.finite_state import MarkovWorld
from calm.worlds.grammar import GrammarWorld
from calm.worlds.key_value import KeyValueWorld
from calm.worlds.world import World

WORLDS: dict[str, Callable[..., World]] = {"markov": MarkovWorld, "grammar": GrammarWorld, "key-value": KeyValueWorld}

TEXT_SETTINGS = ("tokens", "draw")
"""settings of a source that are about its text and not about the language"""


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Splits a spec: "markov:words=128,seed=3" -> ("markov", {"words": "128", "seed": "3"}).

    Raises UsageError: there is no such world, or a setting is not KEY=VALUE.
    """
    name, _, settings = spec.partition(":")
    if name not in WORLDS:
        raise UsageError(f"world {name!r}: there is none of that name; choose {', '.join(WORLDS)}")
    pairs = [pair.partition("=") for pair in settings.split(",") if pair]
    if not all(key and sign and value for key, sign, value in pairs):
        raise UsageError(f"world {spec}: settings are written as {name}:KEY=VALUE,KEY=VALUE")
    return name, {key: value for key, _, value in pairs}


def world_of(source: str) -> World | None:
    """Language of a source such as "world:markov:words=128,tokens=5M"; None for a source of another kind."""
    if not source.startswith("world:"):
        return None
    name, settings = split_spec(source.removeprefix("world:"))
    return build_world(name, **{key: value for key, value in settings.items() if key not in TEXT_SETTINGS})


def build_world(name: str, **settings: str | int | float) -> World:
    """Builds the world called `name` with settings that are numbers or their text (30k, 2M).

    Raises UsageError: there is no such world or setting, or a value is out of its range; the message names it.
    """
    if name not in WORLDS:
        raise UsageError(f"world {name!r}: there is none of that name; choose {', '.join(WORLDS)}")
    known = inspect.signature(WORLDS[name]).parameters
    values = {}
    for key, value in settings.items():
        if key not in known:
            raise UsageError(f"world {name}: unknown setting {key!r}; it has {', '.join(known)}")
        read = parse_human_int if isinstance(known[key].default, int) else parse_human_float
        try:
            values[key] = read(value) if isinstance(value, str) else value
        except UsageError as error:
            raise UsageError(f"world {name}: {key}: {error}") from error
    return WORLDS[name](**values)
