"""Configurations: frozen keyword-only dataclasses, and the TOML file layer over them.

A file names only what differs from the default below it, so files stack: dataclass defaults, then a preset, then each
file in turn, then the command line. Decoding is strict: a key that no dataclass has, or a value of another type, is a
`UsageError` that names the file and the dotted key and suggests the nearest right one. `to_toml` writes every field,
and what it writes alone reproduces the object: `load(type(x), [file]) == x`.

    TOML has no null        None is written "none"
    members of a family     the table carries `kind = "name"` (`calm.registry`); in a table of members whose key is their
                            kind, it is left out
    human numbers           "30k", "2M", "15B" (thousands) and "64Ki" (1024s) are read as an int or a float
    tables of members       an entry that a file names is added to those below it, and "none" takes one out; a file with a
                            schema_version, as `to_toml` writes it, holds the whole table
    schema_version          2; version 1 is read by way of the class's `from_schema_1`, where it has one

Nothing here imports jax.
"""

import dataclasses
import math
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import tomli_w

from calm.errors import UsageError
from calm.registry import Registered
from calm.registry import suggestion as suggestion

SCHEMA_VERSION = 2
NONE = "none"
KIND = "kind"

Config = TypeVar("Config")

_SUFFIXES = {"": 1, "k": 10**3, "K": 10**3, "m": 10**6, "M": 10**6, "g": 10**9, "G": 10**9, "b": 10**9, "B": 10**9}
_SUFFIXES |= {"t": 10**12, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_HUMAN_NUMBER = re.compile(r"([+-]?[\d_]*\.?\d[\d_]*(?:[eE][+-]?\d+)?)(Ki|Mi|Gi|[kKmMgGbBtT]?)")


class FrozenDict(dict[str, Any]):
    """A dictionary that a frozen configuration can hold: hashable, and not meant to be changed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


# -- words ------------------------------------------------------------------------------------------------------------


def parse_human_float(text: str) -> float:
    """A number with an optional thousands suffix: "1.5M" -> 1500000.0. Other text is a `UsageError`."""
    match = _HUMAN_NUMBER.fullmatch(text.strip())
    if match is None:
        special = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
        if text.strip() in special:
            return special[text.strip()]
        raise UsageError(f"expected a number such as 0.1, 30k or 2M, got {text!r}")
    return float(match[1].replace("_", "")) * _SUFFIXES[match[2]]


def parse_human_int(text: str) -> int:
    """A whole number with an optional suffix: "30k" -> 30000, "2M", "64Ki" -> 65536. Other text is a `UsageError`."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = parse_human_float(text)
    except UsageError:
        value = math.nan
    if not math.isfinite(value) or not value.is_integer():
        raise UsageError(f"expected a whole number such as 300, 30k or 2M, got {text!r}")
    return int(value)


# -- files and text ---------------------------------------------------------------------------------------------------


def load(cls: type[Config], files: Sequence[str | Path], default: Config | None = None) -> Config:
    """Reads TOML files in order, each over the one before, all over `default` (else the dataclass's own defaults)."""
    mappings = [(str(file), read_toml(file)) for file in files]
    if default is None and _required(cls):  # no single file need be complete: merge first, then decode once
        merged: dict[str, Any] = {}
        for _, mapping in mappings:
            merged = _merge(merged, mapping)
        return from_dict(cls, merged, where=", ".join(name for name, _ in mappings) or "configuration")
    current = cls() if default is None else default
    for name, mapping in mappings:
        current = from_dict(cls, mapping, current, where=name)
    return current


def read_toml(file: str | Path) -> dict[str, Any]:
    """The table of a TOML file; a missing, binary or malformed file is a `UsageError` that names it."""
    path = Path(file)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such configuration file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as a TOML text file ({error})") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from error


def to_toml(obj: object) -> str:
    """Every field of a configuration as TOML that alone reproduces it."""
    return tomli_w.dumps({"schema_version": SCHEMA_VERSION, **to_dict(obj)})


def to_dict(obj: object) -> dict[str, Any]:
    """Every field as plain str, int, float, bool, list and dict: what TOML and JSON can hold."""
    if not dataclasses.is_dataclass(obj) or isinstance(obj, type):
        raise TypeError(f"expected a dataclass object, got {obj!r}")
    kind = {KIND: obj.kind} if isinstance(obj, Registered) and obj.kind else {}
    return kind | _fields_to_dict(obj)


def _fields_to_dict(obj: Any) -> dict[str, Any]:
    hints = get_type_hints(type(obj), include_extras=True)
    return {field.name: _encode(hints[field.name], getattr(obj, field.name)) for field in dataclasses.fields(obj) if field.init}


def from_dict(
    cls: type[Config], mapping: Mapping[str, Any], default: Config | None = None, where: str = "configuration"
) -> Config:
    """A `cls` from plain values, over `default` where the mapping is silent.

    Args:
        mapping: what `to_dict` gives, or any part of it; an unknown key is a `UsageError` with a suggestion.
        default: the object whose fields fill the gaps. Without one the dataclass's defaults do; a gap in those is a
            `UsageError`.
        where: the file (or other source) that errors name.
    """
    return _decode_dataclass(cls, _current(cls, mapping, where), default, _Source.of(where, mapping), "")


def field_values(cls: type, mapping: Mapping[str, Any], where: str = "configuration") -> dict[str, Any]:
    """Decodes a part of the fields like `from_dict`: the decoded values of those that `mapping` names, and no object."""
    return _decode_fields(cls, _current(cls, mapping, where), None, _Source.of(where, mapping), "")


class _Source(str):
    """The name of what is decoded, for messages, and whether its tables of members are whole."""

    whole: bool = False

    @staticmethod
    def of(where: str, mapping: Mapping[str, Any]) -> "_Source":
        source = _Source(where)
        source.whole = "schema_version" in mapping
        return source


# -- decoding ---------------------------------------------------------------------------------------------------------


def _decode_dataclass(cls: type[Config], mapping: Any, default: Config | None, where: str, path: str) -> Config:
    if not isinstance(mapping, Mapping):
        raise _mismatch(where, path, f"a table of {cls.__name__}", mapping)
    if issubclass(cls, Registered):
        cls, mapping = _member(cls, mapping, default, where, path)
    if default is not None and type(default) is not cls:
        default = _in_common(cls, default)
    values = _decode_fields(cls, mapping, default, where, path)
    for field in dataclasses.fields(cast(Any, cls)):
        if field.name in values or not field.init:
            continue
        if hasattr(default, field.name):
            values[field.name] = getattr(default, field.name)
        elif _field_default(field) is dataclasses.MISSING:
            raise UsageError(f"{where}: key {_join(path, field.name)!r} is missing and has no default")
    try:
        return cls(**values)
    except ValueError as error:
        place = f"{where}: {path}" if path else where
        raise UsageError(f"{place}: {error}") from error


def _decode_fields(cls: type, mapping: Mapping[str, Any], default: Any, where: str, path: str) -> dict[str, Any]:
    """The decoded values of the fields that `mapping` names."""
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = get_type_hints(cls, include_extras=True)
    values = {}
    for key, value in mapping.items():
        if key not in fields:
            near = suggestion(_join(path, key), [_join(path, name) for name in fields])
            raise UsageError(f"{where}: unknown key {_join(path, key)!r}{near}")
        below = getattr(default, key) if hasattr(default, key) else _field_default(fields[key])
        values[key] = _decode(hints[key], value, below, where, _join(path, key))
    return values


def _decode(hint: Any, value: Any, default: Any, where: str, path: str, lenient: bool = True) -> Any:
    """One value of type `hint`. `lenient` reads human numbers from text; a union first tries its members without."""
    hint, origin = _unwrap(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _decode_union(get_args(hint), value, default, where, path)
    if _is_table(hint):
        return _decode_dataclass(cast(Any, hint), value, default, where, path)
    if origin is Literal:
        for option in get_args(hint):
            if value == option and type(value) is type(option):
                return option
        near = (
            suggestion(value, [option for option in get_args(hint) if isinstance(option, str)])
            if isinstance(value, str)
            else ""
        )
        raise UsageError(f"{where}: {path}: expected {_describe(hint)}, got {value!r}{near}")
    if origin in (tuple, list) and isinstance(value, list | tuple):
        return _decode_sequence(hint, origin, value, where, path)
    if origin is dict and isinstance(value, Mapping):
        return _decode_table(get_args(hint)[1], value, default, where, path)
    decoded = _decode_scalar(hint, value, where, path, lenient)
    if decoded is not dataclasses.MISSING:
        return decoded
    raise _mismatch(where, path, _describe(hint), value)


def _decode_scalar(hint: Any, value: Any, where: str, path: str, lenient: bool) -> Any:
    if hint is type(None) and (value is None or value == NONE):
        return None
    if hint in (bool, str) and type(value) is hint:
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint in (int, float) and isinstance(value, str) and lenient:
        try:
            return parse_human_int(value) if hint is int else parse_human_float(value)
        except UsageError as error:
            raise UsageError(f"{where}: {path}: {error}") from error
    if hint is int and isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1:
        return int(value) if lenient or isinstance(value, int) else dataclasses.MISSING
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return dataclasses.MISSING


def _decode_sequence(hint: Any, origin: Any, value: Sequence[Any], where: str, path: str) -> Any:
    of = get_args(hint)
    if origin is tuple and not (len(of) == 2 and of[1] is Ellipsis):
        if len(of) != len(value):
            raise UsageError(f"{where}: {path}: expected {len(of)} values, got {len(value)}")
        return tuple(
            _decode(item_hint, item, None, where, f"{path}[{i}]")
            for i, (item_hint, item) in enumerate(zip(of, value, strict=True))
        )
    return origin(_decode(of[0], item, None, where, f"{path}[{i}]") for i, item in enumerate(value))


def _decode_table(of: Any, value: Mapping[str, Any], default: Any, where: str, path: str) -> "FrozenDict":
    """A table with free keys. One of members of a family keeps entries that the file does not name; "none" drops one."""
    below = dict(default) if isinstance(default, Mapping) and not getattr(where, "whole", False) else {}
    family = _is_family(of)
    table = below.copy() if family else {}
    for key, item in value.items():
        if family and item == NONE:
            table.pop(key, None)
            continue
        if family and isinstance(item, Mapping) and key not in below:
            item = {KIND: key, **item}
        table[str(key)] = _decode(of, item, below.get(key), where, _join(path, str(key)))
    return FrozenDict(table)


def _member(cls: Any, mapping: Mapping[str, Any], default: Any, where: str, path: str) -> tuple[Any, Mapping[str, Any]]:
    """The member of a family that a table describes, and the table without its kind."""
    kind = mapping.get(KIND) or (default.kind if isinstance(default, cls) else cls.kind)
    if not kind:
        raise UsageError(f"{where}: key {_join(path, KIND)!r} is missing: one of {', '.join(map(repr, cls.names()))}")
    try:
        member = cls.member(kind)
    except UsageError as error:
        raise UsageError(f"{where}: {_join(path, KIND)}: {error}") from error
    if not issubclass(member, cls):
        raise UsageError(f"{where}: {_join(path, KIND)}: {kind!r} is no {cls.__name__}")
    return member, {key: item for key, item in mapping.items() if key != KIND}


def _in_common(cls: type, default: Any) -> Any:
    """The values of the fields that `cls` and the default of another class inherit from the same base."""
    bases = [base for base in cls.__mro__ if dataclasses.is_dataclass(base) and isinstance(default, base)]
    names = [field.name for field in dataclasses.fields(bases[0])] if bases else []
    return types.SimpleNamespace(**{name: getattr(default, name) for name in names})


def with_kind(root: Config, path: str, kind: str) -> Config:
    """`root` with another member of the family at a dotted path; fields that both inherit from one base keep their values.

    A path that ends in a key of a table of members adds that entry.

    Raises:
        UsageError: nothing at the path can be chosen by name, or there is no such name.
    """
    value: Any = {KIND: kind}
    for name in reversed(path.split(".")):
        value = {name: value}
    return from_dict(type(root), value, root, where=f"--{path}.{KIND}")


def _decode_union(members: tuple[Any, ...], value: Any, default: Any, where: str, path: str) -> Any:
    tables = [member for member in members if _is_table(member)]
    if isinstance(value, Mapping) and tables:
        if len(tables) > 1:
            raise TypeError(f"{path}: a configuration cannot choose between {tables}; make them a family (calm.registry)")
        return _decode_dataclass(tables[0], value, default, where, path)
    if value == NONE and type(None) in members:
        return None
    for lenient in (False, True):
        for member in members:
            try:
                return _decode(member, value, default, where, path, lenient)
            except UsageError:
                continue
    expected = " or ".join(_describe(member) for member in members)
    raise _mismatch(where, path, expected, value)


# -- encoding ---------------------------------------------------------------------------------------------------------


def _encode(hint: Any, value: Any) -> Any:
    hint, origin = _unwrap(hint)
    if value is None:
        return NONE
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        of = get_args(hint) if origin in (tuple, list) else ()
        ragged = origin is tuple and len(of) == len(value) and Ellipsis not in of
        return [_encode(of[i] if ragged else of[0] if of else Any, item) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        of = get_args(hint)[1] if origin is dict else Any
        table = {str(key): _encode(of, item) for key, item in value.items()}
        for key, item in value.items():
            if isinstance(item, Registered) and item.kind == key:
                del table[key][KIND]
        return table
    if isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a configuration cannot hold {value!r} of type {type(value).__name__}")


def _current(cls: Any, mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A file's table in the present schema, without its version."""
    rest = dict(mapping)
    version = rest.pop("schema_version", SCHEMA_VERSION)
    if version not in (1, SCHEMA_VERSION):
        raise UsageError(f"{where}: schema_version is {version!r}, and this version of calm reads 1 and {SCHEMA_VERSION}")
    return cls.from_schema_1(rest) if version == 1 and hasattr(cls, "from_schema_1") else rest


# -- small helpers ----------------------------------------------------------------------------------------------------


def _is_family(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Registered)


def _is_table(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) or _is_family(hint)


def _unwrap(hint: Any) -> tuple[Any, Any]:
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return hint, get_origin(hint)


def _field_default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _required(cls: type) -> bool:
    return any(
        field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        for field in dataclasses.fields(cls)
    )


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        same = isinstance(value, Mapping) and isinstance(below, Mapping) and value.get(KIND) in (None, below.get(KIND))
        merged[key] = _merge(cast(Any, below), value) if same else value
    return merged


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _mismatch(where: str, path: str, expected: str, value: Any) -> UsageError:
    return UsageError(f"{where}: {path or 'the file'}: expected {expected}, got {value!r}")


def _describe(hint: Any) -> str:
    hint, origin = _unwrap(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in get_args(hint))
    if origin in (tuple, list):
        return f"a list of {_describe(get_args(hint)[0])}s" if get_args(hint) else "a list"
    if origin is dict:
        return "a table"
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(member) for member in get_args(hint))
    if _is_table(hint):
        return f"a table of {hint.__name__}"
    words = {
        int: "int",
        float: "float",
        bool: "bool (true or false)",
        str: "str",
        Path: "path",
        type(None): f"{NONE!r}",
    }
    return words.get(hint, getattr(hint, "__name__", str(hint)))
