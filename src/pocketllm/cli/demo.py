"""The demo: compress, load back, compare with the dense model, generate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pocketllm.cli.options import load_any
from pocketllm.config import CompressConfig
from pocketllm.errors import SourceError


def run_demo(
    model: str,
    config: CompressConfig,
    output: Path,
    prompt: str,
    size: tuple[int, int],
    progress: Callable[[str, float, str], None],
) -> dict[str, Any]:
    """Everything the demo shows, as plain values. size: (context, most windows) to measure on."""
    import pocketllm
    from pocketllm.evaluate.generate import generate
    from pocketllm.evaluate.perplexity import perplexity
    from pocketllm.evaluate.texts import evaluation_text
    from pocketllm.model.checkpoint import REPORT_NAME, read_report, verify

    name, text = evaluation_text()
    context, windows = _size(model, text, size, progress)
    if (output / REPORT_NAME).is_file() and read_report(output)["config"] == config.to_dict():
        verify(output)
        progress("compress", 1.0, f"{output} is there already")
    else:
        pocketllm.compress(
            model, config, output, progress=lambda event: progress(event.stage, event.share, event.detail)
        )
    values: dict[str, Any] = {"text_name": name, "context": context, "output": str(output)}
    for title, which in (("dense", model), ("compressed", str(output))):
        loaded, tokenizer, facts = load_any(which, "dense", "auto", "cpu", False)

        def told(share: float, title: str = title) -> None:
            progress(f"eval {title}", share, "")

        found = perplexity(loaded, tokenizer, text, context, windows, told)
        values[title] = {**facts, "perplexity": found.perplexity, "windows": found.windows}
    written = generate(loaded, tokenizer, prompt)
    values["text"] = written.text
    values["tokens_per_second"] = written.tokens_per_second
    values["report"] = read_report(output)
    return values


def _size(
    model: str, text: str, size: tuple[int, int], progress: Callable[[str, float, str], None]
) -> tuple[int, int]:
    """Context, and as many windows as the text has, at most those wanted.

    Raises:
        ConfigError: the text has none. SourceError: no model, or no tokenizer. Both before anything is done.
    """
    from pocketllm.evaluate.perplexity import token_windows
    from pocketllm.model.folder import read_tokenizer
    from pocketllm.model.source import resolve

    folder = resolve(model, lambda message: progress("fetch", 0.0, message))
    tokenizer = read_tokenizer(folder, trust_remote_code=False)
    if tokenizer is None:
        raise SourceError(f"{folder}: holds no tokenizer, which the demo needs; add its files")
    context, windows = size
    return context, min(windows, len(token_windows(tokenizer, text, context)))
