"""Packing is an exact bijection with the documented stream: least significant bit first, no gaps."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
import torch
from torch import Tensor

from pocketllm.codec.packing import MAX_WIDTH, index_width, pack, packed_bytes, unpack
from pocketllm.errors import ConfigError, FormatError, ShapeError

WIDTHS = range(1, MAX_WIDTH + 1)
COUNTS = (0, 1, 7, 8, 9, 63, 1000)
SEVERAL_CHUNKS = 65536 * 8 + 5  # one more than a chunk of `unpack`, and ragged


def random_indices(count: int, width: int) -> Tensor:
    """[count] int64 over the whole range, both ends included where there is room."""
    indices = torch.randint(0, 1 << width, (count,))
    if count > 1:
        indices[0], indices[-1] = (1 << width) - 1, 0
    return indices


def naive_stream(indices: Tensor, width: int) -> bytes:
    """The stream as one big integer."""
    number = 0
    for position, index in enumerate(indices.tolist()):
        number |= index << (position * width)
    return number.to_bytes((len(indices) * width + 7) // 8, "little")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", COUNTS)
def test_pack_equals_the_big_integer_and_unpack_inverts_it(width: int, count: int) -> None:
    indices = random_indices(count, width)
    stream = pack(indices, width)
    assert stream.dtype == torch.uint8
    assert bytes(stream.tolist()) == naive_stream(indices, width)
    assert len(stream) == packed_bytes(count, width)
    back = unpack(stream, width, count)
    assert back.dtype == torch.int32
    assert torch.equal(back.long(), indices)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_stream_is_the_packing_of_its_indices(width: int) -> None:
    """The other direction of the bijection: any bytes survive unpack, then pack."""
    stream = torch.randint(0, 256, (13 * width,), dtype=torch.uint8)
    assert torch.equal(pack(unpack(stream, width, 13 * 8), width), stream)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("value", ["ones", "zeros"])
def test_extreme_values_do_not_leak_into_their_neighbours(width: int, value: str) -> None:
    indices = torch.full((11,), (1 << width) - 1 if value == "ones" else 0)
    for odd in range(11):
        indices[odd] ^= (1 << width) - 1
        stream = pack(indices, width)
        assert bytes(stream.tolist()) == naive_stream(indices, width)
        assert torch.equal(unpack(stream, width, 11).long(), indices)


@pytest.mark.parametrize("width", [1, 7, 12, 15, 24])
def test_more_indices_than_one_chunk(width: int) -> None:
    indices = random_indices(SEVERAL_CHUNKS, width)
    stream = pack(indices, width)
    bits = (indices.numpy()[:, None] >> np.arange(width)) & 1
    assert np.array_equal(stream.numpy(), np.packbits(bits.astype(np.uint8).ravel(), bitorder="little"))
    assert torch.equal(unpack(stream, width, SEVERAL_CHUNKS).long(), indices)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_packs_alike(dtype: torch.dtype) -> None:
    indices = torch.arange(100)
    assert torch.equal(pack(indices.to(dtype), 9), pack(indices, 9))


def test_pack_leaves_its_input_alone_and_takes_strided_tensors() -> None:
    indices = torch.arange(64)
    before = indices.clone()
    every_third = indices[::3]
    assert torch.equal(unpack(pack(every_third, 6), 6, len(every_third)).long(), every_third)
    assert torch.equal(indices, before)


@pytest.mark.parametrize(
    ("codebook_size", "width"),
    [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (4096, 12), (4097, 13), (1 << 24, 24)],
)
def test_index_width(codebook_size: int, width: int) -> None:
    assert index_width(codebook_size) == width


@pytest.mark.parametrize("width", [-1, 0, 25])
def test_width_out_of_range(width: int) -> None:
    with pytest.raises(ConfigError, match=f"index width: got {width} bits, wanted 1 to 24"):
        pack(torch.zeros(8, dtype=torch.int64), width)
    with pytest.raises(ConfigError, match=f"index width: got {width} bits, wanted 1 to 24"):
        unpack(torch.zeros(8, dtype=torch.uint8), width, 8)


def test_pack_wants_one_dimension() -> None:
    with pytest.raises(ShapeError, match=r"got shape \(2, 4\), wanted one dimension"):
        pack(torch.zeros(2, 4, dtype=torch.int64), 3)


@pytest.mark.parametrize("bad", [-1, 8, 1 << 32])
def test_pack_wants_values_that_fit(bad: int) -> None:
    with pytest.raises(ShapeError, match="wanted 0 to 7 at 3 bits"):
        pack(torch.tensor([3, bad, 0]), 3)


@pytest.mark.parametrize("length", [0, 11, 13])
def test_unpack_wants_the_exact_length(length: int) -> None:
    with pytest.raises(FormatError, match="wanted 12 bytes for 8 indices of 12 bits"):
        unpack(torch.zeros(length, dtype=torch.uint8), 12, 8)


def test_unpack_wants_bytes() -> None:
    with pytest.raises(FormatError, match=r"12 values of torch\.int8"):
        unpack(torch.zeros(12, dtype=torch.int8), 12, 8)


@pytest.mark.skipif(
    os.environ.get("POCKETLLM_THROUGHPUT") != "1",
    reason="a timing, which depends on the machine and its load; set POCKETLLM_THROUGHPUT=1 to run it",
)
def test_throughput_unpack_50_million_indices_per_second() -> None:
    """Best of five at 12 bits, 2^24 indices."""
    count = 1 << 24
    stream = torch.randint(0, 256, (packed_bytes(count, 12),), dtype=torch.uint8)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        unpack(stream, 12, count)
        seconds.append(time.perf_counter() - begin)
    assert count / min(seconds) >= 50e6, f"{count / min(seconds) / 1e6:.1f} M indices/s"
