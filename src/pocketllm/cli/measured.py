"""Perplexities beside one another, as `demo` and `compress --ppl` show them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketllm.cli.options import load_any
from pocketllm.cli.render import size


@dataclass(frozen=True)
class Text:
    """What is measured on. windows: first ones, None all."""

    name: str
    text: str
    context: int
    windows: int | None

    def measure(
        self,
        title: str,
        model: str | Path,
        progress: Callable[[str, float, str], None],
        device: str = "cpu",
        trust_remote_code: bool = False,
    ) -> dict[str, Any]:
        """perplexity and windows of a model, compressed or dense, with what is known of its size.

        Raises:
            ConfigError: as `perplexity`.
        """
        from pocketllm.evaluate.perplexity import perplexity

        loaded, tokenizer, facts = load_any(str(model), "dense", "auto", device, trust_remote_code)

        def told(share: float) -> None:
            progress(f"eval {title}", share, "")

        found = perplexity(loaded, tokenizer, self.text, self.context, self.windows, told)
        return {**facts, "perplexity": found.perplexity, "windows": found.windows}


def perplexity_table(text: Text, models: Mapping[str, Mapping[str, Any]]) -> Any:
    """The models by title, as `Text.measure` gives them."""
    from rich.table import Table

    windows = next(iter(models.values()))["windows"]
    table = Table(title=f"perplexity on {text.name}, context {text.context}, {windows} windows")
    for header in ("model", "bytes on disk", "perplexity"):
        table.add_column(header, justify="left" if header == "model" else "right")
    for title, entry in models.items():
        table.add_row(title, size(entry["bytes_on_disk"]), f"{entry['perplexity']:.2f}")
    return table
