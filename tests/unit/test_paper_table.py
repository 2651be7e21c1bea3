"""The table of the paper's pipeline (benchmarks/paper_table.py): measured rows, and nothing else."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
EVALUATED = {"windows": 2, "tasks_limit": 4}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module("paper_table")


def row(accuracy: float, **changes: Any) -> dict[str, Any]:
    """A row as `benchmarks/paper.py` writes it."""
    values = {"bytes_on_disk": 2_000_000, "perplexity": 30.0, "kl": 0.25, "bpw_blocks": 3.98}
    mean = {"acc": accuracy, "stderr": 0.01, "tasks": ["piqa", "arc_easy"]}
    gap = {"difference": accuracy - 0.5, "stderr": 0.02}
    return {
        **values,
        "settings": EVALUATED,
        "average": {"paper": mean},
        "difference": {"paper": gap},
        **changes,
    }


def results(rows: dict[str, Any]) -> dict[str, Any]:
    dense = row(0.5, kl=None, difference=None)
    models = {"builtin:smollm2-135m": {"dense": dense, "rows": rows}}
    return {"command": "c", "text": "t", "context": 8, "dtype": "bfloat16", "models": models}


def lines_of(page: str) -> list[list[str]]:
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_rows_are_those_that_were_measured(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = {"method": "lora", "steps": 2, "config": {"context": 512, "loop": {"batch_size": 16}}}
    rows = {
        "paper-8x/published/none": row(0.45),
        "paper-8x/published/lora": row(0.49, settings={**EVALUATED, "steps": 2}, training=trained),
        "paper-10x/published/lora": row(0.4, settings={**EVALUATED, "windows": 16}, training=trained),
    }
    monkeypatch.setattr(table, "load_results", lambda name: results(rows))
    page = table.paper()
    lines = lines_of(page)
    assert [line[1:4] for line in lines] == [
        ["dense (bf16)", "", ""],
        ["`paper-8x`", "as published", "none"],
        ["`paper-8x`", "as published", "LoRA"],
    ]
    assert lines[1][6:10] == ["30.00", "0.250", "45.0% (-5.0 ± 2.0)", "90.0%"]
    assert lines[2][10] == "2 steps of 16 instructions"
    assert "smollm2-135m: 98.0% at 8x (the paper: 101.0%)" in page and "at 10x (the paper" not in page
    assert "64.29 dense; 64.95 at 8x (101.0% of dense); 64.07 at 10x (99.7%" in page


def test_a_run_without_tasks_shows_perplexity_alone(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = {"windows": 2, "tasks_limit": None}
    bare = {"settings": evaluated, "average": None, "difference": None}
    found = results({"paper-16x/calibrated/none": row(0.4, **bare)})
    found["models"]["builtin:smollm2-135m"]["dense"] |= bare
    monkeypatch.setattr(table, "load_results", lambda name: found)
    page = table.paper()
    assert [line[8:] for line in lines_of(page)] == [["", "", ""]] * 2
    assert "Mean accuracy over" not in page and "Share of the dense accuracy" not in page
