"""Perplexity of several models on one text, as `compress --ppl` and `demo` show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketllm.cli.model_loading import load_any
from pocketllm.cli.render import size


@dataclass(frozen=True)
class EvalText:
    """A text to measure on. context: tokens per window. windows: from the start, None takes all."""

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
        """Perplexity and windows of a model, compressed or dense, and facts about its size.

        Raises:
            ConfigError: as `perplexity`.
        """
        from pocketllm import perplexity

        loaded, tokenizer, facts = load_any(str(model), "dense", "auto", device, trust_remote_code)

        def on_progress(share: float) -> None:
            progress(f"eval {title}", share, "")

        found = perplexity(loaded, tokenizer, self.text, self.context, self.windows, on_progress)
        return {**facts, "perplexity": found.perplexity, "windows": found.windows}


def read_eval_text(
    path: Path, model: str, context: int, windows: int | None, trust_remote_code: bool = False
) -> EvalText:
    """The text in a file as a model reads it.

    Raises:
        SourceError, ExtraError: as `text_for`.
    """
    from pocketllm.source import text_for

    return EvalText(str(path), text_for(path, model, trust_remote_code), context, windows)


def perplexity_table(text: EvalText, models: Mapping[str, Mapping[str, Any]]) -> Any:
    """The models by title, as `EvalText.measure` gives them."""
    from rich.table import Table

    windows = next(iter(models.values()))["windows"]
    table = Table(title=f"perplexity on {text.name}, context {text.context}, {windows} windows")
    for header in ("model", "bytes on disk", "perplexity"):
        table.add_column(header, justify="left" if header == "model" else "right")
    for title, entry in models.items():
        table.add_row(title, size(entry["bytes_on_disk"]), f"{entry['perplexity']:.2f}")
    return table
