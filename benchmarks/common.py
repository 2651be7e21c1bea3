"""What every benchmark shares: where data lies, the machine's facts, how results are written."""

from __future__ import annotations

import json
import os
import platform
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


def machine() -> dict[str, Any]:
    """Processor, cores, memory, versions."""
    import torch

    from pocketllm.model.report import versions

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "versions": versions(),
    }


def save(name: str, command: str, values: dict[str, Any]) -> None:
    """Write results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    body = {"command": command, "machine": machine(), **values}
    (RESULTS / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
