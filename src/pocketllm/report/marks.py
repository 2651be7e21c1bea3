"""What is drawn, as data: calls of matplotlib's axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any


@dataclass(frozen=True)
class Mark:
    """A call of a method of matplotlib's axes, with its positional and named arguments. Provisional.

    method: `plot`, `barh`, `axhline`, `xaxis.set_major_formatter` …
    """

    method: str
    values: tuple[Any, ...]
    style: Mapping[str, Any]

    def draw(self, axes: Any) -> None:
        attrgetter(self.method)(axes)(*self.values, **self.style)


def mark(method: str, *values: Any, **style: Any) -> Mark:
    """A `Mark` as it would be called. Provisional."""
    return Mark(method, values, style)
