"""Cutting rows into subvectors and joining them again loses nothing and pads only with zeros."""

from __future__ import annotations

import pytest
import torch

from pocketllm.codec.subvectors import cut, join, subvectors_per_row
from pocketllm.errors import ShapeError

SHAPES = [(1, 1), (1, 8), (3, 5), (5, 7), (2, 16), (4, 17), (7, 576)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vector_len", [1, 2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_join_inverts_cut(shape: tuple[int, int], vector_len: int, dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    parts = cut(weight, vector_len)
    assert parts.shape == (shape[0], -(-shape[1] // vector_len), vector_len)
    assert parts.dtype == dtype
    assert torch.equal(join(parts, shape[1]), weight)
    assert not parts.reshape(shape[0], -1)[:, shape[1] :].any()


def test_subvectors_run_along_the_row() -> None:
    expected = [[[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 0.0, 0.0]], [[6.0, 7.0, 8.0, 9.0], [10.0, 11.0, 0.0, 0.0]]]
    assert cut(torch.arange(12.0).reshape(2, 6), 4).tolist() == expected


def test_cut_is_a_view_without_padding() -> None:
    weight = torch.randn(3, 8)
    assert cut(weight, 4).data_ptr() == weight.data_ptr()


def test_cut_takes_a_transposed_matrix() -> None:
    weight = torch.randn(9, 4).T
    assert torch.equal(join(cut(weight, 2), 9), weight)


@pytest.mark.parametrize(
    ("columns", "vector_len", "count"), [(1, 1, 1), (1, 8, 1), (8, 8, 1), (9, 8, 2), (576, 6, 96)]
)
def test_subvectors_per_row(columns: int, vector_len: int, count: int) -> None:
    assert subvectors_per_row(columns, vector_len) == count


@pytest.mark.parametrize("shape", [(), (8,), (2, 3, 4)])
def test_cut_wants_a_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="wanted a matrix"):
        cut(torch.zeros(shape), 4)


@pytest.mark.parametrize(("shape", "columns"), [((2, 8), 8), ((2, 2, 4), 9), ((2, 2, 4), 4), ((2, 2, 4), 0)])
def test_join_wants_subvectors_that_cover_the_row(shape: tuple[int, ...], columns: int) -> None:
    with pytest.raises(ShapeError, match=rf"ceil\({columns} / d\)"):
        join(torch.zeros(shape), columns)
