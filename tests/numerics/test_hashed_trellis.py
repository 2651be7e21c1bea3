"""Hashed trellises: the hash, bands, and the error on a Gaussian source."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from pocketllm.codec.hashed_table import (
    ENTRIES,
    UNIT,
    hashed_index,
    hashed_table,
    int8_entries,
    off_halves,
    rounded_entries,
)
from pocketllm.codec.index_form import HashedTrellis, Trellis, form_for
from pocketllm.codec.kernels import hashed, library
from pocketllm.codec.kernels.packed_op import packed_matmul
from pocketllm.codec.kernels.packed_weight import hashed_weight, table_of
from pocketllm.codec.subvectors import strip_lengths
from pocketllm.codec.trellis_form import PathSearch
from pocketllm.config.constants import HASHED_NMSE
from pocketllm.errors import ConfigError, ShapeError
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
        first, second = (hashed_index(width, component) for component in (0, 1))
        for window in windows:
            low, high = window & 255, window >> (width - 8)
            assert int(first[window]) == (low + int(f"{high:08b}"[::-1], 2)) % 256
            assert int(second[window]) == (low + high) % 256


def test_every_codeword_is_used_equally_often() -> None:
    for component in (0, 1):  # where low and high byte share no bits
        assert torch.bincount(hashed_index(16, component)).tolist() == [256] * ENTRIES


def test_a_table_holds_the_entries_that_windows_are_hashed_to() -> None:
    codebook = torch.randn(2, 3, ENTRIES, 2).clamp(-3.9, 3.9)
    table, entries = hashed_table(codebook, 10), rounded_entries(codebook)
    for window in range(0, 1 << 10, 17):
        for component in (0, 1):
            entry = entries[..., int(hashed_index(10, component)[window]), component]
            assert torch.equal(table[..., window, component], entry)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=40))
def test_entries_are_the_nearest_thirtyseconds_of_a_byte(values: list[float]) -> None:
    decoded = torch.tensor(values, dtype=torch.float32)
    rounded = rounded_entries(decoded)
    units = rounded * 32
    assert torch.equal(units, units.round()) and float(units.abs().max()) <= 127
    assert bool(((rounded - decoded).abs() <= 1 / 64).logical_or(rounded.abs() == 127 / 32).all())
    assert torch.equal(rounded_entries(rounded), rounded)


def test_int8_entries_are_the_rounded_ones() -> None:
    codebook = 3 * torch.randn(ENTRIES, 2)
    entries = int8_entries(codebook)
    assert entries.dtype == torch.int8 and entries.shape == (2, ENTRIES) and int(entries.min()) >= -127
    assert torch.equal(entries.T * UNIT, rounded_entries(codebook))
    assert torch.equal(table_of(entries, 12) * UNIT, hashed_table(codebook, 12))


def test_gradient_of_a_codeword_is_the_sum_over_the_windows_that_use_it() -> None:
    codebook, weight = torch.randn(ENTRIES, 2, requires_grad=True), torch.randn(1 << 9, 2)
    (hashed_table(codebook, 9) * weight).sum().backward()
    wanted = torch.zeros(ENTRIES, 2)
    for component in (0, 1):
        wanted[:, component].index_add_(0, hashed_index(9, component), weight[:, component])
    torch.testing.assert_close(codebook.grad, wanted)


def fresh_error(trellis: HashedTrellis, codebook: Tensor, count: int) -> float:
    points, lengths = torch.randn(count, codebook.shape[1]), strip_lengths(count, trellis.strip_rows)
    search = PathSearch(trellis.width, trellis.stride, points.device)
    start, table = search.first_state(len(lengths)), trellis.table(codebook)
    tables, which = search.ordered(table[None]), torch.zeros_like(start)
    indices = search.search(points, torch.ones(count), tables, which, lengths, start)
    return float((points - table[indices]).square().mean())


@pytest.mark.parametrize(("d", "stride"), HASHED_NMSE)
def test_errors_that_plans_expect_are_those_of_a_gaussian(d: int, stride: int) -> None:
    """Fitted to 2^15 points; fewer than in a compression, so that the error may be a little above."""
    trellis = HashedTrellis(12, stride)
    fitted = trellis.fit_codebook(torch.randn(1 << 15, d), iterations=3, seed=0)
    assert fitted.errors[-1] < fitted.errors[0] and fitted.utilization > 0.8
    expected = trellis.predicted_nmse(d)
    assert 0.95 * expected < fresh_error(trellis, fitted.table, 1 << 14) < 1.15 * expected


def test_wider_windows_have_smaller_errors_as_predicted() -> None:
    points, trellises = torch.randn(1 << 13, 2), (HashedTrellis(12, 4), HashedTrellis(14, 4))
    narrow, wide = (trellis.fit_codebook(points, 2, 0).errors[-1] for trellis in trellises)
    expected = [trellis.predicted_nmse(2) for trellis in trellises]
    assert wide / narrow == pytest.approx(expected[1] / expected[0], rel=0.05)


def test_codewords_are_stored_away_from_halves_of_entries() -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite() & (every.abs() < 4)].float()
    stored = off_halves(every).float()
    moved = stored != every
    assert not ((stored * 32).frac().abs() == 0.5).any() and bool(((every[moved] * 64) % 2 == 1).all())
    nearly = stored + torch.tensor([-1e-6, 1e-6])[:, None] * stored.abs()
    assert torch.equal(rounded_entries(nearly[0]), rounded_entries(nearly[1]))


def test_a_step_without_a_measured_error_has_that_of_any_trellis() -> None:
    assert HashedTrellis(12, 6).predicted_nmse(2) == Trellis(12, 6).predicted_nmse(2)


@pytest.mark.parametrize(
    ("size", "stride", "window"), [(256, 3, 8), (256, 3, 17), (256, 0, 12), (256, 13, 12), (4096, 3, 12)]
)
def test_stored_values_that_are_no_hashed_trellis(size: int, stride: int, window: int) -> None:
    with pytest.raises(ValueError, match=f"stride {stride} and windows of {window} bits do not fit"):
        form_for(size, stride, 256, window)


def test_errors_say_what_was_wanted() -> None:
    with pytest.raises(ConfigError, match="wanted 9 to 16"):
        hashed_index(8, 0)
    with pytest.raises(ConfigError, match="vector_len 1 or 2"):
        hashed_index(12, 2)
    for wrong in (torch.zeros(256), torch.zeros(255, 1), torch.zeros(256, 3)):
        with pytest.raises(ShapeError, match=r"wanted \[256, 1\] or \[256, 2\]"):
            hashed_table(wrong, 12)


@pytest.mark.parametrize(("width", "stride"), [(12, 2), (16, 6), (16, 7), (12, 8)])
def test_hashed_weight_is_laid_out_for_this_processor(width: int, stride: int) -> None:
    trellis = Trellis(width, stride)
    stream, entries = trellis.pack(paths(20, 30, trellis)), torch.ones(1, 256, dtype=torch.int8)
    weight = hashed_weight(stream, entries, torch.ones(20), 30, trellis)
    assert weight.sizes.banded == (library.hashed_runs() and 7 * stride + width <= 64)
    assert relative(packed_matmul(torch.ones(1, 30), weight), torch.full((1, 20), 30.0)) < INTEGERS
