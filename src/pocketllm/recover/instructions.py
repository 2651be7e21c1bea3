"""Instructions with answers, read from a file: the Alpaca form, or `prompt` and `response`.

A JSON file (a list of objects) or a JSON-lines file is instruction data if its objects have `instruction` and
`output` (and perhaps `input`), or `prompt` and `response`. Template: tatsu-lab/stanford_alpaca.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pocketllm.errors import SourceError
from pocketllm.model.texts import ROW_SUFFIXES, read_rows

_HEAD = (
    "Below is an instruction that describes a task{}. "
    "Write a response that appropriately completes the request."
)
_PAIRED = ", paired with an input that provides further context"


def prompt_of(row: dict[str, Any]) -> tuple[str, str] | None:
    """(prompt, answer) of an instruction, or None if the object is not one.

    Example:
        >>> prompt_of({"prompt": "2 + 2 =", "response": " 4"})
        ('2 + 2 =', ' 4')
    """
    if isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
        return row["prompt"], row["response"]
    if not (isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str)):
        return None
    given = str(row.get("input") or "").strip()
    middle = f"\n\n### Input:\n{given}" if given else ""
    head = _HEAD.format(_PAIRED if given else "")
    return f"{head}\n\n### Instruction:\n{row['instruction']}{middle}\n\n### Response:\n", row["output"]


def read_instructions(path: Path) -> list[tuple[str, str]] | None:
    """All instructions of a file, or None if it holds plain text.

    Raises:
        SourceError: malformed JSON, or a file in which only some objects are instructions.
    """
    if path.suffix not in ROW_SUFFIXES:
        return None
    rows = read_rows(path)
    if not isinstance(rows, list) or not rows:
        raise SourceError(f"{path}: wanted a list of objects")
    found = [prompt_of(row) if isinstance(row, dict) else None for row in rows]
    if all(pair is None for pair in found):
        return None
    if None in found:
        raise SourceError(
            f"{path}: row {found.index(None) + 1} is no instruction, others are; wanted `instruction` and "
            "`output` (and perhaps `input`), or `prompt` and `response`, in every row"
        )
    return [pair for pair in found if pair is not None]
