"""Means, spreads, and differences of measured numbers with their uncertainty, by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pocketllm.evaluate import standard_error

CONFIDENCE = 0.95
"""The confidence level of intervals: by chance, a share of 1 - CONFIDENCE of null differences lies outside."""
_QUANTILES = {  # of Student's t at (1 + CONFIDENCE) / 2, by degrees of freedom
    **{1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262},
    **{10: 2.228, 12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980},
}


@dataclass(frozen=True)
class Difference:
    """A difference of two numbers, or a number. error: its standard error; infinite if unknown.

    freedom: degrees of freedom of the error.
    """

    value: float
    error: float
    freedom: float = math.inf

    @property
    def margin(self) -> float:
        """Half the width of the interval that holds the true difference with `CONFIDENCE`."""
        return _quantile(self.freedom) * self.error

    @property
    def known(self) -> bool:
        """Whether there is more than one measurement, so that its noise is known."""
        return not math.isinf(self.error)

    @property
    def clear(self) -> bool:
        """Whether it is significant; never if the error is unknown."""
        return abs(self.value) > self.margin

    def times(self, factor: float) -> Difference:
        """In another unit."""
        return replace(self, value=factor * self.value, error=abs(factor) * self.error)


def mean(values: Sequence[float | None]) -> float | None:
    """None if any of them is."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def spread(values: Sequence[float | None]) -> float | None:
    """Standard deviation of a sample (n - 1); None where a value is None, 0 for a single one."""
    middle = mean(values)
    if middle is None:
        return None
    squares = sum((v - middle) ** 2 for v in values if v is not None)
    return math.sqrt(squares / max(1, len(values) - 1))


def measured(value: float | None, error: float | None, freedom: float = math.inf) -> Difference:
    """A number with its standard error; None if it is not finite or unknown."""
    return Difference(math.nan if value is None else value, math.inf if error is None else error, freedom)


def paired(values: Sequence[float], others: Sequence[float]) -> Difference:
    """Mean of the values less mean of the others, one by one: of the same seeds, documents or windows."""
    found = [a - b for a, b in zip(values, others, strict=True)]
    error = standard_error(found)
    return Difference(sum(found) / len(found), math.inf if error is None else error, len(found) - 1)


def by_seed(values: Sequence[float | None], others: Sequence[float | None]) -> Difference | None:
    """`paired` for trainings from the same seeds; None where one of them did not end in a number."""
    known = [value for value in values if value is not None]
    other = [value for value in others if value is not None]
    return paired(known, other) if len(known) == len(values) and len(other) == len(others) else None


def _quantile(freedom: float) -> float:
    """The quantile of Student's t; the nearest lower degrees of freedom of the table, which errs towards noise."""
    below = [count for count in _QUANTILES if count <= freedom]
    return _QUANTILES[max(below)] if below else math.inf
