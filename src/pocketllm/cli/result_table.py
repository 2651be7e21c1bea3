"""The results of `finetune` and `merge` as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketllm.cli.render import number, size


def result_table(values: Mapping[str, Any], title: str) -> Any:
    """Every value by its key, except empty ones."""
    from rich.table import Table

    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right", overflow="fold")
    for key, value in values.items():
        if value in ("", {}):
            continue
        shown = number(value) if isinstance(value, float) else str(value)
        if isinstance(value, dict):
            shown = "\n".join(f"{name}: {_shown(part)}" for name, part in value.items())
        if key.endswith("bytes") or key.startswith("bytes"):
            shown = size(value)
        table.add_row(key.replace("_", " ").replace("kl ", "KL to the dense model, "), shown)
    return table


def _shown(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else str(value)
