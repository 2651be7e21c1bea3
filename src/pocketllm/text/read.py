"""Calibration text: where it comes from, and the windows of tokens that are cut from it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketllm.errors import ExtraError, SourceError, reason_of
from pocketllm.evaluate.perplexity import read_text

SUFFIXES = (".txt", ".jsonl", ".json", ".md", ".raw")
ROW_SUFFIXES = (".jsonl", ".json")  # of those, the ones that hold rows
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]*){0,2}")
_HUB_CHARACTERS = 1 << 25  # data sets of the hub have no end


def default_text(held_out: bool = False) -> str:
    """English that every Python brings along: four in five topics of its own documentation (about 0.4 MB).

    held_out: the fifth, which is for measuring. Topics repeat parts of each other; what the fifth holds is left
        out of the others.
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


def read_calibration(place: str | Path, characters: int = _HUB_CHARACTERS) -> str:
    """Text of a UTF-8 file, a JSON list or JSON lines, all such files in a folder, or a data set of the hub.

    Of each row of JSON and data sets the field `text` is taken, or all its strings if it has none.

    Args:
        place: file, folder, or `OWNER/NAME[:CONFIG[:SPLIT]]` on the hub; SPLIT is `train` unless given.
        characters: of a data set, about; it is streamed from its beginning.

    Raises:
        SourceError: unnamed, missing, not UTF-8, malformed, or no text in it. ExtraError: a data set of the hub, and
            the package that reads it is not installed.
    """
    path = named(place)
    if path.is_dir():
        return "\n\n".join(read_calibration(file) for file in text_files(path))
    if not path.exists() and _HUB_ID.fullmatch(str(place)) and path.suffix not in SUFFIXES:
        return _read_hub(str(place), characters)
    if path.suffix not in ROW_SUFFIXES:
        return read_text(path)
    text = "\n\n".join(_text_of(row) for row in read_rows(path))
    if not text.strip():
        raise SourceError(f"{path}: holds no text; wanted rows with strings")
    return text


def named(place: str | Path) -> Path:
    """The path that somebody gave.

    Raises:
        SourceError: an empty name, which would be the current folder.
    """
    if not str(place).strip():
        raise SourceError("text: got an empty name, wanted a file, a folder or OWNER/NAME")
    return Path(place)


def text_files(folder: Path) -> list[Path]:
    """The texts in a folder and in those within it.

    Raises:
        SourceError: none.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES)
    if not files:
        raise SourceError(f"{folder}: no {', '.join(f'*{s}' for s in SUFFIXES)} file in this folder")
    return files


def read_rows(path: Path) -> list[Any]:
    """The list that a JSON file holds, or what the lines of a JSON-lines file hold.

    Raises:
        SourceError: missing, not UTF-8, malformed, or JSON that is no list.
    """
    text = read_text(path)
    rows: Any = []
    if path.suffix != ".jsonl":
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise SourceError(f"{path}: not JSON ({error})") from error
        if not isinstance(rows, list):
            raise SourceError(
                f"{path}: wanted a list of rows; write its text as one, or move the file out of the folder if "
                "it is none (such as a config.json)"
            )
        return rows
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: strings may hold other separators
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise SourceError(f"{path}: line {number} is not JSON ({error})") from error
    return rows


def _text_of(row: Any) -> str:
    """The field `text` of a row, or all strings in it."""
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return str(row["text"])
    return "".join(_strings(row))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _read_hub(name: str, characters: int) -> str:
    """The beginning of a data set of the hub."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ExtraError(
            f"{name}: no such file or folder; to read it as a data set of the hub, "
            "`datasets` is needed, which is not installed: pip install 'pocketllm-codec[hub]'"
        ) from error
    identity, config, split = (*name.split(":"), "", "")[:3]
    texts: list[str] = []
    try:
        rows = load_dataset(identity, config or None, split=split or "train", streaming=True)
        for row in rows:
            texts.append(_text_of(row))
            characters -= len(texts[-1])
            if characters <= 0:
                break
    except Exception as error:  # every backend of the hub has errors of its own
        raise SourceError(
            f"{name}: neither a local file or folder nor a data set the hub delivers ({reason_of(error)}); "
            "check the path, or the name (OWNER/NAME:CONFIG:SPLIT), your login and the connection"
        ) from error
    text = "\n\n".join(texts)
    if not text.strip():
        raise SourceError(f"{name}: holds no text; wanted rows with strings")
    return text


def calibration_windows(tokenizer: Any, texts: list[str], tokens: int, context: int, seed: int) -> Tensor:
    """[windows, context] int64: random windows, about `tokens` tokens together, alike many of each text.

    Texts shorter than a window are joined. Where all of them together do not fill one, the window is shorter.

    Raises:
        SourceError: the texts have fewer than two tokens.
    """
    read = [
        tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0].long()
        for text in texts
    ]
    sequences = [ids for ids in read if len(ids) >= context]
    short = torch.cat([*(ids for ids in read if len(ids) < context), torch.empty(0, dtype=torch.int64)])
    if len(short) >= context or not sequences:
        sequences.append(short)
        context = min(context, len(short))
    if context < 2:
        raise SourceError(
            f"calibration: the texts have {context} tokens, wanted thousands and at least two; give more text"
        )
    generator = torch.Generator().manual_seed(seed)
    cut = [ids[: len(ids) // context * context].reshape(-1, context) for ids in sequences]
    chosen = []
    for windows, share in zip(
        cut, _shares([len(part) for part in cut], max(1, tokens // context)), strict=True
    ):
        order = torch.randperm(len(windows), generator=generator)[:share]
        chosen.append(windows[order.sort().values])
    return torch.cat(chosen)


def _shares(available: list[int], wanted: int) -> list[int]:
    """How many windows each text gives: alike, and where one has fewer, the others more."""
    shares = [0] * len(available)
    order = sorted(range(len(available)), key=available.__getitem__)
    for done, position in enumerate(order):
        shares[position] = min(available[position], (wanted - sum(shares)) // (len(order) - done))
    return shares
