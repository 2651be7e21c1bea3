"""Read one plain text file: encodings, compression, and what is not text."""

from __future__ import annotations

import codecs
import gzip
import stat
import zlib
from pathlib import Path

from pocketllm.errors import SourceError

_MARKS = {  # byte order mark -> encoding; the longest first, as one begins with another
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_plain(path: Path) -> str:
    """Read a UTF-8 text file; another encoding if it has a byte order mark, decompressed if it is a `.gz`.

    Raises:
        SourceError: missing, a folder, a device, unreadable, in another encoding, or empty.
    """
    if path.is_dir():
        raise SourceError(f"{path}: a folder; wanted a UTF-8 text file")
    need_end(path)
    try:
        stored = path.read_bytes()
        stored = gzip.decompress(stored) if path.suffix == ".gz" else stored
    except FileNotFoundError as error:
        raise SourceError(f"{path}: no such file; wanted a UTF-8 text file") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise SourceError(f"{path}: cannot be read ({reason})") from error
    text = _decoded(stored, path)
    if not text.strip():
        raise SourceError(f"{path}: contains no text")
    return text


def need_end(path: Path) -> None:
    """Raises SourceError for a device, which may have no end; a FIFO, such as `<(command)`, is read."""
    try:
        mode = path.stat().st_mode
    except OSError:  # opening it says why
        return
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        raise SourceError(f"{path}: a device; wanted a text file")


def _decoded(stored: bytes, path: Path) -> str:
    """The text in bytes, by their byte order mark; UTF-8 without one.

    Raises:
        SourceError: names the first byte that does not fit, and its line.
    """
    encoding = next((name for mark, name in _MARKS.items() if stored.startswith(mark)), "utf-8")
    shown = encoding.removesuffix("-sig").upper()
    try:
        text = stored.decode(encoding)
    except UnicodeDecodeError as error:
        line = stored[: error.start].decode(encoding, "replace").count("\n") + 1
        raise SourceError(
            f"{path}: not {shown} (byte {error.start}) on line {line}; convert it to UTF-8 first"
        ) from error
    if 4 * text.count("\0") > len(text):
        raise SourceError(
            f"{path}: contains NUL bytes on line {text[: text.index(chr(0))].count(chr(10)) + 1}: not text, or UTF-16 "
            "without a byte order mark; convert it to UTF-8 first"
        )
    return text
