"""What may be said of a difference between measured numbers: nothing where noise alone would make it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pocketllm.evaluate import standard_error
from pocketllm.studies.style import mean, number, spread

CERTAIN = 2.0
"""A difference of no more standard errors than this is none."""


@dataclass(frozen=True)
class Difference:
    """One number less another. error: the standard error of that; infinite where it is not known."""

    value: float
    error: float

    @property
    def clear(self) -> bool:
        return abs(self.value) > CERTAIN * self.error

    @property
    def verdict(self) -> str:
        """`more than two standard errors (0.1)`, `within …`, or that nothing is known of noise."""
        if math.isinf(self.error):
            return "of unknown standard error"
        return f"{'more than' if self.clear else 'within'} two standard errors ({number(CERTAIN * self.error, 2)})"


def between(values: Sequence[float | None], others: Sequence[float | None]) -> Difference | None:
    """Mean of the values less mean of the others, each from several seeds; None where one was not finite."""
    a, b = mean(values), mean(others)
    if a is None or b is None:
        return None
    if min(len(values), len(others)) < 2:
        return Difference(a - b, math.inf)
    errors = [(spread(each) or 0.0) / math.sqrt(len(each)) for each in (values, others)]
    return Difference(a - b, math.hypot(*errors))


def paired(values: Sequence[float], others: Sequence[float]) -> Difference:
    """Mean of the values less mean of the others, measured on the same documents or windows, one by one."""
    found = [a - b for a, b in zip(values, others, strict=True)]
    error = standard_error(found)
    return Difference(sum(found) / len(found), math.inf if error is None else error)


def apart(value: float, error: float | None, other: float, other_error: float | None) -> Difference:
    """The difference of two numbers whose standard errors are known.

    Taken as independent; measured on the same text they scatter together, and the difference less.
    """
    if error is None or other_error is None:
        return Difference(value - other, math.inf)
    return Difference(value - other, math.hypot(error, other_error))
