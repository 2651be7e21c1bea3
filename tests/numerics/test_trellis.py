"""Trellis-coded indices: windows and steps, packing, cheapest paths against exhaustive search, codebooks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pocketllm.codec.codebook import seeded_codebook
from pocketllm.codec.feedback import assign
from pocketllm.codec.hessian import factorize
from pocketllm.codec.index_form import Independent, Trellis, form_for, strip_lengths
from pocketllm.codec.kernels import cpu, library
from pocketllm.codec.trellis_form import PathSearch, reversed_bits
from pocketllm.errors import FormatError
from tests.numerics.test_calibrated import correlated, proxy

CPU = torch.device("cpu")


def naive_windows(steps: list[int], width: int, stride: int) -> list[int]:
    """As FORMAT.md says it, with one long number."""
    stream, found = 0, []
    for number, step in enumerate(steps):
        stream |= step << (number * stride)
        found.append(((stream << width) >> ((number + 1) * stride)) & ((1 << width) - 1))
    return found


@pytest.mark.parametrize(("width", "stride"), [(12, 4), (12, 5), (7, 2), (6, 6), (9, 1), (5, 4)])
def test_windows_are_those_of_the_stream(width: int, stride: int) -> None:
    trellis = Trellis(width, stride)
    steps = torch.randint(0, 1 << stride, (3, 50))
    windows = trellis.windows(steps)
    for row, expected in zip(windows.tolist(), steps.tolist(), strict=True):
        assert row == naive_windows(expected, width, stride)
    assert torch.equal(trellis.steps(windows).long(), steps)


@pytest.mark.parametrize("rows", [1, 2, 100, 383, 384, 576, 1000])
@pytest.mark.parametrize(("width", "stride"), [(8, 3), (6, 4)])
@pytest.mark.parametrize("strip", [16, 256])
def test_paths_survive_packing(rows: int, width: int, stride: int, strip: int) -> None:
    trellis = Trellis(width, stride, strip)
    lengths = strip_lengths(rows, strip)
    assert sum(lengths) == rows and max(lengths) - min(lengths) <= 1
    columns = [
        trellis.windows(torch.randint(0, 1 << stride, (5 * length,))).reshape(5, length).T
        for length in lengths
    ]
    indices = torch.cat(columns)
    stream = trellis.pack(indices)
    assert stream.dtype == torch.uint8 and len(stream) == trellis.nbytes(rows, 5)
    assert torch.equal(trellis.unpack(stream, rows, 5), indices)
    with pytest.raises(FormatError, match="unpack"):
        trellis.unpack(stream[:-1], rows, 5)


def test_index_forms_agree_on_their_size() -> None:
    for form in (form_for(64, 3), form_for(100, 0), form_for(4096, 5)):
        indices = torch.zeros(30, 7, dtype=torch.int64)
        assert len(form.pack(indices)) == form.nbytes(30, 7)
        assert torch.equal(form.unpack(form.pack(indices), 30, 7).long(), indices)
    assert form_for(4096, 5).bits == 5 and form_for(4096, 0).bits == 12
    assert form_for(4096, 5, 16) == Trellis(12, 5, 16) and form_for(100, 0, 16) == Independent(100, 16)


def cheapest(points: Tensor, weights: Tensor, table: Tensor, trellis: Trellis, start: int) -> float:
    """Least cost over every path there is."""
    best = float("inf")
    for steps in itertools.product(range(1 << trellis.stride), repeat=len(points)):
        state, cost = start, 0.0
        for point, weight, step in zip(points, weights, steps, strict=True):
            state = (state >> trellis.stride) | (step << trellis.kept)
            cost += float(weight * (point - table[state]).square().sum())
        best = min(best, cost)
    return best


@pytest.mark.parametrize(("width", "stride", "d"), [(4, 2, 1), (5, 1, 2), (4, 3, 2)])
def test_no_path_is_cheaper(width: int, stride: int, d: int) -> None:
    trellis = Trellis(width, stride)
    points, weights = torch.randn(5, d), torch.rand(5) + 0.5
    table = torch.randn(1 << width, d)
    for start in (0, 3):
        search = PathSearch(trellis.width, trellis.stride, CPU)
        first, ordered = torch.tensor([start]), search.ordered(table[None])
        found = search.search(points, weights, ordered, torch.tensor([0]), [5], first)
        cost = (weights * (points - table[found]).square().sum(dim=1)).sum()
        assert float(cost) == pytest.approx(cheapest(points, weights, table, trellis, start), rel=1e-4)
        shared = found[1:] & ((1 << trellis.kept) - 1)
        assert torch.equal(shared, found[:-1] >> stride)  # it is a path


@pytest.mark.parametrize(
    ("width", "stride", "d"), [(6, 2, 2), (8, 3, 1), (7, 2, 3), (9, 4, 2), (8, 1, 2), (9, 5, 4)]
)
def test_compiled_search_finds_exactly_what_torch_finds(
    width: int, stride: int, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library.library("trellis") is None:
        pytest.skip("no C++ compiler here")
    search, lengths, lookahead = PathSearch(width, stride, CPU), [200, 199, 60], [4, 0, 4]
    rows, last = sum(lengths), torch.tensor(lengths).cumsum(0) - 1
    points, weights = torch.randn(rows + 8, d), torch.rand(rows + 8) + 0.5
    tables = search.ordered(torch.randn(3, 1 << width, d))
    start = torch.randint(0, 1 << width, (3,))

    def run(scale: float, end: Tensor | None, lookahead: list[int] | None) -> Tensor:
        count = rows + sum(lookahead or [])
        which = torch.tensor([1, 2, 0])
        given = points[:count] * scale, weights[:count]
        return search.search(*given, tables, which, lengths, start, end=end, lookahead=lookahead)

    free = run(1.0, None, None)
    cases = [(1.0, None, None), (1.1, free[last], None), (1.0, None, lookahead)]
    found = [run(*case) for case in cases]
    assert torch.equal(found[1][last], free[last]) and all(len(one) == rows for one in found)
    monkeypatch.setattr(cpu, "searches", lambda problem: False)
    for case, expected in zip(cases, found, strict=True):
        assert torch.equal(run(*case), expected)


def test_a_path_that_looks_ahead_ends_where_the_next_column_begins_well() -> None:
    trellis, generator = Trellis(10, 4), torch.Generator().manual_seed(0)
    table = trellis.fit_codebook(torch.randn(1 << 13, 2, generator=generator), 4, 0).table
    search = PathSearch(trellis.width, trellis.stride, CPU)
    tables, none = search.ordered(table[None]), torch.zeros(20, dtype=torch.int64)
    columns = torch.randn(12, 20, 16, 2, generator=generator)
    error = {}
    for ahead in (0, 4):
        before, total = none, 0.0
        for now, after in itertools.pairwise(columns):
            points = torch.cat([now, after[:, :ahead]], dim=1).reshape(-1, 2)
            weights = torch.ones(len(points))
            found = search.search(points, weights, tables, none, [16] * 20, before, lookahead=[ahead] * 20)
            found = found.reshape(20, 16)
            before, total = found[:, -1], total + float((now - table[found]).square().sum())
        error[ahead] = total
    assert error[4] < 0.93 * error[0]


def test_reversed_bits() -> None:
    order = reversed_bits(4)
    assert order[0b0001] == 0b1000 and order[0b1010] == 0b0101
    assert torch.equal(order[order], torch.arange(16))


def test_trellis_beats_independent_indices_at_equal_bits() -> None:
    """2 bits per weight on a Gaussian: Lloyd-Max gives 0.1175, Shannon's bound is 0.0625; width 8 gets under
    0.09 (0.082 to 0.085 with long strips)."""
    points = torch.randn(1 << 15, 2, generator=torch.Generator().manual_seed(1))
    fitted = Trellis(8, 4).fit_codebook(points, 8, 0)
    assert 0.0625 < fitted.errors[-1] < 0.09
    assert list(fitted.errors) == sorted(fitted.errors, reverse=True)
    assert fitted.utilization > 0.99


@pytest.mark.parametrize(("columns", "d"), [(64, 2), (31, 2), (9, 1)])
def test_feedback_on_a_trellis_never_ends_above_the_nearest_path(columns: int, d: int) -> None:
    trellis = Trellis(8, 4)
    weight, hessian = torch.randn(300, columns), correlated(columns)
    table = seeded_codebook(256, d, 5).float()
    factor = factorize(hessian, d)
    damped = factor.hessian[:columns, :columns]
    scale = weight.square().mean(dim=1).sqrt()
    unaware = factorize(torch.eye(columns), d)
    nearest, nearest_scale = assign(weight, unaware, table, scale, trellis, passes=0)
    before = proxy(weight, nearest, nearest_scale, table, damped)
    indices, fitted = assign(weight, factor, table, scale, trellis, passes=0)
    after = proxy(weight, indices, fitted, table, damped)
    descended, refitted = assign(weight, factor, table, scale, trellis, passes=2)
    better = proxy(weight, descended, refitted, table, damped)
    assert float(after.sum()) <= 1.0001 * float(before.sum())
    assert float(better.sum()) <= 1.0001 * float(after.sum())
    assert float(after.sum()) < 0.7 * float(before.sum())
    packed = trellis.pack(indices)  # columns of a strip form one path
    assert torch.equal(trellis.unpack(packed, *indices.shape).long(), indices)
    repacked = trellis.pack(descended)
    assert torch.equal(trellis.unpack(repacked, *descended.shape).long(), descended)


def test_row_weights_shift_precision() -> None:
    weight = torch.randn(256, 32)
    table = seeded_codebook(256, 2, 0).float()
    importance = torch.ones(256)
    importance[::2] = 20.0
    factor = factorize(torch.eye(32), 2)
    indices, scale = assign(
        weight, factor, table, torch.ones(256), Trellis(8, 3), row_importance=importance, passes=0
    )
    error = proxy(weight, indices, scale, table, torch.eye(32))
    assert float(error[::2].sum()) < 0.7 * float(error[1::2].sum())


def test_seeded_codebook_is_fixed_for_ever() -> None:
    """It is part of the stored form: these values must not change."""
    table = seeded_codebook(4096, 2, 7)
    assert table.dtype == torch.float16
    assert torch.equal(table[:10], seeded_codebook(10, 2, 7))
    assert abs(float(table.float().mean())) < 0.03 and abs(float(table.float().std()) - 1) < 0.03
    first = [1.19140625, -0.1724853515625, -1.935546875, 1.8935546875]
    assert seeded_codebook(2, 2, 0).flatten().tolist() == first
