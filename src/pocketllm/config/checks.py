"""Checks of values, and settings in plain JSON types."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from pocketllm.errors import ConfigError


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ConfigError if a value is not one of those allowed."""
    if value not in allowed:
        raise ConfigError(f"{name}: got {value!r}, wanted one of {', '.join(allowed)}")


def at_least(name: str, value: float, least: float) -> None:
    """Raises ConfigError if a value is below `least` or not finite."""
    if not least <= value < math.inf:
        raise ConfigError(f"{name}: got {value}, wanted at least {least}")


def between(name: str, value: float, least: float, most: float) -> None:
    """Raises ConfigError if a value is below `least` or above `most`."""
    if not least <= value <= most:
        raise ConfigError(f"{name}: got {value}, wanted {least} to {most}")


def positive(name: str, value: float) -> None:
    """Raises ConfigError if a value is not above 0 or not finite."""
    if not 0 < value < math.inf:
        raise ConfigError(f"{name}: got {value}, wanted more than 0")


def plain(config: Any) -> dict[str, Any]:
    """A configuration in plain JSON types: no tuples."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one mapping with dotted keys: `{"loop": {"seed": 0}}` becomes `{"loop.seed": 0}`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found
