"""The paper's claims, each as a command that measures it and says whether it held."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pocketllm.lazy import exports

if TYPE_CHECKING:
    from pocketllm.studies.registry import STUDIES, load
    from pocketllm.studies.run import Outcome, dry_run, run_study
    from pocketllm.studies.study import Setup, Step, Study, Table

__all__ = ["STUDIES", "Outcome", "Setup", "Step", "Study", "Table", "dry_run", "load", "run_study"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = exports(
        __name__,
        {
            ".registry": ["STUDIES", "load"],
            ".run": ["Outcome", "dry_run", "run_study"],
            ".study": ["Setup", "Step", "Study", "Table"],
        },
    )
