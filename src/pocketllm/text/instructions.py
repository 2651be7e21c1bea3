"""Read instructions with answers: the Alpaca form, or `prompt` and `response`.

A JSON file (a list of objects) or a JSON-lines file is instruction data if its objects have `instruction` and
`output` (optionally `input`), or `prompt` and `response`; all of them strings. Template: tatsu-lab/stanford_alpaca.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pocketllm.errors import SourceError
from pocketllm.text.read import ROW_SUFFIXES, read_calibration, read_rows

_HEAD = (
    "Below is an instruction that describes a task{}. "
    "Write a response that appropriately completes the request."
)
_FORMS = ({"prompt", "response"}, {"instruction", "output"})
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
    """Read (prompt, answer) pairs from a file; None if it holds plain text.

    Raises:
        SourceError: malformed JSON, or some objects are instructions and others are not.
    """
    if path.suffix not in ROW_SUFFIXES:
        return None
    rows = [row if isinstance(row, dict) else {} for row in read_rows(path)]
    if not any(form <= row.keys() for row in rows for form in _FORMS):
        return None
    found = [prompt_of(row) for row in rows]
    if None in found:
        raise SourceError(
            f"{path}: row {found.index(None) + 1} is not an instruction; wanted `instruction` and `output` (optionally "
            "`input`), or `prompt` and `response`, as strings in every row"
        )
    return [pair for pair in found if pair is not None]


def read_training(path: Path) -> str:
    """Read a file as training text; instructions are written out as each prompt followed by its answer.

    Raises:
        SourceError: as `read_calibration` and `read_instructions`.
    """
    pairs = read_instructions(path)
    return read_calibration(path) if pairs is None else "\n\n".join(map("".join, pairs))
