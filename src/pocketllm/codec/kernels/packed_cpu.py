"""The CPU kernels as functions of tensors: packed_matmul.cpp and hashed_matmul.cpp behind one product.

Precision: one or two rows of x are multiplied in float32; more of them in bfloat16 if x is, else in float32, by a
matrix product with a few rows of U at a time, so that nothing of the size of W is made. Banded weights (hashed
trellis, banded_cpu.py) take up to 64 rows of x as 16-bit integers with one scale per row, a relative error of about
3e-5, and more rows of bfloat16 as 8-bit integers, about 1e-2. Rotations are float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pocketllm.codec.kernels import library
from pocketllm.codec.kernels.banded_cpu import BANDED_ROWS, PreparedBands
from pocketllm.codec.kernels.library import Isa
from pocketllm.codec.kernels.packed_weight import PackedWeight, Sizes, full_table, kernel_sizes
from pocketllm.codec.kernels.reference import hartley

FEW_ROWS = 2  # of x: up to here they are multiplied one by one, beyond a decoded tile is worth its time
TILE_WEIGHTS = 1 << 20  # of U that are decoded at a time


_ADDRESS, _NUMBER = ctypes.c_void_p, ctypes.c_int64
DTYPES = (torch.float32, torch.bfloat16)  # of what `Prepared` takes and gives


class Tensors(NamedTuple):
    """Those of a `PackedWeight`, without its checks: an operator gets them in every call."""

    stream: Tensor
    table: Tensor
    row_scale: Tensor
    signs_out: Tensor | None
    signs_in: Tensor | None

    def sized(self, sizes: Sizes) -> PackedWeight:
        """The weight that they are of, checked."""
        return PackedWeight(self.stream, self.table, self.row_scale, sizes, self.signs_out, self.signs_in)


def tensors_of(weight: PackedWeight) -> Tensors:
    """The tensors of a weight."""
    return Tensors(weight.stream, weight.table, weight.row_scale, weight.signs_out, weight.signs_in)


def multiply(x: Tensor, weight: Tensors, sizes: Sizes, isa: Isa, bias: Tensor | None = None) -> Tensor:
    """x [T, columns] -> x W^T + bias [T, rows], in float32, or in bfloat16 for many rows of that."""
    if weight.table.dtype == torch.int8 and (isa < Isa.AVX512 or not sizes.banded):
        plain = PackedWeight(*weight[:3], sizes).in_stream_order()
        sizes, weight = plain.sizes, weight._replace(stream=plain.stream, table=plain.table)
    if sizes.banded and len(x) <= BANDED_ROWS:
        prepared = PreparedBands(*weight, sizes)
        return prepared.linear(x if x.dtype in DTYPES else x.float(), bias)
    if len(x) > FEW_ROWS:
        return _multiply_many(x if x.dtype in DTYPES else x.float(), weight, sizes, isa, bias)
    if weight.signs_in is not None:
        x = rotate_(x.to(torch.float32, copy=True), weight.signs_in, isa, inverse=False)
    out = _multiply_rows(x, weight, sizes, isa)
    if weight.signs_out is not None:
        out = rotate_(out, weight.signs_out, isa, inverse=True)
    return out if bias is None else out + bias


def _multiply_many(x: Tensor, weight: Tensors, sizes: Sizes, isa: Isa, bias: Tensor | None) -> Tensor:
    """`multiply` of many rows of x in one of `DTYPES`, by decoded tiles."""
    if sizes.banded and x.dtype == torch.bfloat16:
        return PreparedBands(*weight, sizes).multiply_many(x, bias)
    x, out = x.contiguous(), torch.empty(len(x), sizes.rows, dtype=x.dtype)
    if weight.signs_in is not None:
        x = _rotated(x, torch.empty_like(x), weight.signs_in, isa, inverse=False)
    for begin, end, tile in tiles(weight, sizes, x.dtype, isa):
        if end - begin == sizes.rows:
            torch.mm(x, tile.T, out=out)
        else:
            out[:, begin:end] = x @ tile.T
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    return _rotated(out, out, weight.signs_out, isa, inverse=True, scale=weight.row_scale, bias=bias)


def multiply_rows(x: Tensor, weight: Tensors, sizes: Sizes, isa: Isa, rows: range) -> Tensor:
    """x [T, columns] of one of `DTYPES` -> x W[rows]^T; W is not rotated on the side of its outputs."""
    x, out = x.contiguous(), torch.empty(len(x), len(rows), dtype=x.dtype)
    if weight.signs_in is not None:
        x = _rotated(x, torch.empty_like(x), weight.signs_in, isa, inverse=False)
    for begin, end, tile in tiles(weight, sizes, x.dtype, isa, rows):
        out[:, begin - rows.start : end - rows.start] = x @ tile.T
    scale = weight.row_scale[rows.start : rows.stop].contiguous()
    return _rotated(out, out, None, isa, inverse=True, scale=scale)


def _mixer(signs: Tensor | None) -> Tensor | None:
    """The factor of odd size of a rotation."""
    return None if signs is None else hartley(len(signs) // (len(signs) & -len(signs)))


def _rotated(
    x: Tensor,
    out: Tensor,
    signs: Tensor | None,
    isa: Isa,
    *,
    inverse: bool,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Rows of x [T, n], of one of `DTYPES`, times `scale`, rotated where there are signs, plus bias, into `out`."""
    count, n = x.shape
    mixer = _mixer(signs)
    half, threads = int(x.dtype == torch.bfloat16), torch.get_num_threads()
    sizes = (half, count, n, signs, mixer, int(inverse), scale, bias, int(isa), threads)
    library.call("packed", "packed_rotate", x, out, *sizes)
    return out


def multiply_transposed(y: Tensor, weight: PackedWeight, isa: Isa) -> Tensor:
    """y [T, rows] -> y W [T, columns] float32, of a weight in stream order."""
    y = y.to(torch.float32, copy=True)
    if weight.signs_out is not None:
        y = rotate_(y, weight.signs_out, isa, inverse=False)
    y *= weight.row_scale
    out = torch.zeros(len(y), weight.sizes.columns, dtype=torch.float32)
    for begin, end, tile in tiles(tensors_of(weight), weight.sizes, torch.float32, isa):
        out.addmm_(y[:, begin:end], tile)
    return out if weight.signs_in is None else rotate_(out, weight.signs_in, isa, inverse=True)


def rotate_(x: Tensor, signs: Tensor, isa: Isa, *, inverse: bool) -> Tensor:
    """Rotate the rows of a contiguous x [T, n] float32 in place, as rotation.py does."""
    size = x.shape[1]
    odd = size // (size & -size)
    sizes = (odd, int(inverse), int(isa), torch.get_num_threads())
    library.call("packed", "rotate_vectors", x, len(x), size, signs, hartley(odd), *sizes)
    return x


def tiles(
    weight: Tensors, sizes: Sizes, dtype: torch.dtype, isa: Isa, rows: range | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """Rows of U, a few at a time: (begin, end, [end - begin, columns] of `dtype`, overwritten by the next).

    rows: which; all of them if None.
    """
    rows = range(sizes.rows) if rows is None else rows
    step = max(64, TILE_WEIGHTS // max(1, sizes.columns) // 64 * 64)
    memory = torch.empty(min(step, len(rows)), sizes.columns, dtype=dtype)
    parts = [(begin, min(begin + step, rows.stop)) for begin in range(rows.start, rows.stop, step)]
    if sizes.banded:
        bands = PreparedBands(*weight, sizes)
        for begin, end in parts:
            bands.decode(begin, end, memory)
            yield begin, end, memory[: end - begin]
        return
    table = full_table(weight.table, sizes).to(dtype)
    entry_bytes, row_bytes = (n * table.element_size() for n in (sizes.vector_len, sizes.columns))
    tensors = (weight.stream, weight.stream.numel(), table, entry_bytes, memory, row_bytes)
    for begin, end in parts:
        threads = torch.get_num_threads()
        library.call("packed", "packed_decode", *tensors, begin, end, *kernel_sizes(sizes), int(isa), threads)
        yield begin, end, memory[: end - begin]


def _multiply_rows(x: Tensor, weight: Tensors, sizes: Sizes, isa: Isa) -> Tensor:
    d, n = sizes.vector_len, sizes.per_row
    pitch = _pitch(d)
    x, table = x.float(), full_table(weight.table, sizes)
    if n * d != sizes.columns:
        x = pad(x, (0, n * d - sizes.columns))
    if pitch != d:
        table, x = pad(table, (0, pitch - d)), pad(x.view(len(x), n, d), (0, pitch - d))
    out, x = torch.empty(len(x), sizes.rows, dtype=torch.float32), x.contiguous()
    tensors = (weight.stream, weight.stream.numel(), table, pitch, weight.row_scale, x, len(x), out)
    library.call(
        "packed", "packed_multiply", *tensors, *kernel_sizes(sizes), int(isa), torch.get_num_threads()
    )
    return out


class Prepared:
    """A weight in stream order as the kernels take it at once: addresses and sizes (`Matrix` of packed_matmul.cpp).

    Args:
        weight: on the CPU. isa: the instruction set to run with.
    """

    few_rows = FEW_ROWS

    def __init__(self, weight: PackedWeight, isa: Isa) -> None:
        sizes, d = weight.sizes, weight.sizes.vector_len
        self.rows, self.columns, self.isa = sizes.rows, sizes.columns, int(isa)
        entries = full_table(weight.table, sizes)
        table = entries if _pitch(d) == d else pad(entries, (0, _pitch(d) - d)).contiguous()
        into, out = (
            (None, None) if signs is None else (signs.contiguous(), hartley(size // (size & -size)))
            for size, signs in ((sizes.columns, weight.signs_in), (sizes.rows, weight.signs_out))
        )
        stream, scale = weight.stream.contiguous(), weight.row_scale.contiguous()
        tensors = (stream, stream.numel(), entries, table, d, _pitch(d), scale, *into, *out)
        rows, *others = kernel_sizes(sizes)
        self.kept = tensors  # the addresses are theirs
        values = [
            t.data_ptr() if isinstance(t, Tensor) else t or 0
            for t in (*tensors, sizes.columns, rows, *others)
        ]
        self.matrix = (ctypes.c_int64 * len(values))(*values)
        self.address = ctypes.addressof(self.matrix)
        loaded = library.library("packed")
        assert loaded is not None
        self.run = loaded.packed_linear  # called directly, since it is called for every layer and token
        self.run.argtypes = [_ADDRESS, _ADDRESS, _NUMBER, _NUMBER, _ADDRESS, _ADDRESS, _NUMBER, _NUMBER]

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., columns] -> x W^T + bias [..., rows], for few rows of x of one of `DTYPES`."""
        dtype, x = x.dtype, x.contiguous()
        out = torch.empty(*x.shape[:-1], self.rows, dtype=dtype)
        if bias is not None:
            bias = bias.to(dtype).contiguous()
        half, count = dtype == torch.bfloat16, x.numel() // self.columns
        added = None if bias is None else bias.data_ptr()
        threads = torch.get_num_threads()
        self.run(self.address, x.data_ptr(), half, count, added, out.data_ptr(), self.isa, threads)
        return out

    def look_up(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [m] int64 of W -> [m, columns] of one of `DTYPES`.

        Raises:
            IndexError: a row outside of the matrix.
        """
        rows, half, threads = rows.contiguous(), int(dtype == torch.bfloat16), torch.get_num_threads()
        out = torch.empty(len(rows), self.columns, dtype=dtype)
        if library.call(
            "packed", "packed_look_up", self.address, rows, len(rows), half, out, self.isa, threads
        ):
            raise IndexError(f"index out of range: wanted rows in [0, {self.rows})")
        return out


def _pitch(d: int) -> int:
    """Numbers from one row of a table to the next, for the kernel that multiplies few rows."""
    return d if d in (1, 2) else 4 if d <= 4 else -(-d // 8) * 8
