"""Read text from files, folders and Hub data sets."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pocketllm.errors import ExtraError, SourceError, reason_of
from pocketllm.text.chat import Chat, render
from pocketllm.text.plain_text import need_end, read_plain
from pocketllm.text.rows import Document, document_of

logger = logging.getLogger(__name__)

_ROW_SUFFIXES = (".jsonl", ".json", ".parquet")  # files that hold rows
SUFFIXES = (".txt", *_ROW_SUFFIXES, ".md", ".raw")  # each but .parquet also with .gz after it
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]*){0,2}")
_SURROGATE = re.compile(r"\\u[dD][89A-Fa-f]")  # in JSON: of a pair, or alone
_HUB_CHARACTERS = 1 << 25  # Hub data sets can be endless


def read_text(path: str | Path, tokenizer: Any | None = None) -> str:
    """Read one text file, or the rows of one (JSON, JSON lines, parquet), to measure on.

    As `read_calibration`, but neither folders nor Hub data sets.

    Raises:
        SourceError: missing, a folder, unreadable, in another encoding, malformed, or empty.
        ExtraError: parquet, and no `pyarrow`.
    """
    path = Path(path)
    if not holds_rows(path) or not path.is_file():
        return read_plain(path)
    return read_calibration(path, tokenizer=tokenizer)


def holds_rows(path: Path) -> bool:
    """Whether a file holds rows, by its name."""
    return _kind(path) in _ROW_SUFFIXES


def read_calibration(
    place: str | Path, characters: int = _HUB_CHARACTERS, tokenizer: Any | None = None
) -> str:
    """Read a text file, rows (JSON, JSON lines, parquet), all such files in a folder, or a Hub data set.

    What is read of a row: see `pocketllm.text.rows`. Chats and instructions are written as the tokenizer's chat
    template does; without one, turns as `role: content` (with a warning), and instructions in the Alpaca form.

    Args:
        place: file, folder, or `OWNER/NAME[:CONFIG[:SPLIT]]` on the Hub; SPLIT defaults to `train`.
        characters: approximate number of characters to stream from the beginning of a data set.
        tokenizer: a transformers tokenizer; None has no chat template.

    Raises:
        SourceError: an empty name, missing, badly encoded, malformed, or no text in it.
        ExtraError: a Hub data set or parquet, and the package that reads it is not installed.
    """
    path = _named(place)
    files = text_paths(path) if path.is_dir() else [place]
    documents = [document for file in files for document in _read_documents(file, characters)]
    return render(documents, tokenizer, str(place))


def read_answered(place: str | Path) -> str | list[Chat]:
    """Read a file or a Hub data set to learn answers from: its chats and instructions, or its text if it has none.

    A row that has a chat or an instruction as well as a text is read as the former.

    Raises:
        SourceError: as `read_calibration`, or some rows are chats and others are not. ExtraError: likewise.
    """
    documents = _read_documents(place, _HUB_CHARACTERS, prefer_chat=True)
    chats = [document for document in documents if isinstance(document, Chat)]
    if not chats:
        return "\n\n".join(map(str, documents))
    if len(chats) < len(documents):
        number = next(n for n, document in enumerate(documents, 1) if not isinstance(document, Chat))
        raise SourceError(
            f"{place}: row {number} is not an instruction or a chat, others are; wanted `messages`, `instruction` and "
            "`output` (optionally `input`), or `prompt` and `response` in every row, or in none"
        )
    return chats


def _read_documents(place: str | Path, characters: int, prefer_chat: bool = False) -> list[Document]:
    """What one file or data set holds: one text, or what each of its rows gives."""
    path = _named(place)
    if not path.exists() and _HUB_ID.fullmatch(str(place)) and path.suffix not in (*SUFFIXES, ".gz"):
        return _read_hub(str(place), characters, prefer_chat)
    if not holds_rows(path):
        return [read_plain(path)]
    rows = enumerate_rows(path)
    documents = [document_of(row, f"{path}: row {number}", prefer_chat) for number, row in rows]
    return _not_empty(documents, path)


def _not_empty(documents: list[Document], name: object) -> list[Document]:
    """The documents; raises SourceError if none has text."""
    if not any(document.strip() if isinstance(document, str) else len(document) for document in documents):
        raise SourceError(f"{name}: contains no text; wanted rows with strings")
    return documents


def _kind(path: Path) -> str:
    """The suffix that says what a file holds."""
    return Path(path.name.removesuffix(".gz")).suffix


def text_paths(place: str | Path) -> list[Path]:
    """Paths of the text files at a place: the file itself, or every text file below a folder, sorted.

    Raises:
        SourceError: an empty name, or a folder without text files.
    """
    path = _named(place)
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.rglob("*") if _kind(p) in SUFFIXES and not p.is_dir())
    if not files:
        raise SourceError(f"{path}: no {', '.join(f'*{s}' for s in SUFFIXES)} file in this folder")
    for file in files:
        if file.exists() and not file.is_file():
            raise SourceError(f"{file}: not a regular file; move it out of the folder")
    return files


def _named(place: str | Path) -> Path:
    """The path of a place; an empty name would be the current folder, and raises SourceError."""
    if not str(place).strip():
        raise SourceError("text: got an empty name, wanted a file, a folder or OWNER/NAME")
    return Path(place)


def enumerate_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, row) of a list in a JSON file, of JSON lines (the number of the line), or of parquet.

    Halves of surrogate pairs in JSON are replaced by U+FFFD, with a warning: no tokenizer takes them.

    Raises:
        SourceError: missing, badly encoded, malformed, or JSON that is not a list. ExtraError: no `pyarrow`.
    """
    if _kind(path) == ".parquet":
        yield from enumerate(_parquet_rows(path), 1)
        return
    text, repaired = read_plain(path), list[int]()
    suspected = _SURROGATE.search(text) is not None
    if _kind(path) == ".jsonl":  # not splitlines: strings may hold other separators
        lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        rows = ((number, _from_json(line, f"{path}: line {number} is")) for number, line in lines)
    else:
        found = _from_json(text, f"{path}:")
        if not isinstance(found, list):
            raise SourceError(
                f"{path}: wanted a list of rows; convert it, or move the file out of the folder if "
                "it is not text (such as a config.json)"
            )
        rows = ((number, row) for number, row in enumerate(found, 1))
    for number, row in rows:
        mended = _without_surrogates(row) if suspected else row
        if mended is not row:
            repaired.append(number)
        yield number, mended
    if repaired:
        logger.warning(
            "%s: %d rows (the first is row %d) contain half of a surrogate pair, such as a cut emoji; it is "
            "replaced by U+FFFD",
            *(path, len(repaired), repaired[0]),
        )


def _from_json(text: str, subject: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{subject} not JSON ({reason_of(error)})") from error


def _without_surrogates(row: Any) -> Any:
    """The row itself, or a copy in which halves of surrogate pairs are replaced."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return row


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ExtraError(
            f"{path}: `pyarrow` is needed to read parquet, and is not installed: pip install 'pocketllm-codec[hub]'"
        ) from error
    need_end(path)
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except FileNotFoundError as error:
        raise SourceError(f"{path}: no such file; wanted a parquet file") from error
    except (OSError, ValueError) as error:  # pyarrow's own errors are among them
        raise SourceError(f"{path}: cannot be read as parquet ({reason_of(error)})") from error


def _read_hub(name: str, characters: int, prefer_chat: bool) -> list[Document]:
    """Stream the beginning of a Hub data set."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ExtraError(
            f"{name}: no such file or folder; to read it as a data set on the Hub, "
            "`datasets` is needed, which is not installed: pip install 'pocketllm-codec[hub]'"
        ) from error
    identity, config, split = (*name.split(":"), "", "")[:3]
    documents: list[Document] = []
    try:
        rows = load_dataset(identity, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            documents.append(document_of(row, f"{name}: row {number}", prefer_chat))
            characters -= len(documents[-1])
            if characters <= 0:
                break
    except SourceError:
        raise
    except Exception as error:  # every Hub backend has errors of its own
        raise SourceError(
            f"{name}: neither a local file or folder nor a data set that the Hub provides ({reason_of(error)}); "
            "check the path, or the name (OWNER/NAME:CONFIG:SPLIT), your login and the connection"
        ) from error
    return _not_empty(documents, name)


def warn_of_shared(texts: tuple[str, ...], validation: str) -> None:
    """Log a warning if the validation text is also trained on: its loss then says little about other text."""
    trained = {os.path.realpath(path) for text in texts for path in text_paths(text)}
    shared = [path for path in text_paths(validation) if os.path.realpath(path) in trained]
    if shared:
        logger.warning(
            "%s is used for both training and validation; name another --validation-text", shared[0]
        )
