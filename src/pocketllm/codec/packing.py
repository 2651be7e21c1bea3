"""Indices <-> a dense bit stream, any width from 1 to 24 bits, exact.

Index i occupies bits [i * width, (i + 1) * width) of the stream, least significant bit first; bit b of the
stream is bit b % 8 of byte b // 8. The last byte is padded with zeros. Eight indices therefore take
exactly `width` bytes, and the code works on those groups: lane j of every group starts at the same bit.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pocketllm.codec.subvectors import strip_lengths
from pocketllm.errors import ConfigError, FormatError, ShapeError

MAX_WIDTH = 24
_GROUPS_PER_CHUNK = 1 << 16  # keeps the temporaries in the cache


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `count` indices of `width` bits take."""
    return -(-count * width // 8)


def index_width(codebook_size: int) -> int:
    """Bits of an index in [0, codebook_size), at least 1."""
    return max(1, (codebook_size - 1).bit_length())


def _lane(position: int, width: int) -> tuple[int, int, int]:
    """(first byte, shift, bytes touched) of lane `position` in a group of eight indices."""
    start = position * width
    first, shift = start // 8, start % 8
    return first, shift, -(-(shift + width) // 8)


def pack(indices: Tensor, width: int) -> Tensor:
    """Pack integers into a byte stream.

    Args:
        indices: [N] integer tensor, values in [0, 2^width).
        width: bits per index, 1 to 24.

    Returns:
        uint8 tensor of `packed_bytes(N, width)` bytes, on the same device.

    Raises:
        ConfigError: width out of range.
        ShapeError: not one-dimensional, or a value that does not fit.
    """
    _check_width(width)
    if indices.ndim != 1:
        raise ShapeError(f"pack: got shape {tuple(indices.shape)}, wanted one dimension [N]")
    count = indices.shape[0]
    if count and (int(indices.min()) < 0 or int(indices.max()) >> width):
        raise ShapeError(
            f"pack: indices run from {int(indices.min())} to {int(indices.max())}, "
            f"wanted 0 to {(1 << width) - 1} at {width} bits"
        )
    padded = torch.nn.functional.pad(indices.to(torch.int32), (0, -count % 8)).reshape(-1, 8)
    stream = torch.zeros(padded.shape[0], width, dtype=torch.uint8, device=indices.device)
    for position in range(8):
        first, shift, touched = _lane(position, width)
        shifted = padded[:, position] << shift
        for byte in range(touched):
            stream[:, first + byte] |= ((shifted >> (8 * byte)) & 255).to(torch.uint8)
    return stream.reshape(-1)[: packed_bytes(count, width)].clone()


def unpack(stream: Tensor, width: int, count: int) -> Tensor:
    """Inverse of `pack`.

    Args:
        stream: uint8 tensor of exactly `packed_bytes(count, width)` bytes.

    Returns:
        [count] int32 tensor on the same device.

    Raises:
        ConfigError: width out of range.
        FormatError: the stream has another length.
    """
    _check_width(width)
    if stream.dtype != torch.uint8 or stream.numel() != packed_bytes(count, width):
        raise FormatError(
            f"unpack: got {stream.numel()} values of {stream.dtype}, wanted "
            f"{packed_bytes(count, width)} bytes for {count} indices of {width} bits"
        )
    groups = -(-count // 8)
    missing = groups * width - stream.numel()
    if missing:
        stream = torch.nn.functional.pad(stream, (0, missing))
    grouped = stream.reshape(groups, width)
    out = torch.empty(groups, 8, dtype=torch.int32, device=stream.device)
    for begin in range(0, groups, _GROUPS_PER_CHUNK):
        part = grouped[begin : begin + _GROUPS_PER_CHUNK].T.contiguous().to(torch.int32)
        _unpack_groups(part, width, out[begin : begin + _GROUPS_PER_CHUNK])
    return out.reshape(-1)[:count]


def _unpack_groups(bytes_: Tensor, width: int, out: Tensor) -> None:
    """[width, groups] int32 bytes -> [groups, 8] indices, in place."""
    mask = (1 << width) - 1
    for position in range(8):
        first, shift, touched = _lane(position, width)
        value = bytes_[first] >> shift
        for byte in range(1, touched):
            value |= bytes_[first + byte] << (8 * byte - shift)
        out[:, position] = value & mask


@functools.lru_cache(maxsize=256)
def strip_places(
    rows: int, strip_rows: int, per_row: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Where strips of rows lie if each is packed into bytes of its own. Not to be modified.

    Returns:
        [strips] int64 each: the row that a strip ends before, its length, and the bit of the stream it begins at.
    """
    lengths = strip_lengths(rows, strip_rows)
    nbytes = [packed_bytes(length * per_row, width) for length in lengths]
    length, size = (torch.tensor(part, device=device) for part in (lengths, nbytes))
    return length.cumsum(0), length, (size.cumsum(0) - size) * 8


def _check_width(width: int) -> None:
    if not 1 <= width <= MAX_WIDTH:
        raise ConfigError(f"index width: got {width} bits, wanted 1 to {MAX_WIDTH}")
