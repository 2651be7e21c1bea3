"""Triton kernels for packed matrices: products with few tokens, and decoding.

Both work on blocks of rows. The index of (row, column of subvectors) takes `width` bits of the stream from bit

    first + row * step + column * pitch        (row within the block)

on; bits before `floor`, where a strip begins, count as zero. On a trellis the indices of consecutive rows overlap, so
that the 32 bits from an index on hold those of `group` rows. They are read as two words of the stream and shifted.
Tensors are [group, columns, groups] then: what one thread has read, it decodes, without exchange between threads.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _block(at):  # type: ignore[no-untyped-def]
    """(bit of the first index, where its strip begins, bits from column to column, rows, the first of them)."""
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _last_word(stream, nbytes):  # type: ignore[no-untyped-def]
    """The bytes after the last full word of the stream."""
    byte, full = tl.arange(0, 4), nbytes // 4 * 4
    found = tl.load(stream + full + byte, mask=byte < nbytes - full, other=0).to(tl.uint32)
    return tl.sum(found << (8 * byte).to(tl.uint32), axis=0)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _bits(stream, nbytes, last, begin, floor, offset, inside):  # type: ignore[no-untyped-def]
    """uint32: the bits of the stream from bit begin + offset on, zero before `floor` and after its end.

    begin, floor: scalars. offset, inside: of one shape.
    """
    bit = (begin & 31).to(tl.int32) + offset
    at, shift = bit >> 5, (bit & 31).to(tl.uint32)
    words = stream.to(tl.pointer_type(tl.uint32)) + (begin >> 5)
    least = tl.maximum(-(begin >> 5), 0).to(tl.int32)
    most = tl.minimum(nbytes // 4 - (begin >> 5), 1 << 30).to(tl.int32)
    low = tl.load(words + at, mask=inside & (at >= least) & (at < most), other=0)
    high = tl.load(words + at + 1, mask=inside & (at + 1 >= least) & (at + 1 < most), other=0)
    low, high = tl.where(at == most, last, low), tl.where(at + 1 == most, last, high)
    found = (low >> shift) | ((high << 1) << (31 - shift))
    before = tl.maximum(tl.maximum(floor - begin, 0).to(tl.int32) - offset, 0).to(tl.uint32)
    return (found >> before) << before


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _reversed(bits):  # type: ignore[no-untyped-def]
    """uint32 with the order of their bits reversed."""
    bits = ((bits >> 1) & 0x55555555) | ((bits & 0x55555555) << 1)
    bits = ((bits >> 2) & 0x33333333) | ((bits & 0x33333333) << 2)
    bits = ((bits >> 4) & 0x0F0F0F0F) | ((bits & 0x0F0F0F0F) << 4)
    bits = ((bits >> 8) & 0x00FF00FF) | ((bits & 0x00FF00FF) << 8)
    return (bits >> 16) | (bits << 16)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _component(  # type: ignore[no-untyped-def]
    table,
    bits,
    n: tl.constexpr,
    width: tl.constexpr,
    stride: tl.constexpr,
    d: tl.constexpr,
    hashed: tl.constexpr,
    group: tl.constexpr,
):
    """Bits [columns, groups] -> component n of what the indices in them decode to: [group, columns, groups] float32."""
    later = (tl.arange(0, group) * stride)[:, None, None].to(tl.uint32)
    window = bits[None, :, :] >> later
    if hashed:  # see hashed_table.py
        high = window >> (width - 8) if n else _reversed(bits)[None, :, :] >> (32 - width - later)
        found = tl.load(table + n * 256 + ((window + high) & 255).to(tl.int32))
    else:
        found = tl.load(table + (window & ((1 << width) - 1)).to(tl.int32) * d + n)
    return found.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _add(  # type: ignore[no-untyped-def]
    total, unit, x, tokens, columns, place, inside, block_tokens: tl.constexpr, block_rows: tl.constexpr
):
    """The sum so far plus products x[token, place[column]] unit[column, row]."""
    if block_tokens == 1:  # summed over columns later
        total += tl.load(x + place, mask=inside, other=0.0)[None, :, None] * unit
    else:
        token = tl.arange(0, block_tokens)
        mask = (token < tokens)[:, None] & inside[None, :]
        factor = tl.load(x + token[:, None] * columns + place[None, :], mask=mask, other=0.0)
        unit = tl.reshape(tl.permute(unit, (1, 0, 2)), (unit.shape[1], block_rows))
        total = tl.dot(factor, unit.to(factor.dtype), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["tokens", "nbytes", "step"])  # type: ignore[untyped-decorator,unused-ignore]
def multiply(  # type: ignore[no-untyped-def]
    x,
    tokens,
    columns,
    stream,
    nbytes,
    table,
    scale,
    blocks,
    step,
    out,
    rows,
    width: tl.constexpr,
    stride: tl.constexpr,
    d: tl.constexpr,
    hashed: tl.constexpr,
    group: tl.constexpr,
    block_tokens: tl.constexpr,
    block_columns: tl.constexpr,
    block_rows: tl.constexpr,
):
    """x [tokens, columns] times a block of rows of U, in one of several parts of the columns: out[part, token, row]."""
    first, floor, pitch, count, top = _block(blocks + tl.program_id(0) * 5)
    column, lead = tl.arange(0, block_columns), tl.arange(0, block_rows // group) * group
    offset, last = column[:, None] * pitch.to(tl.int32) + lead[None, :] * step, _last_word(stream, nbytes)
    part = tl.cdiv(tl.cdiv(tl.cdiv(columns, d), block_columns), tl.num_programs(1)) * block_columns
    start = tl.program_id(1) * part
    stop = tl.minimum(start + part, tl.cdiv(columns, d))
    if block_tokens == 1:
        total = tl.zeros([group, block_columns, block_rows // group], dtype=tl.float32)
    else:
        total = tl.zeros([block_tokens, block_rows], dtype=tl.float32)
    for at in range(start, stop, block_columns):
        there = column < stop - at
        inside = there[:, None] & (lead < count)[None, :]
        bits = _bits(stream, nbytes, last, first + at * pitch, floor, offset, inside)
        for n in tl.static_range(d):
            unit = _component(table, bits, n, width, stride, d, hashed, group)
            place = (at + column) * d + n
            inside_x = there & (place < columns)
            total = _add(total, unit, x, tokens, columns, place, inside_x, block_tokens, block_rows)
    if block_tokens == 1:
        total = tl.reshape(tl.sum(total, axis=1), (1, block_rows))
    row = tl.reshape(tl.arange(0, group)[:, None] + lead[None, :], (1, block_rows))
    token = tl.arange(0, block_tokens)[:, None]
    total *= tl.load(scale + top + row, mask=row < count, other=0.0)
    out += (tl.program_id(1).to(tl.int64) * tokens + token) * rows + top + row
    tl.store(out, total, mask=(token < tokens) & (row < count))


@triton.jit(do_not_specialize=["nbytes", "step"])  # type: ignore[untyped-decorator,unused-ignore]
def decode(  # type: ignore[no-untyped-def]
    columns,
    stream,
    nbytes,
    table,
    blocks,
    step,
    out,
    row_pitch,
    column_pitch,
    width: tl.constexpr,
    stride: tl.constexpr,
    d: tl.constexpr,
    hashed: tl.constexpr,
    group: tl.constexpr,
    block_columns: tl.constexpr,
    block_rows: tl.constexpr,
):
    """A block of rows of U, some columns of it, into out[row * row_pitch + column * column_pitch]."""
    first, floor, pitch, count, top = _block(blocks + tl.program_id(0) * 5)
    start = tl.program_id(1) * block_columns
    column, lead = tl.arange(0, block_columns), tl.arange(0, block_rows // group) * group
    offset, last = column[:, None] * pitch.to(tl.int32) + lead[None, :] * step, _last_word(stream, nbytes)
    inside = (start + column < tl.cdiv(columns, d))[:, None] & (lead < count)[None, :]
    bits = _bits(stream, nbytes, last, first + start * pitch, floor, offset, inside)
    row = tl.arange(0, group)[:, None, None] + lead[None, None, :]
    for n in tl.static_range(d):
        unit = _component(table, bits, n, width, stride, d, hashed, group)
        place = ((start + column) * d + n)[None, :, None]
        at = (top + row) * row_pitch + place.to(tl.int64) * column_pitch
        tl.store(out + at, unit.to(out.dtype.element_ty), mask=(place < columns) & (row < count))
