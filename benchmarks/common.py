"""What every benchmark shares: where data lies, the machine's facts, how results are written."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
RESULTS = Path(__file__).parent / "results"


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


def save(name: str, command: str, values: dict[str, Any], device: str = "cpu") -> None:
    """Write results/NAME.json."""
    from pocketllm.machine import machine

    RESULTS.mkdir(exist_ok=True)
    body = {"command": command, "machine": machine(device), **values}
    (RESULTS / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
