"""Task files of a few rows, and models to run on them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pocketllm.config import EvalConfig
from pocketllm.evaluate import tasks
from tests import tiny

CONFIG = EvalConfig(batch_tokens=256)
WORDS = ["soil", "a bright sun", "water and air", "stones", "no", "yes", "more of it"]


def rows(name: str, count: int = 12) -> Iterator[dict[str, Any]]:
    for n in range(count):
        first, second, third = (WORDS[(n * k + 1) % len(WORDS)] for k in (1, 2, 3))
        if name == "piqa":
            yield {"goal": f"grow {n} seeds in {third}", "sol1": first, "sol2": f"{second}s", "label": n % 2}
        elif name == "boolq":
            yield {"question": f"is it {first}", "passage": f"It is {n}, {second}.", "answer": n % 3 == 0}
        elif name == "winogrande":
            blank = f"the {first} of {n} saw a _ there"
            yield {"sentence": blank, "option1": second, "option2": third, "answer": str(n % 2 + 1)}
        elif name == "arc_easy":
            choices = {"text": [first, f"{second}s", third, f"{n}"], "label": ["A", "B", "C", "D"]}
            yield {"question": f"what is {n}", "choices": choices, "answerKey": "ABCD"[n % 4]}
        else:
            yield {"text": f"there were {n} {first} of {second}"}


def write_rows(folder: Path) -> Path:
    """The files of five tasks, in a folder."""
    files = {"piqa": "piqa/valid", "boolq": "boolq/val", "lambada": "lambada/test"}
    for name, file in {**files, "winogrande": "winogrande/dev", "arc_easy": "arc_easy/test"}.items():
        path = folder / f"{file}.jsonl"
        path.parent.mkdir()
        path.write_text("\n".join(map(json.dumps, rows(name))))
    return folder


def certain_model() -> Any:
    """A tiny model whose answers differ."""
    made = tiny.model()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)  # far from uniform
    return made


def subject(model: Any, fingerprint: str = "a") -> tasks.Subject:
    return tasks.Subject(fingerprint, "float32", lambda: (model, tiny.tokenizer()))
