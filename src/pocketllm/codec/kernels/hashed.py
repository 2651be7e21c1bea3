"""Hashed trellis: a window is hashed to 8 bits, which choose one of 256 learned int8 entries.

    entry = table[(low byte + reversed bits of the high byte) mod 256]            (component 0)
    entry = table[(low byte + high byte) mod 256]                                 (component 1)

The low byte holds the 8 oldest bits of the window, the high byte the 8 newest. What makes a trellis good is how
far back a window remembers, not how many different values it can take: at 12 bits the error on a Gaussian source
is that of a table of 4096 pairs, while a table of 256 bytes fits into the registers of a processor. A table takes
256 bytes for each of the d numbers of a subvector (d = 1; d = 2 for rates in half bits), so every matrix can have
its own.

For the path search a hashed trellis is an ordinary one, whose codebook is `hashed_codebook`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocketllm.codec.column_choice import strip_lengths
from pocketllm.codec.index_form import Trellis
from pocketllm.codec.kernels import library
from pocketllm.codec.viterbi import PathSearch, reversed_bits
from pocketllm.errors import ConfigError, ShapeError

ENTRIES = 256
COLUMNS = 8  # of subvectors in a band
_READ_BYTES = 64  # by the kernel at a time


def hashed_index(width: int, component: int) -> Tensor:
    """[2^width] int64 in [0, 256): where each window looks in the table of a component.

    Raises:
        ConfigError: a width outside 9 to 16, or a component that is not 0 or 1.
    """
    if not 9 <= width <= 16:
        raise ConfigError(f"hashed trellis: got windows of {width} bits, wanted 9 to 16")
    if component not in (0, 1):
        raise ConfigError(f"hashed trellis: got component {component}, wanted vector_len 1 or 2")
    window, backwards = torch.arange(1 << width), reversed_bits(8)
    low, high = window & 255, window >> (width - 8)
    return (low + (backwards[high] if component == 0 else high)) & 255


def hashed_codebook(entries: Tensor, width: int) -> Tensor:
    """Tables [d, 256] -> the codebook [2^width, d] float32 they stand for.

    Raises:
        ConfigError: see `hashed_index`.
        ShapeError: not [1, 256] or [2, 256].
    """
    if entries.ndim != 2 or entries.shape[1] != ENTRIES or entries.shape[0] not in (1, 2):
        raise ShapeError(f"hashed table: got {tuple(entries.shape)}, wanted [1, 256] or [2, 256]")
    found = [row.float()[hashed_index(width, n).to(row.device)] for n, row in enumerate(entries)]
    return torch.stack(found, dim=1)


def quantized_entries(entries: Tensor) -> tuple[Tensor, float]:
    """Tables [d, 256] -> (int8, scale), the largest entry at 127."""
    scale = float(entries.abs().max().clamp(min=1e-30)) / 127
    return (entries / scale).round().to(torch.int8), scale


def fit_entries(indices: Tensor, points: Tensor, width: int, previous: Tensor) -> Tensor:
    """Best tables [d, 256] for given paths: the mean of the points that look up each entry.

    Args:
        indices: [N] integer windows. points: [N, d] float32. previous: [d, 256], kept where nothing looks.
    """
    found = []
    for component, kept in enumerate(previous):
        where = hashed_index(width, component).to(indices.device)[indices]
        counts = torch.bincount(where, minlength=ENTRIES)
        sums = torch.zeros(ENTRIES, dtype=torch.float64, device=points.device)
        sums.index_add_(0, where, points[:, component].double())
        found.append(torch.where(counts > 0, (sums / counts.clamp(min=1)).to(kept), kept))
    return torch.stack(found)


def train_entries(
    points: Tensor, trellis: Trellis, iterations: int, seed: int
) -> tuple[Tensor, float, list[float]]:
    """Lloyd's algorithm with cheapest paths for the tables of a hashed trellis.

    Starts from quantiles of the points in random order, so that neighbouring states differ.

    Args:
        points: [N, d] float32, d 1 or 2, in random order.

    Returns:
        int8 tables [d, 256], their scale, error per iteration (mean square over that of the points), each
        with the rounded tables.
    """
    generator = torch.Generator().manual_seed(seed)
    quantiles = (torch.arange(ENTRIES) + 0.5) / ENTRIES
    entries = torch.stack(
        [
            torch.quantile(column[: 1 << 20].cpu(), quantiles)[torch.randperm(ENTRIES, generator=generator)]
            for column in points.T
        ]
    ).to(points)
    search, lengths = (
        PathSearch(trellis.width, trellis.stride, points.device),
        strip_lengths(len(points), trellis.strip_rows),
    )
    start = search.first_state(len(lengths))
    which, weights = torch.zeros_like(start), torch.ones(len(points), device=points.device)
    energy, errors = float(points.square().sum()), list[float]()
    for _ in range(max(1, iterations)):
        rounded, scale = quantized_entries(entries)
        codebook = hashed_codebook(rounded, trellis.width) * scale
        indices = search.search(points, weights, search.ordered(codebook[None]), which, lengths, start)
        errors.append(float((points - codebook[indices]).square().sum()) / max(energy, 1e-30))
        best = rounded, scale
        entries = fit_entries(indices, points, trellis.width, rounded.float() * scale)
    return *best, errors


def fits_bands(trellis: Trellis) -> bool:
    """Whether the kernel can decode it: the windows of eight rows must lie in the 64 bytes that it reads at once."""
    return 9 <= trellis.width <= 16 and 7 * trellis.stride + trellis.width <= _READ_BYTES


def band_bytes(rows: int, per_row: int, trellis: Trellis) -> int:
    """Bytes of the bands of a matrix, with what the kernel may read beyond them."""
    strips = len(strip_lengths(rows, trellis.strip_rows))
    bands = -(-per_row // COLUMNS)
    return bands * (strips * trellis.kept + rows * trellis.stride) + _READ_BYTES


def to_bands(stream: Tensor, trellis: Trellis, rows: int, per_row: int) -> Tensor:
    """Packed stream (`Trellis.pack`) -> the order that the kernel reads; see hashed_layout.h."""
    bands = torch.zeros(band_bytes(rows, per_row, trellis), dtype=torch.uint8)
    _convert(stream.contiguous(), bands, trellis, (rows, per_row), inverse=False)
    return bands


def from_bands(bands: Tensor, trellis: Trellis, rows: int, per_row: int, nbytes: int) -> Tensor:
    """Inverse of `to_bands`: the packed stream of `nbytes`."""
    stream = torch.zeros(nbytes, dtype=torch.uint8)
    _convert(stream, bands, trellis, (rows, per_row), inverse=True)
    return stream


def _convert(stream: Tensor, bands: Tensor, trellis: Trellis, shape: tuple[int, int], inverse: bool) -> None:
    strips = len(strip_lengths(shape[0], trellis.strip_rows))
    sizes = (*shape, trellis.width, trellis.stride, strips, int(inverse), torch.get_num_threads())
    library.call("packed", "hashed_bands", stream, bands, *sizes)
