"""Files of tensors for a run's own use (finished units, measurements), with a checksum that detects damage."""

from __future__ import annotations

import json
import logging
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)


def write_kept(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write under a temporary name, sync, and rename when complete.

    Raises:
        OSError: the file cannot be written.
    """
    stored = {key: value.contiguous().cpu() for key, value in tensors.items()}
    text = json.dumps(facts)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with system_errors(temporary):
            # One entry: safetensors writes several in any order, and the same content has the same bytes.
            save_file(stored, str(temporary), {"facts": f"{_crc32(stored, text)} {text}"})
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read_kept(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file from `write_kept`: tensors and facts.

    Raises:
        ValueError: damaged. OSError: it cannot be read.
    """
    if not path.is_file():
        raise OSError("missing, or not a regular file")
    try:
        with safe_open(str(path), framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
            checksum, _, text = (handle.metadata() or {})["facts"].partition(" ")
        facts = json.loads(text)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not what was written ({error!r})") from error
    if checksum != _crc32(tensors, text):
        raise ValueError("altered (CRC-32 differs)")
    return tensors, facts


def is_intact(path: Path) -> bool:
    """Whether `read_kept` can read a file; a damaged one is removed, with a warning, and so recomputed."""
    if not path.exists():
        return False
    try:
        read_kept(path)
    except (OSError, ValueError) as error:
        logger.warning("%s: damaged (%s); made again", path, error)
        path.unlink()
        return False
    return True


def _crc32(tensors: Mapping[str, Tensor], text: str) -> str:
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        value = zlib.crc32(data, value)
    return f"{value:08x}"


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Raise OSError for a failure of the operating system, which safetensors wraps in an error of its own."""
    try:
        yield
    except Exception as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None or isinstance(error, OSError):
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
