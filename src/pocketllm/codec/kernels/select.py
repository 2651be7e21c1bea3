"""The choice of kernel for each hot loop: the fastest that runs on the device and agrees with the reference.

Every kernel except the reference is checked once per process on a small problem before it is used; one whose
result differs is not used, with a warning.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from pocketllm.codec.kernels import cpu, library, path_batches, reference
from pocketllm.codec.kernels.library import Isa
from pocketllm.codec.kernels.reference import PathProblem, Signs
from pocketllm.errors import reason_of

logger = logging.getLogger(__name__)


def cheapest_paths(problem: PathProblem) -> Tensor:
    """States [rows] int64 of the cheapest paths through a trellis."""
    if cpu.searches(problem) and _agrees("C++", _paths_of(cpu), problem.points.device):
        return cpu.cheapest_paths(problem)
    triton = _triton(problem.points.device)
    if triton is not None and _agrees("Triton", _paths_of(triton), problem.points.device):
        batches = path_batches.current()
        return (
            batches.search(problem, triton.cheapest_paths_of) if batches else triton.cheapest_paths(problem)
        )
    return reference.cheapest_paths(problem)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left [..., rows, depth] @ right [..., depth, columns], float32, with one batch dimension or none.

    In C++ if there are few columns, the left side is laid out for it (`for_product`), and the bits are those of torch.
    """
    columns, threads = right.shape[-1], torch.get_num_threads()
    is_single = left.ndim == 3 and len(left) == 1  # which torch sums in another order
    compiled = (
        not is_single
        and cpu.multiplies(left, columns)
        and _sums_in_order(left.ndim, columns, right.stride(-1) == 1, threads)
    )
    return (cpu.ordered_product if compiled else reference.product)(left, right)


def for_product(matrices: Tensor, columns: int) -> Tensor:
    """Matrices [B, rows, depth] in the layout in which `product` with so many columns is fastest."""
    turned = matrices.transpose(1, 2).contiguous().transpose(1, 2)
    fits = cpu.multiplies(turned, columns) and _sums_in_order(3, columns, True, torch.get_num_threads())
    return turned if fits else matrices.contiguous()


class Searcher:
    """Nearest codeword of one codebook [K, d], many times: the table is laid out once.

    On a CPU faiss for many points, C++ for few; torch on a GPU. All find the same up to rounding; ties go to the
    lower index.
    """

    def __init__(self, codebook: Tensor) -> None:
        self.codebook = codebook.detach().float()
        device, d = self.codebook.device, codebook.shape[1]
        compiled = (
            device.type == "cpu" and cpu.searches_nearest(d) and _agrees("C++", _nearest_differs, device)
        )
        self.table = cpu.Table(self.codebook) if compiled else None

    def nearest(self, points: Tensor) -> Tensor:
        """Index of the nearest codeword in Euclidean distance: [N, d] float -> [N] int64 in [0, K)."""
        points = points.detach().float()
        if self.table is not None and points.numel() < cpu.FUSED_NUMBERS:
            return self.table.nearest(points)
        device = points.device
        faiss = device.type == "cpu" and _agrees("faiss", _faiss_nearest_differs, device)
        return (cpu.nearest_faiss if faiss else reference.nearest)(points, self.codebook)


def gather(table: Tensor, indices: Tensor, scale: Tensor, columns: int) -> Tensor:
    """scale * table[indices], joined to rows: [K, d], [rows, n] integer, [rows] -> [rows, columns] float32."""
    kernel = cpu if decodes(table, scale) else reference
    return kernel.gather(table, indices, scale, columns)


def scatter(table: Tensor, indices: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Transpose of `gather`: gradient [rows, columns] -> gradients of table [K, d] and scale [rows]."""
    kernel = cpu if decodes(table, scale, grad) else reference
    return kernel.scatter(table, indices, scale, grad)


def decodes(*tensors: Tensor) -> bool:
    """Whether the compiled loops over a matrix (`gather`, `scatter`, `rotate_`) take these tensors."""
    return cpu.decodes(*tensors) and _agrees("C++", _decoding_differs, tensors[0].device)


def rotate(weight: Tensor, signs: Signs, inverse: bool) -> Tensor:
    """R1 W R2^T of W [rows, columns] float32, or with `inverse` R1^T W R2; see `reference.rotate`."""
    if signs == (None, None):
        return weight
    kernel = cpu if decodes(weight) else reference
    return kernel.rotate(weight, signs, inverse)


def kmeans(points: Tensor, size: int, iterations: int, seed: int) -> Tensor:
    """[N, d] -> [K, d] centroids by Lloyd's algorithm: faiss on a CPU, torch elsewhere."""
    faiss = points.device.type == "cpu" and _agrees("faiss", _faiss_kmeans_differs, points.device)
    return (cpu.kmeans_faiss if faiss else reference.kmeans)(points, size, iterations, seed)


def add_square(total: Tensor, x: Tensor) -> None:
    """total [C, C] += x^T x for x [tokens, C] float32 or bfloat16, in place: C++ or numpy on a CPU, torch elsewhere."""
    add, is_cpu = reference.add_square, x.device.type == "cpu"
    if is_cpu and x.dtype == torch.bfloat16 and cpu.multiplies_bfloat16():
        if _agrees("C++", _bfloat16_squares_differ, x.device):
            add = cpu.add_square_bfloat16
    elif is_cpu and _agrees("numpy", _squares_differ, x.device):
        add = cpu.add_square
    add(total, x.detach())


@functools.cache
def packed_isa() -> Isa | None:
    """The instruction set that products with packed matrices run with on this CPU, None for the reference."""
    if library.library("packed") is None:
        return None
    isa = library.best_isa()
    return isa if _agrees(f"C++ ({isa.name})", _products_differ, torch.device("cpu")) else None


@functools.cache
def packed_gpu(device: torch.device) -> ModuleType | None:
    """The module with the products of packed matrices on a GPU, None for the reference."""
    if device.type != "cuda":
        return None
    try:
        module = importlib.import_module("pocketllm.codec.kernels.packed_gpu")
    except ImportError:  # no Triton
        return None
    return module if _agrees("Triton (products)", _gpu_products_differ, device) else None


def no_packed_kernels(device: torch.device) -> str:
    """Why products with packed matrices run in torch on a device; empty if there are kernels."""
    if device.type == "cpu":
        why = "" if packed_isa() is not None else "no C++ compiler was found, or POCKETLLM_COMPILE=0 is set"
    elif device.type == "cuda":
        why = "" if packed_gpu(device) else "Triton is not installed, or what it computes is wrong"
    else:
        return f"there are no kernels for {device.type}"
    return why and f"there are no kernels: {why}"


def _products_differ(device: torch.device) -> str:
    from pocketllm.codec.kernels.packed_op import cpu_products_differ  # which asks here what to run with

    return cpu_products_differ(library.best_isa())


def _gpu_products_differ(device: torch.device) -> str:
    from pocketllm.codec.kernels import packed_gpu
    from pocketllm.codec.kernels.packed_op import gpu_products_differ

    return gpu_products_differ(packed_gpu.multiply, packed_gpu.FEW_TOKENS, device)


@functools.cache
def _triton(device: torch.device) -> ModuleType | None:
    if device.type != "cuda":
        return None
    try:
        return importlib.import_module("pocketllm.codec.kernels.triton")
    except ImportError:  # it comes with torch's CUDA builds
        return None


@functools.cache
def _sums_in_order(ndim: int, columns: int, is_contiguous: bool, threads: int) -> bool:
    """Whether torch's BLAS sums as `ordered.cpp` does, as some do for few columns; is_contiguous: the right side."""
    generator, batch = torch.Generator().manual_seed(0), (3,)[: ndim - 2]
    for depth, rows in ((70, 24), (700, 64)):
        left = torch.randn(*batch, depth, rows, generator=generator).transpose(-1, -2)
        shape = (depth, columns) if is_contiguous else (columns, depth)
        right = torch.randn(*batch, *shape, generator=generator)
        right = right if is_contiguous else right.transpose(-1, -2)
        if not torch.equal(cpu.ordered_product(left, right), reference.product(left, right)):
            return False
    return True


@functools.cache
def _agrees(language: str, differs: Callable[[torch.device], str], device: torch.device) -> bool:
    """Whether a kernel agrees with the reference; warns once if it does not."""
    try:
        wrong = differs(device)
    except Exception as error:  # whatever a compiler or a driver may say
        wrong = reason_of(error)
    if wrong:
        logger.warning(
            "the %s kernel is not used on %s (%s); torch replaces it and is slower", language, device, wrong
        )
    return not wrong


@functools.cache
def _paths_of(kernel: ModuleType) -> Callable[[torch.device], str]:
    return functools.partial(paths_differ, kernel.cheapest_paths)


def paths_differ(search: Callable[[PathProblem], Tensor], device: torch.device) -> str:
    """How a path search on a few points differs from the reference; empty if it agrees."""
    generator = torch.Generator().manual_seed(0)
    points, tables = (torch.randn(size, generator=generator).to(device) for size in ((61, 2), (2, 2, 256)))
    which = torch.tensor([0, 1], device=device)
    problem = PathProblem(
        points=points,
        weights=points.square().sum(dim=1),
        tables=tables,
        halves=tables.square().sum(dim=1) / 2,
        which=which,
        after=1 - which,
        start=torch.zeros_like(which),
        stop=torch.full_like(which, -1),
        lengths=[40, 17],
        lookahead=[4, 0],
        width=8,
        stride=3,
    )
    same = torch.equal(search(problem), reference.cheapest_paths(problem))
    return "" if same else "its paths differ from torch's"


def _nearest_differs(device: torch.device) -> str:
    generator = torch.Generator().manual_seed(0)
    points, codebook = torch.randn(50, 3, generator=generator), torch.randn(40, 3, generator=generator)
    wanted = reference.nearest(points, codebook)
    same = torch.equal(cpu.Table(codebook).nearest(points), wanted)
    return "" if same else "it finds other codewords"


def _faiss_nearest_differs(device: torch.device) -> str:
    """Both searches of faiss, which it chooses by the number of points; equal distances may be rounded differently."""
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(40, 8, generator=generator)
    for count in (50, cpu.FUSED_NUMBERS // 8):
        points = torch.randn(count, 8, generator=generator)
        found, wanted = (nearest(points, codebook) for nearest in (cpu.nearest_faiss, reference.nearest))
        errors = [(points - codebook[indices]).square().sum(dim=1) for indices in (found, wanted)]
        if not torch.allclose(errors[0], errors[1], rtol=1e-5, atol=1e-5):
            return "it finds other codewords"
    return ""


def _faiss_kmeans_differs(device: torch.device) -> str:
    """One more iteration of the reference must leave converged centroids as they are."""
    points = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    found = cpu.kmeans_faiss(points, 4, iterations=40, seed=0)
    again = reference.centroids(points, reference.nearest(points, found), found)
    return (
        "" if torch.allclose(found, again, atol=1e-5) else "its centroids are not those of the nearest points"
    )


def _squares_differ(device: torch.device) -> str:
    return _sums_differ(cpu.add_square, torch.float32)


def _bfloat16_squares_differ(device: torch.device) -> str:
    return _sums_differ(cpu.add_square_bfloat16, torch.bfloat16)


def _sums_differ(add: Callable[[Tensor, Tensor], None], dtype: torch.dtype) -> str:
    x = torch.randn(9, 53, generator=torch.Generator().manual_seed(0)).to(dtype)
    totals = torch.ones(53, 53), torch.ones(53, 53)
    for summed, total in zip((add, reference.add_square), totals, strict=True):
        summed(total, x)
    return "" if torch.allclose(*totals, rtol=1e-5, atol=1e-5) else "it sums other products"


def _decoding_differs(device: torch.device) -> str:
    generator = torch.Generator().manual_seed(0)
    table, scale, grad = (torch.randn(size, generator=generator) for size in ((16, 3), (5,), (5, 7)))
    indices = torch.randint(16, (5, 3), generator=generator)
    decoded = torch.equal(cpu.gather(table, indices, scale, 7), reference.gather(table, indices, scale, 7))
    pairs = zip(
        cpu.scatter(table, indices, scale, grad), reference.scatter(table, indices, scale, grad), strict=True
    )
    close = all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in pairs)
    matrix = torch.randn(6, 12, generator=generator)
    sides = [torch.randint(2, (size,), generator=generator) * 2.0 - 1 for size in matrix.shape]
    for signs in ((sides[0], None), (None, sides[1]), (sides[0], sides[1])):
        for inverse in (False, True):
            rotated = cpu.rotate(matrix, signs, inverse)
            close = close and torch.allclose(rotated, reference.rotate(matrix, signs, inverse), atol=1e-5)
    return "" if decoded and close else "it decodes to other values"
