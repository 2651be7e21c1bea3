"""The texts that a model is measured on where nobody names one."""

from __future__ import annotations

import os
from pathlib import Path

from pocketllm.evaluate.perplexity import read_text

_OTHERS = {
    "C4 (part)": "c4/c4_prefix_completion.jsonl",
    "TinyStories (sample)": "tinystories/exllamav3_cal_tiny.txt",
}


def evaluation_text() -> tuple[str, str]:
    """(name, text): WikiText-2 raw test if `POCKETLLM_DATA` has it, else Python's own documentation."""
    file = _file("wikitext2/wiki.test.raw")
    if file is not None:
        return "WikiText-2 raw test", read_text(file)
    from pocketllm.text.read import default_text

    return "Python's own documentation (held-out topics)", default_text(held_out=True)


def evaluation_texts() -> list[tuple[str, str]]:
    """`evaluation_text` and those of other kinds (web pages, stories) that `POCKETLLM_DATA` has."""
    from pocketllm.text.read import read_calibration

    found = {name: _file(path) for name, path in _OTHERS.items()}
    others = [(name, read_calibration(file)) for name, file in found.items() if file is not None]
    return [evaluation_text(), *others]


def _file(path: str) -> Path | None:
    """A file below `POCKETLLM_DATA`, if it is there."""
    data = os.environ.get("POCKETLLM_DATA")
    file = Path(data) / path if data else None
    return file if file is not None and file.is_file() else None
