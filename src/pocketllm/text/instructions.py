"""Instructions with answers, for tokenizers without a chat template.

An instruction is a row with `instruction` and `output` (optionally `input`), or with `prompt` and `response` (or
`completion`); all of them strings. Template: tatsu-lab/stanford_alpaca.
"""

from __future__ import annotations

from typing import Any

_HEAD = (
    "Below is an instruction that describes a task{}. "
    "Write a response that appropriately completes the request."
)
INSTRUCTION_FORMS = ({"prompt", "response"}, {"prompt", "completion"}, {"instruction", "output"})
_PAIRED = ", paired with an input that provides further context"


def prompt_of(row: dict[str, Any]) -> tuple[str, str] | None:
    """(prompt, answer) of an instruction, or None if the object is not one.

    Example:
        >>> prompt_of({"prompt": "2 + 2 =", "response": " 4"})
        ('2 + 2 =', ' 4')
    """
    for answer in ("response", "completion"):
        if isinstance(row.get("prompt"), str) and isinstance(row.get(answer), str):
            return row["prompt"], row[answer]
    if not (isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str)):
        return None
    given = str(row.get("input") or "").strip()
    middle = f"\n\n### Input:\n{given}" if given else ""
    head = _HEAD.format(_PAIRED if given else "")
    return f"{head}\n\n### Instruction:\n{row['instruction']}{middle}\n\n### Response:\n", row["output"]


def question_of(row: dict[str, Any]) -> str:
    """What the user of a chat says, of an instruction that `prompt_of` knows: without the Alpaca form."""
    if isinstance(row.get("prompt"), str):
        return str(row["prompt"])
    given = str(row.get("input") or "").strip()
    return f"{row['instruction']}\n\n{given}" if given else str(row["instruction"])
