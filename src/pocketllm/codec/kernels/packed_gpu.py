"""The Triton kernels of packed matrices as functions of tensors.

Up to `FEW_TOKENS` tokens are multiplied straight from the stream: one in float32, several by matrix products with
decoded tiles. For more tokens, and for gradients, some rows of U at a time are decoded into a temporary matrix.
Products of several tokens are bfloat16 if x is, else float32, with sums in float32. Rotations are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pocketllm.codec.kernels import packed_triton
from pocketllm.codec.kernels.packed_cpu import Tensors
from pocketllm.codec.kernels.packed_weight import Sizes, full_table
from pocketllm.codec.kernels.reference import rotate_rows
from pocketllm.codec.subvectors import strip_lengths

# None of these has been measured on a GPU yet; `python benchmarks/gpu_runtime.py` measures products on either side of
# FEW_TOKENS.
FEW_TOKENS = 64
TEMPORARY_WEIGHTS = 1 << 26  # decoded at a time
_PROGRAMS = 1024  # of a product, about
_TILE = 2048  # indices that a program decodes at a time
_LOOKED_UP = 256  # the same of a row that is looked up
_BLOCK_ROWS = (256, 128, 64)
_GROUP_ROWS = 8  # at most
_LEAST_ROWS = 16  # what a matrix product in Triton takes


def multiply(x: Tensor, weight: Tensors, sizes: Sizes) -> Tensor:
    """x [T, columns] -> x W^T [T, rows] float32."""
    if not len(x):
        return x.new_empty(0, sizes.rows, dtype=torch.float32)
    dtype = x.dtype if x.dtype == torch.bfloat16 and len(x) > 1 else torch.float32
    x = _rotated(x, weight.signs_in, inverse=False).to(dtype).contiguous()
    with torch.cuda.device_of(x):
        out = (from_stream if len(x) <= FEW_TOKENS else by_decoding)(x, weight, sizes)
    return _rotated(out, weight.signs_out, inverse=True)


def multiply_transposed(y: Tensor, weight: Tensors, sizes: Sizes) -> Tensor:
    """y [T, rows] -> y W [T, columns] float32."""
    dtype = y.dtype if y.dtype == torch.bfloat16 else torch.float32
    y = (_rotated(y, weight.signs_out, inverse=False) * weight.row_scale).to(dtype)
    out = torch.zeros(len(y), sizes.columns, device=y.device)
    with torch.cuda.device_of(y):
        for rows, unit in _temporaries(weight, sizes, dtype):
            out += y[:, rows] @ unit.T
    return _rotated(out, weight.signs_in, inverse=True)


def look_up(rows: Tensor, weight: Tensors, sizes: Sizes) -> Tensor:
    """Rows [m] int64 of W -> [m, columns] float32; W is not rotated on the side of its rows."""
    first, pitch, floor = sizes.form.first_bits(rows, sizes.rows, sizes.per_row)
    number = torch.arange(len(rows), device=rows.device)
    blocks = torch.stack([first, floor, pitch, torch.ones_like(rows), number], dim=1)
    out = torch.empty(len(rows), sizes.columns, device=rows.device)
    with torch.cuda.device_of(rows):
        _decode(out, (sizes.columns, 1), weight, sizes, blocks, block_rows=1)
    return _rotated(out * weight.row_scale[rows, None], weight.signs_in, inverse=True)


def _rotated(x: Tensor, signs: Tensor | None, inverse: bool) -> Tensor:
    return x.float() if signs is None else rotate_rows(x.float(), signs, inverse)


def from_stream(x: Tensor, weight: Tensors, sizes: Sizes) -> Tensor:
    """x [T, columns] -> x U^T diag(row_scale) [T, rows] float32, straight from the stream, for few rows of x."""
    block_tokens = 1 if len(x) == 1 else max(_LEAST_ROWS, 1 << (len(x) - 1).bit_length())
    block_rows = _block_rows(sizes, _BLOCK_ROWS[0] if block_tokens == 1 else _BLOCK_ROWS[-1])
    block_columns = _TILE // block_rows
    blocks = _blocks(sizes, 0, sizes.rows, block_rows, x.device)
    parts = max(1, min(-(-sizes.per_row // block_columns), _PROGRAMS // len(blocks)))
    out = torch.empty(parts, len(x), sizes.rows, device=x.device)
    stream, table = _read(weight, sizes)
    launch: Any = packed_triton.multiply[(len(blocks), parts)]
    launch(
        *(x, len(x), sizes.columns, stream, stream.numel(), table, weight.row_scale),
        *(blocks, _step(sizes), out, sizes.rows),
        **_constants(weight, sizes, block_rows),
        block_tokens=block_tokens,
        block_columns=block_columns,
    )
    return out[0] if parts == 1 else out.sum(dim=0)


def by_decoding(x: Tensor, weight: Tensors, sizes: Sizes) -> Tensor:
    """The same by decoded rows of U, for any number of rows of x."""
    out = torch.empty(len(x), sizes.rows, device=x.device)
    for rows, unit in _temporaries(weight, sizes, x.dtype):
        out[:, rows] = (x @ unit).float()
    return out * weight.row_scale


def _temporaries(weight: Tensors, sizes: Sizes, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """U, some rows at a time: (which, [columns, rows])."""
    step = max(1, TEMPORARY_WEIGHTS // sizes.columns)
    for begin in range(0, sizes.rows, step):
        end, block_rows, device = min(begin + step, sizes.rows), _block_rows(sizes), weight.stream.device
        out = torch.empty(sizes.columns, end - begin, dtype=dtype, device=device)
        blocks = _blocks(sizes, begin, end, block_rows, device)
        _decode(out, (1, end - begin), weight, sizes, blocks, block_rows)
        yield slice(begin, end), out


def _decode(
    out: Tensor, pitches: tuple[int, int], weight: Tensors, sizes: Sizes, blocks: Tensor, block_rows: int
) -> None:
    """Blocks of rows of U into `out`, whose rows and columns are `pitches` apart."""
    if not len(blocks):
        return
    block_columns = _TILE // block_rows if block_rows > 1 else _LOOKED_UP
    stream, table = _read(weight, sizes)
    launch: Any = packed_triton.decode[(len(blocks), -(-sizes.per_row // block_columns))]
    launch(
        *(sizes.columns, stream, stream.numel(), table, blocks, _step(sizes), out, *pitches),
        **_constants(weight, sizes, block_rows),
        block_columns=block_columns,
    )


def _read(weight: Tensors, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """(stream, table) as the kernels read them: words of the stream, and every index that it can hold."""
    stream, table = weight.stream.contiguous(), weight.table
    stream = stream.clone() if stream.data_ptr() % 4 else stream
    return stream, table.contiguous() if table.dtype == torch.int8 else full_table(table, sizes)


def _constants(weight: Tensors, sizes: Sizes, block_rows: int) -> dict[str, Any]:
    """What kernels are compiled for."""
    rows = (32 - sizes.width) // sizes.stride + 1 if sizes.stride else 1  # whose indices lie in 32 bits
    return {
        "width": sizes.width,
        "stride": sizes.stride,
        "d": sizes.vector_len,
        "hashed": weight.table.dtype == torch.int8,
        "group": min(1 << (rows.bit_length() - 1), _GROUP_ROWS, block_rows),
        "block_rows": block_rows,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def _step(sizes: Sizes) -> int:
    """Bits from the index of a row to that of the next row."""
    return sizes.stride or sizes.per_row * sizes.width


def _lengths(sizes: Sizes) -> list[int]:
    """Rows of each strip."""
    return strip_lengths(sizes.rows, sizes.strip_rows) if sizes.stride else [sizes.rows]


@functools.lru_cache(maxsize=256)
def _block_rows(sizes: Sizes, most: int = _BLOCK_ROWS[0]) -> int:
    """Rows of a block: few of them in vain, many of them next to each other in the stream."""
    if not sizes.stride:
        return _LEAST_ROWS
    longest = max(_lengths(sizes))
    rows = min((rows for rows in _BLOCK_ROWS if rows <= most), key=lambda rows: -(-longest // rows) * rows)
    return max(_LEAST_ROWS, min(rows, 1 << (longest - 1).bit_length()))


@functools.lru_cache(maxsize=256)
def _blocks(sizes: Sizes, begin: int, end: int, block_rows: int, device: torch.device) -> Tensor:
    """[n, 5] int64: blocks of rows of [begin, end), as `packed_triton.multiply` takes them."""
    tops, counts, strip = list[int](), list[int](), 0
    for length in _lengths(sizes):
        for top in range(max(strip, begin), min(strip + length, end), block_rows):
            tops.append(top)
            counts.append(min(block_rows, strip + length - top, end - top))
        strip += length
    rows = torch.tensor(tops)
    first, pitch, floor = sizes.form.first_bits(rows, sizes.rows, sizes.per_row)
    return torch.stack([first, floor, pitch, torch.tensor(counts), rows - begin], dim=1).to(device)
