"""Products and rows as layers use them: by one call of a kernel, and in torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pocketllm.codec.index_form import Trellis
from pocketllm.codec.kernels import library, select
from pocketllm.codec.kernels.packed_op import packed_matmul_reference
from pocketllm.codec.kernels.packed_product import PackedProduct
from pocketllm.codec.kernels.packed_weight import PackedWeight
from pocketllm.codec.kernels.reference import hartley
from pocketllm.errors import ShapeError
from tests.packed_weights import (
    FLOAT32,
    INTEGERS,
    in_bands,
    independent,
    is_same_with_any_number_of_threads,
    needs_compiler,
    on_hashed_trellis,
    on_trellis,
    on_trellises,
    relative,
)

BFLOAT16 = 4e-3  # the product is rounded to 8 bits, nothing before it
ROUNDED_TWICE = 6e-3
BANDED_RATES = ((12, 1, 1), (12, 3, 1), (16, 4, 1), (12, 1, 2), (12, 4, 2), (12, 7, 2), (9, 2, 2))


def weights() -> Iterator[PackedWeight]:
    """Every form, in ragged sizes, rotated on either side and on none."""
    for rows, columns in ((1, 1), (3, 7), (37, 50), (130, 51)):
        for d in (1, 2, 3, 5, 8, 12):
            yield independent(rows, columns, width=7, d=d)
        yield independent(rows, columns, width=9, d=2, size=300).rotated((None, 3))
        for weight in on_trellises(
            rows, columns, ((12, 4, 2), (12, 3, 2), (14, 8, 4), (6, 6, 3), (16, 2, 1))
        ):
            yield from (weight, weight.rotated((1, 2)), weight.rotated((None, 2)), weight.rotated((1, None)))


def banded() -> Iterator[PackedWeight]:
    """Hashed trellises in bands, which are what a processor with the kernel has."""
    for rows, columns in ((1, 1), (3, 7), (37, 50), (130, 51), (200, 36)):
        for weight in in_bands(rows, columns, BANDED_RATES):
            yield from (weight, weight.rotated((1, 2)), weight.rotated((None, 2)), weight.rotated((1, None)))


needs_bands = pytest.mark.skipif(not library.hashed_runs(), reason="no kernel for hashed trellises")


@pytest.fixture(params=["kernel", "torch"])
def _either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(select, "packed_isa", lambda: None)


@pytest.mark.usefixtures("_either")
@pytest.mark.parametrize("count", [1, 2, 5])
def test_products(count: int) -> None:
    for weight in weights():
        x, bias = torch.randn(1, count, weight.sizes.columns), torch.randn(weight.sizes.rows)
        product, wanted = PackedProduct(weight), packed_matmul_reference(x, weight, torch.float64)
        assert relative(product.linear(x), wanted) < FLOAT32
        assert relative(product.linear(x, bias), wanted + bias) < FLOAT32


@needs_compiler
def test_products_in_bfloat16_are_rounded_once() -> None:
    for weight in weights():
        x, bias = torch.randn(2, weight.sizes.columns).bfloat16(), torch.randn(weight.sizes.rows).bfloat16()
        wanted = packed_matmul_reference(x, weight, torch.float64) + bias
        found = PackedProduct(weight).linear(x, bias)
        assert found.dtype == torch.bfloat16 and relative(found, wanted) < BFLOAT16


@needs_bands
@pytest.mark.parametrize("count", [1, 2, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_bands(count: int, dtype: torch.dtype) -> None:
    for weight in banded():
        x = torch.randn(1, count, weight.sizes.columns).to(dtype)
        bias = torch.randn(weight.sizes.rows).to(dtype)
        product, wanted = PackedProduct(weight), packed_matmul_reference(x, weight, torch.float64)
        found = product.linear(x, bias)
        tolerance = 2 * INTEGERS if dtype == torch.float32 else BFLOAT16
        if dtype == torch.bfloat16 and count > 64:
            tolerance = 2 * ROUNDED_TWICE  # x is rounded after its rotation, too
        assert found.dtype == dtype and relative(found, wanted + bias) < tolerance
        assert torch.equal(product.linear(x), product.linear(x, torch.zeros_like(bias)))


@needs_bands
@pytest.mark.parametrize("columns", [50, 64])
def test_many_rows_as_integers_of_their_own_scale(columns: int) -> None:
    """One row does not change what another gives, whatever its size; what is not finite stays visible."""
    weight = on_hashed_trellis(37, columns, Trellis(12, 2, strip_rows=16), 1, banded=True).rotated((1, 2))
    product, x = PackedProduct(weight), torch.randn(83, columns).bfloat16()
    before = product.linear(x)
    x[3], x[20], x[80] = 0, x[20] * 1024, float("nan")
    x[40, 7] = float("inf")
    found, same = product.linear(x), torch.ones(83, dtype=torch.bool)
    assert not found[3].any() and torch.equal(found[20], before[20] * 1024)
    assert bool(found[80].isnan().all()) and bool(found[40].isnan().all())
    same[[3, 20, 40, 80]] = False
    assert torch.equal(found[same], before[same])


@needs_bands
@pytest.mark.parametrize("count", [65, 300])
def test_many_rows_are_exact_products_of_integers(count: int) -> None:
    """Bit by bit what rotations and a product of integers in float64 give, in tiles and blocks that do not fill up."""
    for bare in in_bands(37, 51, ((12, 3, 1), (12, 4, 2))):
        weight = bare.rotated((1, 2))
        mixers = [hartley(size // (size & -size)) for size in (51, 37)]
        x, bias = torch.randn(count, 51).bfloat16(), torch.randn(37).bfloat16()
        whole, unit = torch.empty(count, 51, dtype=torch.int8), torch.empty(count)
        into = (count, 51, weight.signs_in, mixers[0], int(library.Isa.AVX512), 1)
        library.call("packed", "packed_rotate_to_integers", x, whole, unit, *into)
        sums, wanted = (whole.double() @ weight.unit().double().T).int(), torch.empty(count, 37).bfloat16()
        back = (count, 37, weight.signs_out, mixers[1], weight.row_scale, bias, int(library.Isa.AVX512), 1)
        library.call("packed", "packed_rotate_from_integers", sums, unit, wanted, *back)
        product = PackedProduct(weight)
        assert torch.equal(product.linear(x, bias), wanted)
        assert is_same_with_any_number_of_threads(lambda product=product, x=x: product.linear(x))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_with_some_rows_of_the_matrix(dtype: torch.dtype) -> None:
    for weight in (*weights(), *(banded() if library.hashed_runs() else ())):
        if weight.signs_out is not None:
            continue
        some = range(weight.sizes.rows // 3, weight.sizes.rows // 3 + max(1, weight.sizes.rows // 2))
        x = torch.randn(2, 3, weight.sizes.columns).to(dtype)
        wanted = packed_matmul_reference(x, weight, torch.float64)[..., some.start : some.stop]
        found = PackedProduct(weight).linear_rows(x, some)
        tolerance = FLOAT32 if dtype == torch.float32 else 2 * ROUNDED_TWICE
        assert found.dtype == dtype and relative(found, wanted) < tolerance


@pytest.mark.usefixtures("_either")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows(dtype: torch.dtype) -> None:
    for weight in (*weights(), *(banded() if library.hashed_runs() else ())):
        if weight.signs_out is not None:
            continue
        rows = torch.randint(weight.sizes.rows, (2, 9))
        dense = packed_matmul_reference(torch.eye(weight.sizes.columns), weight, torch.float64).T
        found = PackedProduct(weight).look_up(rows, dtype)
        assert found.dtype == dtype and found.shape == (2, 9, weight.sizes.columns)
        assert relative(found, dense[rows]) < (FLOAT32 if dtype == torch.float32 else BFLOAT16)


@pytest.mark.usefixtures("_either")
def test_indices_of_rows_are_those_of_all() -> None:
    for weight in (*weights(), *(banded() if library.hashed_runs() else ())):
        rows = torch.randint(weight.sizes.rows, (20,))
        assert torch.equal(weight.indices_of(rows), weight.indices()[rows].long())


def test_gradients_flow_into_x_and_bias() -> None:
    weight = on_trellis(37, 50, Trellis(12, 4, strip_rows=16), 2).rotated((1, 2))
    product, dense = PackedProduct(weight), packed_matmul_reference(torch.eye(50), weight).T
    for x in (torch.randn(1, 50, requires_grad=True), torch.randn(6, 50, requires_grad=True)):
        bias, direction = torch.randn(37, requires_grad=True), torch.randn(len(x), 37)
        (product.linear(x, bias) * direction).sum().backward()
        assert x.grad is not None and relative(x.grad, direction @ dense) < 10 * FLOAT32
        assert bias.grad is not None and torch.allclose(bias.grad, direction.sum(dim=0))


@needs_compiler
def test_the_same_bits_with_any_number_of_threads() -> None:
    weight, x = on_trellis(400, 512, Trellis(12, 4, strip_rows=64), 2).rotated((1, 2)), torch.randn(1, 512)
    assert is_same_with_any_number_of_threads(lambda: PackedProduct(weight).linear(x))


@needs_compiler
def test_errors_say_what_was_wanted() -> None:
    product = PackedProduct(on_trellis(9, 12, Trellis(12, 4), 2))
    with pytest.raises(ShapeError, match=r"packed product: got x \[..., 11\], wanted \[..., 12\]"):
        product.linear(torch.randn(1, 11))
    for row in (-1, 9):
        with pytest.raises(IndexError, match=r"wanted rows in \[0, 9\)"):
            product.look_up(torch.tensor([0, row]), torch.float32)
