"""Hashed trellises: the hash, bands, and the error on a Gaussian source."""

from __future__ import annotations

import pytest
import torch

from pocketllm.codec.column_choice import strip_lengths
from pocketllm.codec.index_form import Trellis
from pocketllm.codec.kernels import hashed, library
from pocketllm.codec.kernels.packed_op import packed_matmul
from pocketllm.codec.kernels.packed_weight import hashed_weight
from pocketllm.codec.viterbi import PathSearch
from tests.packed_weights import INTEGERS, needs_compiler, paths, relative


@needs_compiler
@pytest.mark.parametrize(("rows", "per_row"), [(1, 1), (16, 8), (37, 51), (130, 9)])
@pytest.mark.parametrize(("width", "stride"), [(12, 1), (12, 3), (9, 2), (16, 5)])
def test_bands_are_a_bijection(rows: int, per_row: int, width: int, stride: int) -> None:
    trellis = Trellis(width, stride, strip_rows=16)
    stream = trellis.pack(paths(rows, per_row, trellis))
    bands = hashed.to_bands(stream, trellis, rows, per_row)
    assert torch.equal(hashed.from_bands(bands, trellis, rows, per_row, stream.numel()), stream)


def test_hash_of_a_window_as_its_formula_says() -> None:
    for width in (9, 12, 16):
        windows = range(0, 1 << width, 37)
        first, second = (hashed.hashed_index(width, component) for component in (0, 1))
        for window in windows:
            low, high = window & 255, window >> (width - 8)
            assert int(first[window]) == (low + int(f"{high:08b}"[::-1], 2)) % 256
            assert int(second[window]) == (low + high) % 256


@pytest.mark.parametrize(
    # On 2^15 fresh points; the bound is 2^(-2 bits), and a table of 4096 free pairs has 0.075 at 2 bits.
    ("width", "stride", "d", "most"),
    [(12, 2, 1, 0.078), (16, 2, 1, 0.074), (12, 3, 1, 0.0215), (12, 3, 2, 0.148)],
)
def test_hashed_trellis_is_as_good_as_a_free_one(width: int, stride: int, d: int, most: float) -> None:
    trellis, points = Trellis(width, stride), torch.randn(1 << 15, d)
    entries, scale, errors = hashed.train_entries(points, trellis, iterations=5, seed=0)
    assert errors[-1] < errors[0]
    fresh, lengths = torch.randn(1 << 15, d), strip_lengths(1 << 15, trellis.strip_rows)
    search = PathSearch(trellis.width, trellis.stride, points.device)
    start = search.first_state(len(lengths))
    codebook = hashed.hashed_codebook(entries, width) * scale
    tables, which = search.ordered(codebook[None]), torch.zeros_like(start)
    indices = search.search(fresh, torch.ones(len(fresh)), tables, which, lengths, start)
    assert float((fresh - codebook[indices]).square().mean()) < most


@pytest.mark.parametrize(("width", "stride"), [(12, 2), (16, 6), (16, 7), (12, 8)])
def test_hashed_weight_is_laid_out_for_this_processor(width: int, stride: int) -> None:
    trellis = Trellis(width, stride)
    stream, entries = trellis.pack(paths(20, 30, trellis)), torch.ones(1, 256, dtype=torch.int8)
    weight = hashed_weight(stream, entries, torch.ones(20), 30, trellis)
    assert weight.sizes.banded == (library.hashed_runs() and 7 * stride + width <= 64)
    assert relative(packed_matmul(torch.ones(1, 30), weight), torch.full((1, 20), 30.0)) < INTEGERS
