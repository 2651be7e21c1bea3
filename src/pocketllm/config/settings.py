"""Settings by dotted key: listed with type, default and help, parsed from text, and applied to a configuration.

The dataclasses are their only definition: fields give keys and types, docstrings give the help.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pocketllm.errors import ConfigError

Config = TypeVar("Config")
_SCALARS = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Setting:
    """A setting that can be given as text.

    key: dotted, for example `codec.hidden`. kind: type of the value, in words. default: the default value.
    """

    key: str
    kind: str
    default: Any
    help: str
    parse: Callable[[str], Any] = dataclasses.field(repr=False, compare=False)


def settings_of(config: Any, prefix: str = "") -> dict[str, Setting]:
    """Every setting of a configuration (a dataclass), including nested ones, by key.

    Fields that cannot be given as text, such as pairs, are left out. If a nested configuration is None, its
    defaults are listed.
    """
    helps, types_of = help_of(type(config)), get_type_hints(type(config))
    found: dict[str, Setting] = {}
    for field in dataclasses.fields(config):
        key, value = prefix + field.name, getattr(config, field.name)
        nested: list[Any] = [one for one in _members(types_of[field.name]) if dataclasses.is_dataclass(one)]
        if nested:
            found |= settings_of(nested[0]() if value is None else value, f"{key}.")
            continue
        kind = _kind(types_of[field.name])
        if kind is not None:
            parse = _parser(key, kind, _members(types_of[field.name]))
            found[key] = Setting(key, kind, value, helps.get(field.name, ""), parse)
    return found


def help_of(config: type) -> dict[str, str]:
    """The help on each field, from the lines `name: help` of a docstring and their continuations."""
    found: dict[str, str] = {}
    names = {field.name for field in dataclasses.fields(config)}
    last = None
    for line in inspect.cleandoc(config.__doc__ or "").splitlines():
        entry = re.match(r"(\w+): (.+)", line)
        if entry and entry[1] in names:
            last = entry[1]
            found[last] = entry[2]
        elif last and line.startswith("    "):
            found[last] += f" {line.strip()}"
        else:
            last = None
    return found


def parse_settings(given: Iterable[str], known: Mapping[str, Setting], listing: str = "") -> dict[str, Any]:
    """Values by key from `KEY=VALUE` words; if a key is repeated, the last value counts.

    Args:
        listing: the command that lists the keys, for the error.

    Raises:
        ConfigError: not of that form, an unknown key (names the closest ones), or a value of another type.
    """
    found = {}
    for word in given:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"--set: got {word!r}, wanted KEY=VALUE{_hint(known, listing)}")
        if key not in known:
            closest = ", ".join(closest_keys(key, known)) or "none"
            raise ConfigError(f"--set: unknown key {key!r}; closest: {closest}{_hint({}, listing)}")
        found[key] = known[key].parse(text)
    return found


def _hint(known: Mapping[str, Setting], listing: str) -> str:
    example = next(iter(known.values()), None)
    shown = f", as {example.key}={text_of(example.default)}" if example else ""
    return f"{shown}; {listing!r} lists all keys" if listing else shown


def closest_keys(key: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The known keys most similar to a wrong one: those that end in its name, then those spelled like it."""
    keys, name = list(known), key.rpartition(".")[2]
    names = difflib.get_close_matches(name, {one.rpartition(".")[2] for one in keys}, n=most)
    found = [one for wanted in names for one in keys if one.rpartition(".")[2] == wanted]
    found += difflib.get_close_matches(key, keys, n=most)
    return list(dict.fromkeys(found))[:most]


def replaced(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with other values, by dotted key.

    Raises:
        ConfigError: as the configuration raises; names a nested setting by its dotted key.
    """
    own = {key: value for key, value in values.items() if "." not in key}
    parts: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        part, dot, rest = key.partition(".")
        if dot:
            parts.setdefault(part, {})[rest] = value
    for part, inside in parts.items():
        try:
            own[part] = replaced(own.get(part, getattr(config, part)), inside)
        except ConfigError as error:
            raise ConfigError(f"{part}.{error}") from error
    return dataclasses.replace(config, **own)  # type: ignore[type-var]


def refuse_options(given: Iterable[str], options: Mapping[str, str]) -> None:
    """Raises ConfigError if a key is given whose setting has its own option."""
    for key in given:
        if key in options:
            raise ConfigError(f"--set {key}: use the option {options[key]}")


def text_of(value: Any) -> str:
    """A value as the text of `KEY=VALUE`: the inverse of parsing."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the type itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _kind(annotation: Any) -> str | None:
    """A type in words; None if it cannot be given as text."""
    members = _members(annotation)
    words = []
    for member in members:
        if member is types.NoneType:
            words.append("none")
        elif member in _SCALARS:
            words.append(_SCALARS[member])
        elif get_args(member) == (str, ...):
            words.append("names, separated by commas")
        else:
            return None
    return " or ".join(words)


def _parser(key: str, kind: str, members: tuple[Any, ...]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if types.NoneType in members and text.lower() == "none":
            return None
        wanted = members[0]
        try:
            if wanted is bool:
                return {"true": True, "false": False}[text.lower()]
            if wanted in (int, float):
                return wanted(text)
        except (KeyError, ValueError):
            raise ConfigError(f"{key}: got {text!r}, wanted {kind}") from None
        if wanted is str:
            return text
        return tuple(name for name in (part.strip() for part in text.split(",")) if name)

    return parse
