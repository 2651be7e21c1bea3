"""The format of numbers, differences and spreads on pages and in tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pocketllm.studies.measure.significance import CONFIDENCE, Difference, mean, spread


def number(value: float | None, digits: int = 3) -> str:
    """A number with this many digits, without an exponent if possible; `not finite` for None, infinities and NaN."""
    from pocketllm.report import short

    return "not finite" if value is None or not math.isfinite(value) else short(value, digits)


def with_error(found: Difference, digits: int = 3) -> str:
    """`value ± standard error`, or only the value if the error is unknown or the value not finite."""
    known = found.known and math.isfinite(found.value)
    return number(found.value, digits) + (f" ± {number(found.error, 2)}" if known else "")


def mean_spread(values: Sequence[float | None], digits: int = 3) -> str:
    """`mean ± standard deviation`, a single value alone; says how many were not finite."""
    known = [v for v in values if v is not None]
    lost = len(values) - len(known)
    words = number(mean(known), digits) if known else "not finite"
    words += f" ± {number(spread(known), 2)}" if len(known) > 1 else ""
    return f"{words} ({lost} not finite)" if lost and known else words


def noise(found: Difference) -> str:
    """`beyond noise (± 0.1 at 95 %)`, `within …`, or that the noise is not known."""
    if not found.known:
        return "of one measurement each, so that noise is not known"
    where = "beyond" if found.clear else "within"
    return f"{where} noise (± {number(found.margin, 2)} at {100 * CONFIDENCE:.0f} %)"


def compared(found: Difference, more: str = "higher", less: str = "lower") -> str:
    """`0.1 higher, beyond noise (± 0.05 at 95 %)`."""
    return f"{number(abs(found.value), 2)} {more if found.value > 0 else less}, {noise(found)}"
