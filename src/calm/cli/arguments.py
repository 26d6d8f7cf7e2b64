"""From the words of a command line to a verb's dataclass: tyro, over files, over a preset.

    precedence      dataclass defaults < preset < files in order < command line

A verb that trains holds a configuration in a field and names it in the class attribute `configuration`; files and presets
(`from_preset(name)`) then fill that field, and its options need no prefix (`--model.dim 256`). For every other verb files
fill the verb's own fields. `--model.head.kind flow` chooses another member of a family (`calm.registry`). Human numbers
(30k, 2M) are read everywhere, `none` is None, and a bad option ends in one line.
"""

import contextlib
import dataclasses
import inspect
import io
import re
from collections.abc import Sequence
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from calm import config
from calm.errors import UsageError

_BOX = "╭╮╰╯│─┌┐└┘|"


def parse(cls: Any, arguments: Sequence[str], *, prog: str, epilogue: str = "") -> Any:
    """The verb `cls` that these words describe, or None when they asked for help (which is then printed)."""
    rest = list(arguments)
    files = _take(rest, "--config")
    presets = _take(rest, "--preset")
    rest = [word for word in rest if word not in ("--json", "-v", "--verbose")]
    default = _default(cls, presets[-1] if presets else None, files, prog)
    _choose_kinds(default, rest)
    late = _of_missing_entries(default, rest)
    told = dict(prog=prog, description=f"{inspect.getdoc(cls) or ''}\n\n{epilogue}")
    verb = _parsed(cls, rest, default, **told)
    if late and verb is not None:  # the entries are there now, or can be added to what the other options say
        _add_entries(verb, late)
        verb = _parsed(cls, late, verb, **told)
    return verb


def _parsed(cls: Any, words: Sequence[str], default: Any, *, prog: str, description: str) -> Any:
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            return tyro.cli(
                cls,
                prog=prog,
                args=words,
                default=default,
                description=description,
                registry=_REGISTRY,
                config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff),
            )
    except SystemExit as stop:
        if not stop.code:
            return None
        raise UsageError(_one_line(heard.getvalue())) from None
    except UsageError:
        raise
    except ValueError as error:  # raised by a dataclass's own checks, after its words were parsed
        raise UsageError(str(error)) from error


def _default(cls: Any, preset: str | None, files: list[str], prog: str) -> Any:
    """Default that tyro takes for the options that the command line leaves out."""
    field = getattr(cls, "configuration", None)
    if preset is not None and field is None:
        raise UsageError(f"{prog} takes no --preset")
    values: dict[str, Any] = {}
    if field is None:
        for file in files:
            values |= config.field_values(cls, config.read_toml(file), file)
    elif files or preset is not None:
        below = cls.from_preset(preset) if preset is not None else _default_of(cls, field)
        values[field] = config.load(type(below), files, below)
    # Not cls(...): a field without a default may still come from the command line, so the object is not whole yet.
    default = object.__new__(cls)
    for item in dataclasses.fields(cls):
        value = values[item.name] if item.name in values else _default_of(cls, item.name)
        object.__setattr__(default, item.name, value)
    return default


def _choose_kinds(default: Any, words: list[str]) -> None:
    """Takes `--model.head.kind flow` out of the words and puts that member's defaults in the place of the present ones."""
    field = getattr(type(default), "configuration", None)
    if field is None:
        return
    for option in [word.partition("=")[0] for word in words if word.startswith("--")]:
        path, _, last = option[2:].replace("-", "_").rpartition(".")
        if path and last == config.KIND:
            chosen = config.with_kind(getattr(default, field), path, _take(words, option)[-1])
            object.__setattr__(default, field, chosen)


def _of_missing_entries(default: Any, words: list[str]) -> list[str]:
    """Takes out options, with their values, of entries that are not there yet, such as `--loss.terms.anchor.weight`."""
    field = getattr(type(default), "configuration", None)
    if field is None:
        return []
    late, rest, to = [], [], None
    for word in words:
        if word.startswith("--"):
            path = word[2:].partition("=")[0].replace("-", "_").split(".")
            to = late if _missing_entry(getattr(default, field), path) else rest
        (rest if to is None else to).append(word)
    words[:] = rest
    return late


def _add_entries(verb: Any, words: Sequence[str]) -> None:
    """Adds the entries that these options are about, with their defaults."""
    settings = getattr(verb, verb.configuration)
    for word in words:
        if word.startswith("--"):
            missing = _missing_entry(settings, word[2:].partition("=")[0].replace("-", "_").split("."))
            if missing:
                settings = config.with_kind(settings, ".".join(missing), missing[-1])
    object.__setattr__(verb, verb.configuration, settings)


def _missing_entry(settings: Any, path: Sequence[str]) -> Sequence[str] | None:
    """The front part of a path that names an entry which its table does not hold."""
    value = settings
    for depth, name in enumerate(path[:-1]):
        if isinstance(value, config.FrozenDict):
            if name not in value:
                return path[: depth + 1]
            value = value[name]
        elif not hasattr(value, name):
            return None
        else:
            value = getattr(value, name)
    return None


def _default_of(cls: Any, name: str) -> Any:
    (field,) = (item for item in dataclasses.fields(cls) if item.name == name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return tyro.MISSING if field.default is dataclasses.MISSING else field.default


def _take(words: list[str], option: str) -> list[str]:
    """Removes `option VALUE` and `option=VALUE` from `words`; returns the values in order."""
    values = []
    position = 0
    while position < len(words):
        if words[position] == option:
            if position + 1 == len(words) or words[position + 1].startswith("--"):
                raise UsageError(f"{option} needs a value")
            values.append(words[position + 1])
            del words[position : position + 2]
        elif words[position].startswith(option + "="):
            values.append(words.pop(position).split("=", 1)[1])
        else:
            position += 1
    return values


def _one_line(box: str) -> str:
    """tyro's boxed message (drawn with lines or in ASCII) as one line: what is wrong, and the option that it suggests."""
    lines = [line.strip(_BOX + " ") for line in box.splitlines()[1:]]  # the first holds only a title
    blocks = "\n".join(line if line.strip("-+") else "" for line in lines).split("\n\n")
    first, *others = [" ".join(block.split()) for block in blocks if block.strip()] or ["bad arguments"]
    meant = re.search(r"Perhaps you meant: *(--[\w.\-]+)", " ".join(others))
    return first + (f" (did you mean {meant[1]!r}?)" if meant else "")


# -- how single words are read ----------------------------------------------------------------------------------------

_REGISTRY = ConstructorRegistry()
_NUMBERS = {int: (config.parse_human_int, "INT"), float: (config.parse_human_float, "FLOAT")}


def _number(kind: Any, read: Any, metavar: str) -> PrimitiveConstructorSpec[Any]:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: isinstance(value, kind | int) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


@_REGISTRY.primitive_rule
def _human_numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    return _number(info.type, *_NUMBERS[info.type]) if info.type in (int, float) else None


@_REGISTRY.primitive_rule
def _none(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if info.type is not type(None):
        return None

    def read(words: list[str]) -> None:
        if words[0] not in (config.NONE, "None"):
            raise ValueError(f"expected {config.NONE}, got {words[0]!r}")

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=config.NONE,
        instance_from_str=read,
        is_instance=lambda value: value is None,
        str_from_instance=lambda value: [config.NONE],
    )
