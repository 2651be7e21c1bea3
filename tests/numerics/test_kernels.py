"""Kernels: each finds what the torch reference finds, on odd sizes, too; one that does not is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pocketllm.codec.codebook import Searcher
from pocketllm.codec.kernels import cpu, library, reference, select
from pocketllm.codec.kernels.reference import PathProblem
from pocketllm.codec.rotation import rotate_matrix, unrotate_matrix

CPU = torch.device("cpu")
compiled = pytest.mark.skipif(
    any(library.library(name) is None for name in ("nearest", "trellis", "matrix")),
    reason="no C++ compiler here",
)


@pytest.fixture
def untried() -> Iterator[None]:
    """No kernel has been tried yet, and none will have been afterwards."""
    for cached in (select._agrees, select._paths_of, select.packed_isa):
        cached.cache_clear()
    yield
    for cached in (select._agrees, select._paths_of, select.packed_isa):
        cached.cache_clear()


def paths(width: int = 8, stride: int = 3, d: int = 2, lengths: tuple[int, ...] = (40, 17)) -> PathProblem:
    """Random strips; the last one ends in a given state, the others look ahead."""
    lookahead = [4] * (len(lengths) - 1) + [0]
    points = torch.randn(sum(lengths) + sum(lookahead), d)
    tables = torch.randn(3, d, 1 << width)
    which = torch.arange(len(lengths)) % 3
    stop = torch.full_like(which, -1)
    if lengths[-1] * stride >= width:  # any state can be reached
        stop[-1] = 5
    return PathProblem(
        points=points,
        weights=torch.rand(len(points)) + 0.5,
        tables=tables,
        halves=tables.square().sum(dim=1) / 2,
        which=which,
        after=(which + 1) % 3,
        start=torch.randint(1 << width, (len(lengths),)),
        stop=stop,
        lengths=list(lengths),
        lookahead=lookahead,
        width=width,
        stride=stride,
    )


@compiled
@pytest.mark.parametrize("lengths", [(1,), (2, 1), (17, 16, 16), (255, 3)])
@pytest.mark.parametrize(
    ("width", "stride", "d"),
    [
        *[(6, 2, 1), (5, 1, 3), (9, 5, 4), (12, 8, 2), (8, 3, 2), (7, 2, 3), (12, 3, 1)],
        *[(6, 3, 2), (6, 6, 1), (4, 3, 4), (8, 7, 1)],  # fewer groups than a vector has lanes
    ],
)
def test_paths(width: int, stride: int, d: int, lengths: tuple[int, ...]) -> None:
    problem = paths(width, stride, d, lengths)
    expected = reference.cheapest_paths(problem)
    assert cpu.searches(problem)
    assert torch.equal(cpu.cheapest_paths(problem), expected)
    assert torch.equal(select.cheapest_paths(problem), expected)
    few = {name: getattr(problem, name).round() for name in ("points", "weights", "tables")}
    equal = replace(problem, **few, halves=few["tables"].square().sum(dim=1) / 2)  # many paths cost the same
    assert torch.equal(cpu.cheapest_paths(equal), reference.cheapest_paths(equal))


@pytest.mark.skipif(not cpu.multiplies_bfloat16(), reason="this processor has no AVX-512 BF16")
@pytest.mark.parametrize("tokens", [1, 2, 9, 300])
@pytest.mark.parametrize("columns", [1, 47, 48, 49, 150])
def test_squares_in_bfloat16(tokens: int, columns: int) -> None:
    x, totals = torch.randn(tokens, columns).bfloat16(), []
    start = torch.randn(columns, columns)
    for threads in (1, 2):
        totals.append(start + start.T)
        torch.set_num_threads(threads)
        try:
            cpu.add_square_bfloat16(totals[-1], x)
        finally:
            torch.set_num_threads(1)
    assert torch.equal(*totals) and torch.equal(totals[0], totals[0].T)
    wanted = start.double() + start.T + x.double().T @ x.double()
    torch.testing.assert_close(totals[0].double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not cpu.multiplies_bfloat16(), reason="this processor has no AVX-512 BF16")
def test_squares_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "call", lambda *given: 1)
    with pytest.raises(MemoryError, match="no memory to sum 3 products of 2 columns"):
        cpu.add_square_bfloat16(torch.zeros(2, 2), torch.zeros(3, 2, dtype=torch.bfloat16))


@compiled
@pytest.mark.parametrize("columns", [1, 2, 5, 10])
@pytest.mark.parametrize("rows", [1, 21, 128, 167])
def test_products_with_few_columns_sum_in_order(rows: int, columns: int) -> None:
    left, right = torch.randn(3, 70, rows).transpose(1, 2), torch.randn(3, columns, 70).transpose(1, 2)
    expected = torch.zeros(3, rows, columns)
    for term in range(70):
        expected += left[:, :, term, None] * right[:, term, None]
    assert torch.equal(cpu.ordered_product(left, right), expected)
    assert torch.equal(cpu.ordered_product(left[1], right[1].contiguous()), expected[1])


@pytest.mark.parametrize("columns", [1, 2, 4, 12])
@pytest.mark.parametrize("batch", [(), (1,), (6,)])
def test_products_have_the_bits_of_torch(columns: int, batch: tuple[int, ...]) -> None:
    """Whichever kernel is used."""
    left, right = torch.randn(*batch, 300, 64).transpose(-1, -2), torch.randn(*batch, 300, columns)
    if batch:
        assert torch.equal(
            select.product(select.for_product(left, columns), right), left.contiguous() @ right
        )
    else:
        assert torch.equal(select.product(left, right), left @ right)


@pytest.mark.parametrize(("width", "stride", "d"), [(8, 3, 5), (12, 9, 2), (3, 1, 2)])
def test_paths_that_no_kernel_was_written_for(width: int, stride: int, d: int) -> None:
    problem = paths(width, stride, d)
    assert not cpu.searches(problem)
    assert torch.equal(select.cheapest_paths(problem), reference.cheapest_paths(problem))


@compiled
@pytest.mark.parametrize(
    ("count", "size", "d"), [(0, 3, 2), (1, 1, 1), (31, 33, 5), (257, 1023, 7), (1000, 31, 16)]
)
def test_nearest_codewords(count: int, size: int, d: int) -> None:
    points, codebook = torch.randn(count, d), torch.randn(size, d)
    expected = reference.nearest(points, codebook)
    assert torch.equal(cpu.Table(codebook).nearest(points), expected)
    assert torch.equal(Searcher(codebook).nearest(points), expected)
    if count:
        assert torch.equal(cpu.nearest_faiss(points, codebook), expected)


@compiled
@pytest.mark.parametrize(
    ("rows", "columns", "d"), [(1, 1, 1), (7, 13, 4), (48, 40, 5), (3, 3, 8), (129, 65, 2)]
)
def test_decoding(rows: int, columns: int, d: int) -> None:
    table, scale, grad = torch.randn(11, d), torch.rand(rows), torch.randn(rows, columns)
    indices = torch.randint(11, (rows, -(-columns // d)))
    expected = reference.gather(table, indices, scale, columns)
    assert torch.equal(cpu.gather(table, indices, scale, columns), expected)
    assert torch.equal(select.gather(table, indices, scale, columns), expected)
    sums = reference.scatter(table, indices, scale, grad)
    for found in (cpu.scatter(table, indices, scale, grad), select.scatter(table, indices, scale, grad)):
        for one, other in zip(found, sums, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def raises(*arguments: Any, **keywords: Any) -> Any:
    raise RuntimeError("illegal instruction")


def altered(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but for one value."""

    def off(*arguments: Any, **keywords: Any) -> Any:
        found = kernel(*arguments, **keywords)
        found = arguments[0] if found is None else found  # changed in place
        (found[0] if isinstance(found, tuple) else found).reshape(-1)[0] += 1
        return found

    return off


def find_paths() -> tuple[Tensor, Tensor]:
    problem = paths()
    return select.cheapest_paths(problem), reference.cheapest_paths(problem)


def find_nearest() -> tuple[Tensor, Tensor]:
    points, codebook = torch.randn(50, 3), torch.randn(20, 3)
    return Searcher(codebook).nearest(points), reference.nearest(points, codebook)


def find_many_nearest() -> tuple[Tensor, Tensor]:
    points, codebook = torch.randn(cpu.FUSED_NUMBERS // 2, 2), torch.randn(20, 2)
    found, wanted = Searcher(codebook).nearest(points), reference.nearest(points, codebook)
    return (points - codebook[found]).square().sum(dim=1), (points - codebook[wanted]).square().sum(dim=1)


def find_centroids() -> tuple[Tensor, Tensor]:
    points = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
    return select.kmeans(points, 2, 10, seed=3).sort(dim=0).values, torch.tensor([[-1.5], [1.5]])


def sum_squares() -> tuple[Tensor, Tensor]:
    x, total = torch.randn(20, 7), torch.zeros(7, 7)
    select.add_square(total, x)
    return total, x.T @ x


def sum_bfloat16_squares() -> tuple[Tensor, Tensor]:
    x, total = torch.randn(20, 7).bfloat16(), torch.zeros(7, 7)
    select.add_square(total, x)
    return total, x.float().T @ x.float()


def decode() -> tuple[Tensor, Tensor]:
    table, scale, indices = torch.randn(16, 3), torch.rand(5), torch.randint(16, (5, 4))
    return select.gather(table, indices, scale, 10), reference.gather(table, indices, scale, 10)


def take_gradients() -> tuple[Tensor, Tensor]:
    table, scale, indices, grad = (
        torch.randn(16, 3),
        torch.rand(5),
        torch.randint(16, (5, 4)),
        torch.randn(5, 10),
    )
    return (
        select.scatter(table, indices, scale, grad)[0],
        reference.scatter(table, indices, scale, grad)[0],
    )


def rotate() -> tuple[Tensor, Tensor]:
    weight = torch.randn(20, 36)
    return unrotate_matrix(rotate_matrix(weight, (1, 2)), (1, 2)), weight


KERNELS: dict[str, tuple[Any, str, Callable[[], tuple[Tensor, Tensor]], str]] = {
    "faiss nearest": (cpu, "nearest_faiss", find_many_nearest, "it finds other codewords"),
    "faiss kmeans": (
        cpu,
        "kmeans_faiss",
        find_centroids,
        "its centroids are not those of the nearest points",
    ),
    "numpy": (cpu, "add_square", sum_squares, "it sums other products"),
    "paths": (cpu, "cheapest_paths", find_paths, "its paths differ from torch's"),
    "nearest": (cpu.Table, "nearest", find_nearest, "it finds other codewords"),
    "gather": (cpu, "gather", decode, "it decodes to other values"),
    "scatter": (cpu, "scatter", take_gradients, "it decodes to other values"),
    "rotate": (cpu, "rotate", rotate, "it decodes to other values"),
}

if cpu.multiplies_bfloat16():
    found = (cpu, "add_square_bfloat16", sum_bfloat16_squares, "it sums other products")
    KERNELS["bfloat16 squares"] = found

LANGUAGES = {"nearest_faiss": "faiss", "kmeans_faiss": "faiss", "add_square": "numpy"}


@compiled
@pytest.mark.parametrize("fault", ["wrong", "raises"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_at_fault_is_left_out(
    name: str,
    fault: str,
    untried: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Results are the reference's, and one warning says which kernel, where, and why."""
    owner, attribute, use, words = KERNELS[name]
    broken = raises if fault == "raises" else altered(getattr(owner, attribute))
    monkeypatch.setattr(owner, attribute, broken)
    reason = "illegal instruction" if fault == "raises" else words
    for _ in range(2):
        found, expected = use()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert [record.getMessage() for record in caplog.records] == [
        f"the {LANGUAGES.get(attribute, 'C++')} kernel is not used on cpu ({reason}); torch replaces it and is slower"
    ]


@compiled
@pytest.mark.parametrize("name", KERNELS)
def test_a_good_kernel_is_used(
    name: str, untried: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    owner, attribute, use, _ = KERNELS[name]
    use()  # it is tried here
    assert not caplog.records
    monkeypatch.setattr(owner, attribute, raises)
    with pytest.raises(RuntimeError, match="illegal instruction"):
        use()


def test_without_a_gpu_there_is_no_triton() -> None:
    assert select._triton(CPU) is None
