"""Columns of tables as data: what a column takes from an entry, and how it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pocketllm.studies.show.numbers import mean_spread, number

Cell = Callable[[Any], str]
"""The cell of an entry: of a results mapping, or of a tuple of them."""
Columns = Mapping[str, Cell]
"""Heading -> cell."""


def text(key: Any) -> Cell:
    """The value as it is."""
    return lambda entry: str(entry[key])


def figure(key: Any, digits: int = 3, times: float = 1) -> Cell:
    """So many significant digits, in a unit of its own; `not finite` for None."""
    return lambda entry: number(None if entry[key] is None else times * entry[key], digits)


def fixed(key: Any, places: int = 2) -> Cell:
    """So many decimal places."""
    return lambda entry: f"{entry[key]:.{places}f}"


def seeds(key: Any, digits: int = 3) -> Cell:
    """Mean ± standard deviation over the seeds."""
    return lambda entry: mean_spread(entry[key], digits)


def on(key: Any, columns: Columns) -> dict[str, Cell]:
    """The same columns, of a part of the entry."""

    def of_part(cell: Cell) -> Cell:
        return lambda entry: cell(entry[key])

    return {heading: of_part(cell) for heading, cell in columns.items()}
