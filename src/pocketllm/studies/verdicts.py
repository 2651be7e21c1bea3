"""The verdicts on a claim, and the rules by which measured numbers decide them."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from pocketllm.studies.measure.significance import Difference


class Verdict(StrEnum):
    """What the numbers say of a claim. NOT_SEEN: noise hides whether it holds."""

    HELD = "held"
    IN_PART = "held in part"
    NOT_SEEN = "not seen"
    FAILED = "did not hold"


def holds(condition: bool) -> Verdict:
    """The verdict on a claim that can be checked exactly, without noise."""
    return Verdict.HELD if condition else Verdict.FAILED


def above_zero(found: Difference | None) -> Verdict:
    """The verdict on the claim that a difference is above zero; None is a difference that was not measured."""
    if found is None or not found.clear:
        return Verdict.NOT_SEEN
    return holds(found.value > 0)


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on a claim from the verdicts on its parts, of which there is at least one."""
    found = set(verdicts)
    if len(found) == 1:
        return found.pop()
    return Verdict.IN_PART if found & {Verdict.HELD, Verdict.IN_PART} else Verdict.FAILED
