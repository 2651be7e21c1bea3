"""Progress of long work, as callbacks get it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """Progress: stage, its finished share, and the current item.

    Stages of a compression: `fetch`, `check`, `measure`, `fit`, `encode`, `write`; of recovery: `teacher`, `train`; of
    a merge: `perplexity`, `merge`.
    """

    stage: str
    share: float
    detail: str


ProgressCallback = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Show no progress."""


def tell(progress: ProgressCallback, stage: str, share: float, detail: str) -> None:
    """Call back with an event."""
    progress(Event(stage, share, detail))
