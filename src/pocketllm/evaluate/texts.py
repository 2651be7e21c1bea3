"""The text that a model is measured on where nobody names one."""

from __future__ import annotations

import os
from pathlib import Path

from pocketllm.evaluate.perplexity import read_text


def evaluation_text() -> tuple[str, str]:
    """(name, text): WikiText-2 raw test if `POCKETLLM_DATA` has it, else Python's own documentation."""
    data = os.environ.get("POCKETLLM_DATA")
    file = Path(data) / "wikitext2" / "wiki.test.raw" if data else None
    if file is not None and file.is_file():
        return "WikiText-2 raw test", read_text(file)
    from pocketllm.model.calibration import default_text

    return "Python's own documentation (held-out topics)", default_text(held_out=True)
