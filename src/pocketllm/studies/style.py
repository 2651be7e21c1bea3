"""Colours, numbers and axes that the pictures and tables of the studies share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

INK, GREY = "#1b1c20", "#c6cad2"
# Okabe and Ito's, which dichromats tell apart, and two more; markers and dashes say the same again.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK, "#8c510a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (7, 2, 1, 2)), (0, (3, 3)))


def look(number: int) -> dict[str, Any]:
    """Colour, marker and dash of the series of that number, for `axes.plot`."""
    n = number % len(COLOURS)
    return {"color": COLOURS[n], "marker": MARKERS[n], "linestyle": DASHES[n], "markersize": 4.5}


def plain_ticks(axis: Any, minor: bool = False) -> None:
    """Numbers on a logarithmic axis as people write them: 0.01, 4096, 10⁻⁸."""
    axis.set_major_formatter(lambda value, _: _plain(value))
    axis.set_minor_formatter(lambda value, _: _plain(value) if minor else "")


def _plain(value: float) -> str:
    power = round(math.log10(value)) if value > 0 else 0
    if value > 0 and not -4 < power < 5 and math.isclose(value, 10.0**power, rel_tol=1e-6):
        return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value:.5g}"


def number(value: float | None, digits: int = 3) -> str:
    """So many digits, without an exponent where it can be; `not finite` for None and what is no number."""
    from pocketllm.report import short

    return "not finite" if value is None or not math.isfinite(value) else short(value, digits)


def with_error(value: float, error: float, digits: int = 3) -> str:
    """`value ± standard error`, the value alone where that is infinite."""
    return number(value, digits) + ("" if math.isinf(error) else f" ± {number(error, 2)}")


def mean(values: Sequence[float | None]) -> float | None:
    """None where one of them is."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def spread(values: Sequence[float | None]) -> float | None:
    """Standard deviation of a sample (n - 1); None where a value is None, 0 for a single one."""
    middle = mean(values)
    if middle is None:
        return None
    squares = sum((v - middle) ** 2 for v in values if v is not None)
    return math.sqrt(squares / max(1, len(values) - 1))


def mean_spread(values: Sequence[float | None], digits: int = 3) -> str:
    """`mean ± standard deviation`, a single value alone; says how many were not finite."""
    known = [v for v in values if v is not None]
    lost = len(values) - len(known)
    words = number(mean(known), digits) if known else "not finite"
    words += f" ± {number(spread(known), 2)}" if len(known) > 1 else ""
    return f"{words} ({lost} not finite)" if lost and known else words


def dots(axes: Any, place: float, values: Sequence[float | None], series: int, **more: Any) -> None:
    """Mean and standard deviation at a place; nothing where a value is None."""
    middle = mean(values)
    if middle is not None:
        style = {key: value for key, value in look(series).items() if key != "linestyle"}
        axes.errorbar([place], [middle], [spread(values)], linestyle="none", capsize=3, **style, **more)
