"""What every benchmark shares: where data lies, the machine's facts, how results are written."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Subject:
    """A model that figures are reported on.

    name: of the `builtin:` model. title: in tables. windows: of WikiText-2's raw test text, CONTEXT tokens each.
    """

    name: str
    title: str
    windows: int

    @property
    def source(self) -> str:
        """What `pocketllm.compress` takes."""
        return f"builtin:{self.name}"

    def results(self, kind: str) -> str:
        """Name of the results of one kind of measurement: those of the first model have no suffix."""
        return kind if self is SMOLLM2 else f"{kind}_{self.name}"


CONTEXT = 1024
SMOLLM2 = Subject("smollm2-135m", "SmolLM2-135M", 16)
GEMMA = Subject("gemma-3-270m", "Gemma 3 270M", 6)
SUBJECTS = {subject.name: subject for subject in (SMOLLM2, GEMMA)}


def data_file(*parts: str) -> Path:
    """A file under the folder that POCKETLLM_DATA names; ends the program with a hint if it is not there."""
    root = os.environ.get("POCKETLLM_DATA")
    path = Path(root, *parts) if root else None
    if path is None or not path.is_file():
        sys.exit(f"set POCKETLLM_DATA to a folder that holds {'/'.join(parts)}")
    return path


def quiet() -> None:
    """No bars and notes of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def rows_to_measure(doc: str, name: str, key: str, known: Iterable[str]) -> tuple[list[str], dict[str, Any]]:
    """Rows that the command line names, by default those without a result, and the results that there are.

    Args:
        doc: of the program. name, key: where results/NAME.json keeps rows. known: all names.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    chosen, path = parser.parse_args().names, RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))[key] if path.is_file() else {}
    if unknown := sorted(set(chosen) - set(known)):
        sys.exit(f"{unknown[0]}: no such row; known: {', '.join(known)}")
    return chosen or [row for row in known if row not in found], found


def save(name: str, command: str, values: dict[str, Any], device: str = "cpu") -> None:
    """Write results/NAME.json."""
    from pocketllm.machine import machine

    RESULTS.mkdir(exist_ok=True)
    body = {"command": command, "machine": machine(device), **values}
    (RESULTS / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
