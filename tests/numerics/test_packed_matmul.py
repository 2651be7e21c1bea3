"""Products with packed matrices: every form and instruction set against float64, gradients, the operator."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pocketllm.codec.index_form import Trellis
from pocketllm.codec.kernels import library, packed_cpu, select
from pocketllm.codec.kernels.library import Isa
from pocketllm.codec.kernels.packed_op import (
    packed_matmul,
    packed_matmul_reference,
    transposed_reference,
)
from pocketllm.codec.kernels.packed_weight import PackedWeight
from pocketllm.codec.rotation import rotate, signs, unrotate_matrix
from pocketllm.errors import ConfigError, FormatError, ShapeError
from tests.packed_weights import (
    BFLOAT16,
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

RATES = ((12, 4, 2), (12, 3, 2), (12, 5, 2), (12, 1, 1), (14, 8, 4), (6, 6, 3), (16, 2, 1))
BANDED_RATES = (
    (12, 1, 1),
    (12, 2, 1),
    (12, 3, 1),
    (12, 4, 1),
    (16, 2, 1),
    (12, 3, 2),
    (12, 5, 2),
    (16, 6, 2),
)
SHAPES = [(1, 1), (3, 7), (8, 64), (37, 50), (130, 51)]


def general() -> Iterator[PackedWeight]:
    """Every form but bands, in ragged sizes."""
    for rows, columns in SHAPES:
        for width in (1, 5, 8, 12, 15):
            yield independent(rows, columns, width, d=1 + width % 4)
        yield independent(rows, columns, width=9, d=2, size=300)
        yield independent(rows, columns, width=20, d=1)
        for d in (5, 8, 12, 16, 24):
            yield independent(rows, columns, width=7, d=d)
        for weight in on_trellises(rows, columns, RATES):
            yield from (weight, weight.rotated((rows, columns)))


def banded() -> Iterator[PackedWeight]:
    """Every form in bands."""
    yield on_hashed_trellis(72, 130, Trellis(12, 2, strip_rows=64), 1, banded=True).rotated((1, 2))
    for rows, columns in [*SHAPES, (200, 130)]:
        yield from in_bands(rows, columns, BANDED_RATES, strip_rows=64)


def check_products(weight: PackedWeight, isa: Isa, tolerance: float) -> None:
    for count in (1, 3, 40):
        x = torch.randn(count, weight.sizes.columns)
        wanted = packed_matmul_reference(x, weight, torch.float64)
        assert (
            relative(packed_cpu.multiply(x, packed_cpu.tensors_of(weight), weight.sizes, isa), wanted)
            < tolerance
        )


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("isa", list(Isa))
def test_every_form_multiplies_as_in_float64(isa: Isa) -> None:
    if isa > library.best_isa():
        pytest.skip(f"this processor has no {isa.name}")
    for weight in general():
        check_products(weight, isa, FLOAT32)
    for weight in banded():
        check_products(weight, isa, FLOAT32 if isa < Isa.AVX512 else INTEGERS)


@needs_compiler
def test_the_same_bits_with_any_number_of_threads() -> None:
    weight, x = on_trellis(130, 51, Trellis(12, 4, strip_rows=16), 2), torch.randn(1, 51)
    tensors, isa = packed_cpu.tensors_of(weight), library.best_isa()
    assert is_same_with_any_number_of_threads(lambda: packed_cpu.multiply(x, tensors, weight.sizes, isa))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 7])
def test_the_dtype_of_x_is_that_of_the_product(dtype: torch.dtype, count: int) -> None:
    weight = on_trellis(64, 96, Trellis(12, 4), 2)
    x = torch.randn(2, count, 96).to(dtype)
    found = packed_matmul(x, weight)
    assert found.dtype == dtype and found.shape == (2, count, 64)
    assert relative(found, packed_matmul_reference(x, weight, torch.float64)) < BFLOAT16


@needs_compiler
def test_no_rows_of_x() -> None:
    for weight in (
        on_trellis(8, 10, Trellis(12, 4), 2),
        on_hashed_trellis(8, 10, Trellis(12, 2), 1, banded=True),
    ):
        assert packed_matmul(torch.empty(0, 10), weight).shape == (0, 8)


@needs_compiler
def test_what_is_not_finite_stays_visible() -> None:
    x = torch.randn(2, 51)
    x[1, 3] = float("nan")
    for weight in (
        on_trellis(9, 51, Trellis(12, 4), 2),
        on_hashed_trellis(9, 51, Trellis(12, 2), 1, banded=True),
    ):
        found = packed_matmul(x, weight)
        assert bool(found[0].isfinite().all()) and bool(found[1].isnan().all())


@needs_compiler
def test_zeros_give_zeros() -> None:
    weight = on_hashed_trellis(9, 51, Trellis(12, 2), 1, banded=True)
    assert not packed_matmul(torch.zeros(3, 51), weight).any()


def gradient_cases() -> Iterator[PackedWeight]:
    yield independent(20, 33, width=9, d=4)
    yield on_trellis(37, 51, Trellis(12, 4, strip_rows=16), 2)
    yield on_hashed_trellis(37, 51, Trellis(12, 3, strip_rows=16), 2, banded=False)
    yield on_hashed_trellis(37, 51, Trellis(12, 2, strip_rows=16), 1, banded=True).rotated((0, 1))
    yield on_trellis(48, 64, Trellis(12, 4, strip_rows=16), 2).rotated((None, 5))
    yield on_trellis(48, 64, Trellis(12, 4, strip_rows=16), 2).rotated((5, None))


@needs_compiler
def test_gradient_of_x_is_that_of_the_dense_product() -> None:
    for weight in gradient_cases():
        x, direction = (
            torch.randn(2, 3, weight.sizes.columns, requires_grad=True),
            torch.randn(2, 3, weight.sizes.rows),
        )
        (packed_matmul(x, weight) * direction).sum().backward()
        wanted = transposed_reference(direction, weight, torch.float64)
        assert x.grad is not None and relative(x.grad, wanted) < FLOAT32


def test_operator_passes_the_checks_of_torch() -> None:
    weight = on_trellis(9, 12, Trellis(12, 4), 2).rotated((1, None))
    x = torch.randn(3, 12, requires_grad=True)
    tensors = (weight.stream, weight.table, weight.row_scale, weight.signs_out, weight.signs_in)
    arguments = (x, *tensors, list(map(int, weight.sizes)))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.pocketllm.packed_matmul.default, arguments, test_utils=checks)


class Packed(torch.nn.Module):
    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return packed_matmul(x, self.weight).relu()


def test_operator_compiles_and_exports() -> None:
    module, x = Packed(on_trellis(9, 12, Trellis(12, 4), 2)), torch.randn(3, 12)
    wanted = module(x)
    assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(x), wanted)
    exported = torch.export.export(module, (x,))
    assert torch.equal(exported.module()(x), wanted)


@pytest.mark.parametrize("size", [1, 2, 8, 12, 43, 576, 1536, 2048])
@pytest.mark.parametrize("isa", [Isa.PLAIN, Isa.AVX2])
@needs_compiler
def test_rotations_are_those_of_the_codec(size: int, isa: Isa) -> None:
    if isa > library.best_isa():
        pytest.skip(f"this processor has no {isa.name}")
    for count in (1, 5):
        x = torch.randn(count, size)
        there = packed_cpu.rotate_(x.clone(), signs(size, 3), isa, inverse=False)
        assert relative(there, rotate(x, 3)) < FLOAT32
        assert relative(packed_cpu.rotate_(there, signs(size, 3), isa, inverse=True), x) < FLOAT32


def test_rotated_reference_is_the_matrix_rotated_back() -> None:
    weight = on_trellis(24, 40, Trellis(12, 4, strip_rows=8), 2)
    x, dense = torch.randn(2, 40), weight.unit() * weight.row_scale[:, None]
    wanted = x @ unrotate_matrix(dense, (7, 8)).T
    assert relative(packed_matmul_reference(x, weight.rotated((7, 8)), torch.float64), wanted) < FLOAT32


def test_reference_is_the_matrix_written_out() -> None:
    weight = on_trellis(21, 11, Trellis(12, 4, strip_rows=8), 2)
    indices, x = weight.indices(), torch.randn(2, 11)
    matrix = torch.zeros(21, 11, dtype=torch.float64)
    for row in range(21):
        for column in range(11):
            entry = weight.table[indices[row, column // 2], column % 2]
            matrix[row, column] = entry.double() * weight.row_scale[row].double()
    assert relative(packed_matmul_reference(x, weight, torch.float64), x.double() @ matrix.T) < 1e-12


@pytest.fixture
def untried() -> Iterator[None]:
    """No library has been built and no kernel tried yet, and neither will have been afterwards."""
    for cached in (library._loaded, select.packed_isa, select._agrees):
        cached.cache_clear()
    yield
    for cached in (library._loaded, select.packed_isa, select._agrees):
        cached.cache_clear()


@pytest.mark.usefixtures("untried")
def test_without_a_compiler_it_runs_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = on_trellis(9, 12, Trellis(12, 4), 2), torch.randn(3, 12, requires_grad=True)
    monkeypatch.setenv("POCKETLLM_COMPILE", "0")
    assert select.packed_isa() is None
    packed_matmul(x, weight).sum().backward()
    assert x.grad is not None


@needs_compiler
@pytest.mark.usefixtures("untried")
def test_a_kernel_that_is_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        packed_cpu, "multiply", lambda x, tensors, sizes, isa: torch.zeros(len(x), sizes.rows)
    )
    assert select.packed_isa() is None
    assert "products are off by 1.0e+00" in caplog.text


@pytest.mark.usefixtures("untried")
def test_library_is_none_where_it_cannot_be_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(library, "find_compiler", lambda: shutil.which("false"))
    assert library.library("packed") is None
    assert "kernels `packed` could not be built by" in caplog.text


@needs_compiler
@pytest.mark.usefixtures("untried")
def test_library_is_none_where_the_cache_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(library, "cache_folder", lambda: tmp_path / "file")
    assert library.library("packed") is None
    assert "could not be built" in caplog.text and str(tmp_path) in caplog.text


@needs_compiler
@pytest.mark.usefixtures("untried")
def test_a_shipped_library_needs_no_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built = library.library("packed")
    assert built is not None
    shutil.copy(built._name, tmp_path / "packed.so")
    library._loaded.cache_clear()
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    monkeypatch.setattr(library, "find_compiler", lambda: None)
    assert library.library("packed") is not None and select.packed_isa() is not None
    library._loaded.cache_clear()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "packed.so").write_bytes(b"of another platform")
    monkeypatch.setattr(library, "FOLDER", tmp_path / "other")
    assert library.library("packed") is None
    assert "packed.so cannot be loaded" in caplog.text


@needs_compiler
def test_instruction_set_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETLLM_ISA", "plain")
    assert library.best_isa() is Isa.PLAIN
    monkeypatch.setenv("POCKETLLM_ISA", "mmx")
    with pytest.raises(ConfigError, match="POCKETLLM_ISA: got 'mmx'"):
        library.best_isa()


def test_errors_say_what_was_wanted() -> None:
    weight = on_trellis(9, 12, Trellis(12, 4), 2)
    with pytest.raises(ShapeError, match=r"got x \[..., 11\], wanted \[..., 12\]"):
        packed_matmul(torch.randn(11), weight)
    with pytest.raises(FormatError, match="bytes"):
        dataclasses.replace(weight, stream=weight.stream[1:])
    with pytest.raises(ShapeError, match="got a table"):
        dataclasses.replace(weight, table=weight.table.half())
    with pytest.raises(ConfigError, match="wanted 1 to 24"):
        dataclasses.replace(weight, sizes=weight.sizes._replace(width=25))
    with pytest.raises(ConfigError, match="without a trellis"):
        dataclasses.replace(weight, sizes=weight.sizes._replace(stride=0, banded=True))
    with pytest.raises(ConfigError, match="use the stream without bands"):
        dataclasses.replace(weight, sizes=weight.sizes._replace(stride=8, banded=True))
