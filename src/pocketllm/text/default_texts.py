"""Default texts for calibration, training and evaluation."""

from __future__ import annotations

import os
from pathlib import Path

from pocketllm.text.read import read_calibration, read_text

_OTHER_TEXTS = {
    "C4 (part)": "c4/c4_prefix_completion.jsonl",
    "TinyStories (sample)": "tinystories/exllamav3_cal_tiny.txt",
}


def default_text(held_out: bool = False) -> str:
    """English text that ships with every Python: four in five topics of its documentation (about 0.4 MB).

    Topics repeat parts of each other; paragraphs of the held-out fifth are removed from the others.

    Args:
        held_out: return the remaining fifth, which is for evaluation.
    """
    from pydoc_data.topics import topics

    keys = sorted(topics)
    measured = [paragraph for key in keys[4::5] for paragraph in topics[key].split("\n\n")]
    if held_out:
        return "\n\n".join(measured)
    known = {" ".join(paragraph.split()) for paragraph in measured}
    others = (
        paragraph for n, key in enumerate(keys) if n % 5 != 4 for paragraph in topics[key].split("\n\n")
    )
    return "\n\n".join(paragraph for paragraph in others if " ".join(paragraph.split()) not in known)


def named_default(held_out: bool = False) -> tuple[str, str]:
    """(name, text) of `default_text`."""
    name = "Python's own documentation"
    return f"{name} (held-out topics)" if held_out else name, default_text(held_out)


def evaluation_text() -> tuple[str, str]:
    """(name, text): WikiText-2 raw test if `POCKETLLM_DATA` has it, otherwise Python's own documentation."""
    file = _data_file("wikitext2/wiki.test.raw")
    if file is None:
        return named_default(held_out=True)
    return "WikiText-2 raw test", read_text(file)


def evaluation_texts() -> list[tuple[str, str]]:
    """`evaluation_text` and those of other kinds (web pages, stories) that `POCKETLLM_DATA` has."""
    found = {name: _data_file(path) for name, path in _OTHER_TEXTS.items()}
    others = [(name, read_calibration(file)) for name, file in found.items() if file is not None]
    return [evaluation_text(), *others]


def _data_file(path: str) -> Path | None:
    """A file below `POCKETLLM_DATA`, if it exists."""
    data = os.environ.get("POCKETLLM_DATA")
    file = Path(data) / path if data else None
    return file if file is not None and file.is_file() else None
