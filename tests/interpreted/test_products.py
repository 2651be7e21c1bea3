"""Products with packed matrices as a GPU computes them: every form against the reference, in Triton's interpreter."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from pocketllm.codec.index_form import Trellis
from pocketllm.codec.kernels import library, packed_gpu, select
from pocketllm.codec.kernels.packed_cpu import tensors_of
from pocketllm.codec.kernels.packed_op import (
    gpu_products_differ,
    packed_matmul,
    packed_matmul_reference,
    transposed_reference,
)
from pocketllm.codec.kernels.packed_product import PackedProduct
from pocketllm.codec.kernels.packed_weight import PackedWeight
from tests.packed_weights import FLOAT32, independent, on_hashed_trellis, on_trellis, relative

BFLOAT16 = 6e-3  # U, and beyond FEW_TOKENS the product, are rounded to 8 bits
SHORT = 16  # rows of a strip
RATES = ((12, 4, 2), (12, 3, 2), (12, 5, 2), (12, 1, 1), (12, 8, 4), (6, 6, 3), (16, 7, 1), (24, 2, 1))
HASHED_RATES = ((12, 1, 1), (12, 2, 1), (12, 3, 1), (12, 8, 1), (16, 4, 1), (9, 2, 2), (12, 7, 2), (16, 6, 2))


def hashed(rows: int, columns: int, trellis: Trellis, d: int) -> PackedWeight:
    return on_hashed_trellis(rows, columns, trellis, d, banded=False, entries=True)


def every_form(rows: int, columns: int, strip_rows: int) -> Iterator[PackedWeight]:
    for width, d in ((1, 1), (5, 2), (8, 4), (12, 3), (15, 8), (7, 12), (20, 1)):
        yield independent(rows, columns, width, d)
    yield independent(rows, columns, width=9, d=2, size=300)
    for width, stride, d in RATES:
        yield on_trellis(rows, columns, Trellis(width, stride, strip_rows), d)
    for width, stride, d in HASHED_RATES:
        yield hashed(rows, columns, Trellis(width, stride, strip_rows), d)


def decoded(weight: PackedWeight) -> Tensor:
    """diag(row_scale) U as the kernels decode it."""
    return packed_gpu.multiply_transposed(torch.eye(weight.sizes.rows), tensors_of(weight), weight.sizes)


def test_every_form_decodes_exactly() -> None:
    for weight in every_form(21, 25, SHORT):
        wanted = weight.unit() * weight.row_scale[:, None]
        assert torch.equal(decoded(weight), wanted)


def some_forms(rows: int, columns: int) -> Iterator[PackedWeight]:
    yield independent(rows, columns, 9, d=2, size=300)
    yield on_trellis(rows, columns, Trellis(12, 4, SHORT), 2)
    yield hashed(rows, columns, Trellis(12, 3, SHORT), 1)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 7), (37, 50)])
def test_rows_and_matrices_of_any_size(rows: int, columns: int) -> None:
    some = torch.tensor([0, rows - 1, rows // 2])
    for weight in some_forms(rows, columns):
        wanted = weight.unit() * weight.row_scale[:, None]
        assert torch.equal(decoded(weight), wanted)
        assert torch.equal(packed_gpu.look_up(some, tensors_of(weight), weight.sizes), wanted[some])
        check(weight, 1, torch.float32, FLOAT32)


def test_every_form_multiplies() -> None:
    for weight in every_form(21, 25, SHORT):
        check(weight, 1, torch.bfloat16, FLOAT32)
    for weight in some_forms(21, 25):
        check(weight, 3, torch.float32, FLOAT32)
        check(weight, 3, torch.bfloat16, BFLOAT16)


def check(weight: PackedWeight, count: int, dtype: torch.dtype, tolerance: float) -> None:
    x = torch.randn(count, weight.sizes.columns).to(dtype)
    found = packed_gpu.multiply(x, tensors_of(weight), weight.sizes)
    assert found.dtype == torch.float32
    assert relative(found, packed_matmul_reference(x, weight, torch.float64)) < tolerance


def ragged() -> Iterator[PackedWeight]:
    """Several blocks in a strip, several parts of the columns, rotations on either side."""
    yield on_trellis(80, 200, Trellis(12, 4, strip_rows=80), 2).rotated((1, 2))
    yield hashed(70, 160, Trellis(12, 2, strip_rows=72), 1).rotated((None, 2))
    yield independent(24, 600, width=8, d=4).rotated((1, None))


@pytest.mark.parametrize("count", [0, 1, 17, packed_gpu.FEW_TOKENS + 1])
def test_many_blocks_and_tokens(count: int) -> None:
    for weight in ragged():
        check(weight, count, torch.float32, FLOAT32)
        check(weight, count, torch.bfloat16, BFLOAT16)


def test_matrices_that_are_decoded_in_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_gpu, "FEW_TOKENS", 0)
    monkeypatch.setattr(packed_gpu, "TEMPORARY_WEIGHTS", 20 * 51)  # 20 rows
    for weight in (hashed(70, 51, Trellis(12, 3, SHORT), 1), independent(37, 51, 5, 3)):
        check(weight, 2, torch.float32, FLOAT32)
        y = torch.randn(2, weight.sizes.rows)
        found = packed_gpu.multiply_transposed(y, tensors_of(weight), weight.sizes)
        assert relative(found, transposed_reference(y, weight, torch.float64)) < FLOAT32


def between_guards(stream: Tensor, at_end: bool) -> Tensor:
    """A copy of a stream that begins or ends where memory ends that may be read."""
    page = mmap.PAGESIZE
    inside = -(-stream.numel() // page) * page
    memory = mmap.mmap(-1, inside + 2 * page)
    whole = np.frombuffer(memory, dtype=np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for guard in (0, page + inside):
        assert not protect(ctypes.c_void_p(whole.ctypes.data + guard), ctypes.c_size_t(page), 0)
    first = page + (inside - stream.numel() if at_end else 0)
    found = torch.from_numpy(whole[first : first + stream.numel()])
    return found.copy_(stream)


@pytest.mark.parametrize("at_end", [False, True])
def test_nothing_is_read_outside_of_the_stream(at_end: bool) -> None:
    """A read beyond it ends the process."""
    for weight in (
        on_trellis(32, 24, Trellis(12, 4, SHORT), 2),
        hashed(32, 24, Trellis(16, 3, SHORT), 1),
        independent(32, 24, 8, 2),
    ):
        assert weight.stream.numel() % 4 == 0
        guarded = dataclasses.replace(weight, stream=between_guards(weight.stream, at_end))
        assert torch.equal(decoded(guarded), decoded(weight))
        check(guarded, 1, torch.float32, FLOAT32)
        check(guarded, 3, torch.float32, FLOAT32)


def test_streams_that_begin_anywhere() -> None:
    weight = on_trellis(37, 51, Trellis(12, 4, SHORT), 2)
    for first in range(1, 4):
        around = torch.full((weight.stream.numel() + 8,), 255, dtype=torch.uint8)
        stream = around[first : first + weight.stream.numel()].copy_(weight.stream)
        assert torch.equal(decoded(dataclasses.replace(weight, stream=stream)), decoded(weight))


@pytest.fixture
def _on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of a GPU serve the tensors of a CPU."""
    monkeypatch.setattr(select, "packed_isa", lambda: None)
    monkeypatch.setattr(select, "packed_gpu", lambda device: packed_gpu)


def test_the_self_check_tells_right_from_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "hashed_runs", lambda: False)  # no bands, which a GPU does not have
    few, device = packed_gpu.FEW_TOKENS, torch.device("cpu")
    assert gpu_products_differ(packed_gpu.multiply, few, device) == ""
    found = gpu_products_differ(lambda *call: packed_gpu.multiply(*call) * 1.1, few, device)
    assert "products are off by 1.0e-01" in found


@pytest.mark.usefixtures("_on_gpu")
def test_the_operator_and_its_gradient() -> None:
    weight = on_trellis(37, 51, Trellis(12, 4, SHORT), 2).rotated((1, 2))
    x, direction = torch.randn(2, 3, 51, requires_grad=True), torch.randn(2, 3, 37)
    found = packed_matmul(x, weight)
    assert relative(found.detach(), packed_matmul_reference(x.detach(), weight, torch.float64)) < FLOAT32
    (found * direction).sum().backward()
    assert x.grad is not None
    assert relative(x.grad, transposed_reference(direction, weight, torch.float64)) < FLOAT32
    half = packed_matmul(x.detach().half(), weight)
    assert half.dtype == torch.float16 and relative(half, found.detach()) < 1e-3


@pytest.mark.usefixtures("_on_gpu")
def test_products_and_rows_of_layers() -> None:
    weight = hashed(37, 48, Trellis(12, 3, SHORT), 2).rotated((None, 2))
    product, x, bias = PackedProduct(weight), torch.randn(2, 48), torch.randn(37)
    wanted = packed_matmul_reference(torch.eye(48), weight, torch.float64).T
    assert relative(product.linear(x, bias), x @ wanted.float().T + bias) < 2 * FLOAT32
    rows = torch.tensor([[0, 36], [7, 7]])
    assert relative(product.look_up(rows, torch.float32), wanted[rows]) < FLOAT32
    assert product.look_up(rows, torch.bfloat16).dtype == torch.bfloat16
