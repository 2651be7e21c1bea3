"""Ask the system to read tensors of weight files into its cache, while the process computes with others.

What is read lies in the system's cache, which it gives up when memory is short, and not in the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from pocketllm.files import safetensors_header
from pocketllm.source.assembly import Part

_GAP = 1 << 20  # bytes between tensors that are read as well


def read_ahead(parts: Iterable[Part]) -> list[tuple[Path, int, int]]:
    """Begin to read stored tensors; returns (file, first byte, number of bytes) of each run that was asked for.

    Nothing happens where the system has no such call (it is POSIX), and what cannot be read fails later.
    """
    wanted = [(part.file, *_place(part.file, part.key)) for part in parts]
    runs = _joined(sorted(wanted))
    advise = getattr(os, "posix_fadvise", None)
    if advise is None:
        return runs
    for file, begin, size in runs:
        with suppress(OSError), file.open("rb") as stream:
            advise(stream.fileno(), begin, size, os.POSIX_FADV_WILLNEED)
    return runs


def _joined(places: list[tuple[Path, int, int]]) -> list[tuple[Path, int, int]]:
    """Places in order, those close together as one."""
    found = list[tuple[Path, int, int]]()
    for file, begin, size in places:
        if found and found[-1][0] == file and begin <= found[-1][1] + found[-1][2] + _GAP:
            first = found[-1][1]
            found[-1] = file, first, max(found[-1][2], begin + size - first)
        else:
            found.append((file, begin, size))
    return found


def _place(file: Path, key: str) -> tuple[int, int]:
    """(first byte, number of bytes) of a tensor in a safetensors file; (0, 0) if it is not there."""
    try:
        begin, end = _places(file)[key]
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0
    return begin, end - begin


@lru_cache(maxsize=1024)
def _places(file: Path) -> dict[str, tuple[int, int]]:
    """(first byte, end) of every tensor of a file."""
    header, data = safetensors_header(file)
    offsets = {key: entry["data_offsets"] for key, entry in header.items()}
    return {key: (data + begin, data + end) for key, (begin, end) in offsets.items()}
