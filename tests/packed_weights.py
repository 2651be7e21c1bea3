"""Packed matrices with random indices, and how far apart products may lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor

from pocketllm.codec.index_form import Independent, Trellis
from pocketllm.codec.kernels import hashed, library
from pocketllm.codec.kernels.packed_weight import PackedWeight, Sizes, packed_weight, table_of
from pocketllm.codec.packing import pack
from pocketllm.codec.subvectors import strip_lengths, subvectors_per_row

FLOAT32 = 2e-6  # sums of some hundred products in float32
BFLOAT16 = 1e-2  # rows of U and the product are rounded to 8 bits
INTEGERS = 2e-4  # 16 bits of the largest activation
needs_compiler = pytest.mark.skipif(library.library("packed") is None, reason="no C++ compiler")


def independent(rows: int, columns: int, width: int, d: int, size: int | None = None) -> PackedWeight:
    size = size or 1 << width
    per_row = subvectors_per_row(columns, d)
    stream = pack(torch.randint(0, size, (rows * per_row,)), width)
    return packed_weight(
        stream, torch.randn(size, d), torch.rand(rows) + 0.5, columns, Independent(1 << width)
    )


def paths(rows: int, per_row: int, trellis: Trellis) -> Tensor:
    """[rows, per_row] int32: a random path through each strip."""
    steps = torch.randint(0, 1 << trellis.stride, (rows, per_row))
    parts = steps.split(strip_lengths(rows, trellis.strip_rows))
    return torch.cat([trellis.windows(part.T.reshape(-1)).view(per_row, -1).T for part in parts])


def on_trellis(rows: int, columns: int, trellis: Trellis, d: int) -> PackedWeight:
    stream = trellis.pack(paths(rows, subvectors_per_row(columns, d), trellis))
    table = torch.randn(1 << trellis.width, d)
    return packed_weight(stream, table, torch.rand(rows) + 0.5, columns, trellis)


def on_hashed_trellis(
    rows: int, columns: int, trellis: Trellis, d: int, banded: bool, entries: bool = False
) -> PackedWeight:
    """In bands, in stream order with its 256 `entries` (as on a GPU), or in stream order with a full table."""
    per_row = subvectors_per_row(columns, d)
    stream = trellis.pack(paths(rows, per_row, trellis))
    table = torch.randint(-127, 128, (d, 256)).to(torch.int8)
    scale = (torch.rand(rows) + 0.5) / 64
    if not banded and not entries:
        return packed_weight(stream, table_of(table, trellis.width), scale, columns, trellis)
    sizes = Sizes(rows, columns, d, trellis.width, trellis.stride, trellis.strip_rows, banded=banded)
    stream = hashed.to_bands(stream, trellis, rows, per_row) if banded else stream
    return PackedWeight(stream, table, scale, sizes)


Rates = Iterable[tuple[int, int, int]]  # (width, stride, d) of trellises


def on_trellises(rows: int, columns: int, rates: Rates, strip_rows: int = 16) -> Iterator[PackedWeight]:
    for width, stride, d in rates:
        yield on_trellis(rows, columns, Trellis(width, stride, strip_rows=strip_rows), d)


def in_bands(rows: int, columns: int, rates: Rates, strip_rows: int = 16) -> Iterator[PackedWeight]:
    for width, stride, d in rates:
        yield on_hashed_trellis(rows, columns, Trellis(width, stride, strip_rows=strip_rows), d, banded=True)


def is_same_with_any_number_of_threads(product: Callable[[], Tensor]) -> bool:
    """Whether a product has the same bits with one, two and three threads."""
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(product())
    torch.set_num_threads(before)
    return torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))
