"""Dense models in GGUF files: found, converted on first use, and kept in the cache as an ordinary model folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pocketllm.cache import cache_folder
from pocketllm.errors import SourceError, cannot_read
from pocketllm.files import need_regular, read_object, sha256_file
from pocketllm.source import gguf_conversion
from pocketllm.source.cached_folder import kept_folder

SUFFIX = ".gguf"
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path names: itself, or the only one in a folder without safetensors.

    Raises:
        SourceError: a folder with several of them, or one that cannot be listed.
    """
    if not path.is_dir():
        return path if path.suffix.lower() == SUFFIX else None
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise cannot_read(path, error) from error
    if any(".safetensors" in name for name in names):
        return None
    found = [path / name for name in names if name.lower().endswith(SUFFIX) and not name.startswith(".")]
    if len(found) > 1:
        raise SourceError(
            f"{path}: several GGUF files ({', '.join(file.name for file in found[:3])}); name the one to read"
        )
    return found[0] if found else None


def dense_folder(file: Path, progress: Callable[[str], None] = lambda message: None) -> Path:
    """The folder of the dense model in a GGUF file, converted on first use.

    Args:
        file: the GGUF file; tokenizer files next to it take precedence over the tokenizer in it.

    Raises:
        SourceError: the file is damaged, incomplete or of a type that transformers does not read; its tokenizer
            cannot be rebuilt; or the cache cannot be written.
    """
    need_regular(file, SourceError)
    beside = [path for name in _TOKENIZER_FILES if os.path.lexists(path := file.parent / name)]
    for path in beside:
        need_regular(path, SourceError)
    try:
        identity = _identity([file, *beside])
    except OSError as error:
        raise cannot_read(error.filename or file, error) from error
    folder = cache_folder() / "gguf" / f"{file.stem[:100]}-{identity}"

    def make(scratch: Path) -> Path:
        progress(f"reading {file.name}")
        gguf_conversion.convert(file, scratch / "model", beside)
        return scratch / "model"

    return kept_folder(folder, make, lambda: gguf_conversion.needed_bytes(file))


def _identity(files: list[Path]) -> str:
    parts = "".join(
        f"{path.name if number else ''}:{sha256_file(path)}\n" for number, path in enumerate(files)
    )
    parts += f"conversion {gguf_conversion.CONVERSION}"
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def read_note(folder: Path) -> dict[str, Any] | None:
    """The `Quantization` of the GGUF file that a dense model folder was made from; None for any other folder."""
    path = folder / gguf_conversion.NOTE_NAME
    if not path.is_file():
        return None
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: damaged ({error}); delete the folder, it will be rebuilt") from error
