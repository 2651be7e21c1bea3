"""Bands: the order of a packed stream that the kernel of the hashed trellis reads (hashed_matmul.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from pocketllm.codec.index_form import Trellis
from pocketllm.codec.kernels import library
from pocketllm.codec.subvectors import strip_count

COLUMNS = 8  # of subvectors in a band
_READ_BYTES = 64  # by the kernel at a time
_WORTH_A_THREAD = 1 << 20  # bytes of a stream: fewer take less time than waking a thread that sleeps


def fits_bands(trellis: Trellis) -> bool:
    """Whether the kernel can decode it: the windows of eight rows must lie in the 64 bytes that it reads at once."""
    return 9 <= trellis.width <= 16 and 7 * trellis.stride + trellis.width <= _READ_BYTES


def band_bytes(rows: int, per_row: int, trellis: Trellis) -> int:
    """Bytes of the bands of a matrix, with what the kernel may read beyond them."""
    strips = strip_count(rows, trellis.strip_rows)
    bands = -(-per_row // COLUMNS)
    return bands * (strips * trellis.kept + rows * trellis.stride) + _READ_BYTES


def to_bands(stream: Tensor, trellis: Trellis, rows: int, per_row: int) -> Tensor:
    """Packed stream (`Trellis.pack`) -> the order that the kernel reads; see hashed_layout.h."""
    bands = torch.empty(band_bytes(rows, per_row, trellis), dtype=torch.uint8)
    bands[-_READ_BYTES:] = 0
    _convert(stream.contiguous(), bands, trellis, (rows, per_row), inverse=False)
    return bands


def from_bands(bands: Tensor, trellis: Trellis, rows: int, per_row: int, nbytes: int) -> Tensor:
    """Inverse of `to_bands`: the packed stream of `nbytes`."""
    stream = torch.zeros(nbytes, dtype=torch.uint8)
    _convert(stream, bands, trellis, (rows, per_row), inverse=True)
    return stream


def _convert(stream: Tensor, bands: Tensor, trellis: Trellis, shape: tuple[int, int], inverse: bool) -> None:
    strips = strip_count(shape[0], trellis.strip_rows)
    threads = 1 if stream.numel() < _WORTH_A_THREAD else torch.get_num_threads()
    sizes = (*shape, trellis.width, trellis.stride, strips, int(inverse), threads)
    library.call("packed", "hashed_bands", stream, bands, *sizes)
