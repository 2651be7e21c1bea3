"""The paper's claims, each as a command that measures it and says whether it held."""

from __future__ import annotations

from pocketllm.studies.registry import STUDIES, load
from pocketllm.studies.run import Outcome, dry_run, run_study
from pocketllm.studies.study import Setup, Step, Study, Table

__all__ = ["STUDIES", "Outcome", "Setup", "Step", "Study", "Table", "dry_run", "load", "run_study"]
