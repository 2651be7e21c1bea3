"""Read text from files, folders and Hub data sets, and the default texts."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pocketllm.errors import ExtraError, SourceError, reason_of

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".jsonl", ".json", ".md", ".raw")
ROW_SUFFIXES = (".jsonl", ".json")  # the suffixes among them whose files hold rows
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]*){0,2}")
_HUB_CHARACTERS = 1 << 25  # Hub data sets can be endless
_OTHER_TEXTS = {
    "C4 (part)": "c4/c4_prefix_completion.jsonl",
    "TinyStories (sample)": "tinystories/exllamav3_cal_tiny.txt",
}


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        SourceError: missing, a folder, unreadable, not UTF-8, or empty.
    """
    path = Path(path)
    if path.is_dir():
        raise SourceError(f"{path}: a folder; wanted a UTF-8 text file")
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise SourceError(f"{path}: no such file; wanted a UTF-8 text file") from error
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 (byte {error.start}); convert it first") from error
    if not text.strip():
        raise SourceError(f"{path}: contains no text")
    return text


def read_calibration(place: str | Path, characters: int = _HUB_CHARACTERS) -> str:
    """Read a UTF-8 file, a JSON list or JSON lines, all such files in a folder, or a Hub data set.

    From each row of JSON or of a data set the field `text` is taken, or all its strings if it has none.

    Args:
        place: file, folder, or `OWNER/NAME[:CONFIG[:SPLIT]]` on the Hub; SPLIT defaults to `train`.
        characters: approximate number of characters to stream from the beginning of a data set.

    Raises:
        SourceError: an empty name, missing, not UTF-8, malformed, or no text in it.
        ExtraError: a Hub data set, and the package that reads it is not installed.
    """
    path = _named(place)
    if path.is_dir():
        return "\n\n".join(read_calibration(file) for file in text_paths(path))
    if not path.exists() and _HUB_ID.fullmatch(str(place)) and path.suffix not in SUFFIXES:
        return _read_hub(str(place), characters)
    if path.suffix not in ROW_SUFFIXES:
        return read_text(path)
    text = "\n\n".join(_text_of(row) for row in read_rows(path))
    if not text.strip():
        raise SourceError(f"{path}: contains no text; wanted rows with strings")
    return text


def text_paths(place: str | Path) -> list[Path]:
    """Paths of the text files at a place: the file itself, or every text file below a folder, sorted.

    Raises:
        SourceError: an empty name, or a folder without text files.
    """
    path = _named(place)
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
    if not files:
        raise SourceError(f"{path}: no {', '.join(f'*{s}' for s in SUFFIXES)} file in this folder")
    return files


def _named(place: str | Path) -> Path:
    """The path of a place; an empty name would be the current folder, and raises SourceError."""
    if not str(place).strip():
        raise SourceError("text: got an empty name, wanted a file, a folder or OWNER/NAME")
    return Path(place)


def read_rows(path: Path) -> list[Any]:
    """Read the list in a JSON file, or one value per line of a JSON-lines file.

    Raises:
        SourceError: missing, not UTF-8, malformed, or JSON that is not a list.
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
                f"{path}: wanted a list of rows; convert it, or move the file out of the folder if "
                "it is not text (such as a config.json)"
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
    """Stream the beginning of a Hub data set."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ExtraError(
            f"{name}: no such file or folder; to read it as a data set on the Hub, "
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
    except Exception as error:  # every Hub backend has errors of its own
        raise SourceError(
            f"{name}: neither a local file or folder nor a data set that the Hub provides ({reason_of(error)}); "
            "check the path, or the name (OWNER/NAME:CONFIG:SPLIT), your login and the connection"
        ) from error
    text = "\n\n".join(texts)
    if not text.strip():
        raise SourceError(f"{name}: contains no text; wanted rows with strings")
    return text


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


def warn_of_shared(texts: tuple[str, ...], validation: str) -> None:
    """Log a warning if the validation text is also trained on: its loss then says little about other text."""
    trained = {path.resolve() for text in texts for path in text_paths(text)}
    shared = [path for path in text_paths(validation) if path.resolve() in trained]
    if shared:
        logger.warning(
            "%s is used for both training and validation; name another --validation-text", shared[0]
        )
