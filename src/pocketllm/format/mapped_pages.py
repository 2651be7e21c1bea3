"""Memory that maps a file: tensors of safetensors files are read on access, and their pages stay resident.

What has been read for the last time can be dropped: pages without changes are in the file, and return from there on
the next access. Only Linux says which memory maps files; elsewhere nothing is dropped.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from torch import Tensor

_MAPS = Path("/proc/self/maps")
_MMAP_THRESHOLD, _LARGE = -3, 1 << 18  # of mallopt(3); bytes
_WORTH_DROPPING = 1 << 20  # bytes of a file; asking for all maps takes some milliseconds
_DONT_NEED = getattr(mmap, "MADV_DONTNEED", None)


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class MappedPages:
    """The parts of this process's memory that map files at the time it is made."""

    def __init__(self) -> None:
        ranges = _mapped_ranges()
        self._begins, self._ends = [r[0] for r in ranges], [r[1] for r in ranges]

    def drop(self, *tensors: Tensor) -> None:
        """Drop the pages of tensors from memory where they map a file; of neighbours, also those that they share.

        Each must hold what the file does: a change made in memory would be lost.
        """
        page = mmap.PAGESIZE
        for begin, end in _joined(tensors) if _DONT_NEED is not None else ():
            begin, end = -(-begin // page) * page, end // page * page
            at = bisect_right(self._begins, begin) - 1
            if begin < end and at >= 0 and end <= self._ends[at]:
                _drop(begin, end)


def _joined(tensors: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    """Addresses (begin, end) of tensors on the CPU, in order; neighbours make one range."""
    plain = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.is_contiguous()]
    begin = end = 0
    for at, size in sorted((t.data_ptr(), t.numel() * t.element_size()) for t in plain):
        if at != end:
            yield begin, end
            begin = at
        end = at + size
    yield begin, end


def drop_files(files: Collection[Path]) -> None:
    """Drop the pages of all memory that maps one of these files, except small ones, which it is not worth it for.

    None of it may have been changed: the change would be lost.
    """
    names = {
        str(file.resolve()) for file in files if file.is_file() and file.stat().st_size >= _WORTH_DROPPING
    }
    for begin, end, name in _mapped_ranges() if names and _DONT_NEED is not None else ():
        if name in names:
            _drop(begin, end)


def keep_no_holes() -> None:
    """From now on return every large tensor to the system when it is freed, so that memory is what tensors take.

    glibc would allocate those up to 32 MiB from one heap, where what is freed leaves holes between what is kept.
    """
    option = getattr(_c_library(), "mallopt", None) if _DONT_NEED is not None else None
    if option is not None:
        option(_MMAP_THRESHOLD, _LARGE)


def return_freed() -> None:
    """Give memory that has been freed back to the system, which the C library (glibc) would keep for later."""
    trim = getattr(_c_library(), "malloc_trim", None) if _DONT_NEED is not None else None
    if trim is not None:
        trim(0)


def _mapped_ranges() -> list[tuple[int, int, str]]:
    """(begin, end, file) of this process's memory that maps files."""
    lines = _MAPS.read_text(errors="replace").splitlines() if _MAPS.is_file() else []
    fields = [line.split(maxsplit=5) for line in lines]
    found = [(*f[0].split("-"), f[5]) for f in fields if len(f) == 6 and f[5][0] == "/"]
    return [(int(begin, 16), int(end, 16), name) for begin, end, name in found]


def _drop(begin: int, end: int) -> None:
    assert _DONT_NEED is not None
    _c_library().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONT_NEED)
