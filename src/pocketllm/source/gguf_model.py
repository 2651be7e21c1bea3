"""Dense models in GGUF files: found, converted on first use, and kept in the cache as an ordinary model folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pocketllm.cache import cache_folder
from pocketllm.errors import SourceError
from pocketllm.files import need_regular, read_object, sha256_file
from pocketllm.source import gguf_conversion
from pocketllm.source.folder import open_safetensors
from pocketllm.source.model_files import weight_files

SUFFIX = ".gguf"
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path names: itself, or the only one in a folder without safetensors.

    Raises:
        SourceError: a folder with several of them.
    """
    if not path.is_dir():
        return path if path.suffix.lower() == SUFFIX else None
    if any(path.glob("*.safetensors*")):
        return None
    found = sorted(p for p in path.iterdir() if p.suffix.lower() == SUFFIX and not p.name.startswith("."))
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
    identity = _identity([file, *beside])
    folder = cache_folder() / "gguf" / f"{file.stem[:100]}-{identity}"

    def make(scratch: Path) -> Path:
        progress(f"reading {file.name}")
        gguf_conversion.convert(file, scratch / "model", beside)
        return scratch / "model"

    return kept_folder(folder, make, 3 * file.stat().st_size)


def _identity(files: list[Path]) -> str:
    parts = "".join(
        f"{path.name if number else ''}:{sha256_file(path)}\n" for number, path in enumerate(files)
    )
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def kept_folder(folder: Path, make: Callable[[Path], Path], nbytes: int) -> Path:
    """A model folder in the cache, made on first use: under a temporary name, and renamed when complete.

    Args:
        make: fills a folder within the one it is given, and returns it. nbytes: that it needs, about.

    Raises:
        SourceError: as `make`; or the cache cannot be written.
    """
    if (folder / "config.json").is_file() and _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            made = make(Path(scratch))
            try:
                made.rename(folder)
            except OSError:
                if not (folder / "config.json").is_file():  # another process was quicker
                    raise
    except OSError as error:
        raise SourceError(
            f"{error.filename or folder}: cannot be written ({error.strerror or error}); "
            f"point POCKETLLM_CACHE at a folder with {nbytes / 1e6:,.0f} MB to spare"
        ) from error
    return folder


def _is_complete(folder: Path) -> bool:
    """Whether the weights in the cache can be opened; a damaged folder is removed, so that it is made again."""
    try:
        for file in weight_files(folder):
            open_safetensors(file)
    except SourceError:
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


def read_note(folder: Path) -> dict[str, Any] | None:
    """The `Quantization` of the GGUF file that a dense model folder was made from; None for any other folder."""
    path = folder / gguf_conversion.NOTE_NAME
    if not path.is_file():
        return None
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: damaged ({error}); delete the folder, it will be rebuilt") from error
