"""What makers of pages share: results as they were committed, tables in Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def load_results(name: str) -> dict[str, Any]:
    """results/NAME.json."""
    loaded: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def optional_results(name: str) -> dict[str, Any] | None:
    """results/NAME.json; None if nothing was measured yet."""
    return load_results(name) if (RESULTS / f"{name}.json").is_file() else None


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
