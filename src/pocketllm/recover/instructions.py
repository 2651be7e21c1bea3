"""Training items for LoRA: instructions with answers (the Alpaca form), or windows of plain text.

A JSON file (a list of objects) or a JSON-lines file is instruction data if its objects have `instruction` and
`output` (and perhaps `input`), or `prompt` and `response`. The loss is taken on answers only. Everything else
is plain text, cut into windows, with the loss on every token. Template: tatsu-lab/stanford_alpaca.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketllm.errors import ConfigError, SourceError
from pocketllm.evaluate.perplexity import read_text
from pocketllm.recover.text import tokenize, windows_of

_HEAD = (
    "Below is an instruction that describes a task{}. "
    "Write a response that appropriately completes the request."
)
_PAIRED = ", paired with an input that provides further context"


@dataclass(frozen=True)
class Item:
    """One sequence: token ids [T] int64, and from which position on tokens are learned."""

    ids: Tensor
    learned_from: int

    @property
    def weight(self) -> int:
        """Scored tokens."""
        return len(self.ids) - self.learned_from


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
    if path.suffix not in (".json", ".jsonl"):
        return None
    text, is_lines = read_text(path), path.suffix == ".jsonl"
    try:
        rows = [json.loads(r) for r in text.splitlines() if r.strip()] if is_lines else json.loads(text)
    except ValueError as error:
        raise SourceError(f"{path}: not {'JSON lines' if is_lines else 'JSON'} ({error})") from error
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


def _files(texts: tuple[str, ...]) -> Iterator[Path]:
    """Files as they are named, and those in folders that are named."""
    suffixes = (".json", ".jsonl", ".txt", ".md", ".raw")
    for text in texts:
        path = Path(text)
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix in suffixes)
        else:
            yield path


def read_items(tokenizer: Any, texts: tuple[str, ...], context: int) -> list[Item]:
    """Training items of all texts, at most `context` tokens each.

    Raises:
        SourceError: a text cannot be read. ConfigError: fewer than two items.
    """
    items: list[Item] = []
    plain: list[str] = []
    for path in _files(texts):
        pairs = read_instructions(path)
        if pairs is None:
            plain.append(str(path))
            continue
        items += [item for pair in pairs if (item := _item(tokenizer, *pair, context)).weight > 0]
    if plain or not texts:
        windows = windows_of(tokenizer, tuple(plain), context)
        items += [Item(window, 1) for window in windows]
    if len(items) < 2:
        raise ConfigError(
            f"the text gives {len(items)} item to train on, wanted at least two (one of them to validate); "
            "give more text or change the context"
        )
    return items


def _item(tokenizer: Any, prompt: str, answer: str, context: int) -> Item:
    """Prompt and answer, ended by the end-of-sequence token; what is too long is cut off."""
    start = tokenize(tokenizer, prompt)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = torch.cat([start, tokenize(tokenizer, answer), torch.tensor(end, dtype=torch.int64)])[:context]
    return Item(ids.long(), max(1, len(start)))
