"""The hot loops of calibration, encoding and decoding on a CPU: in C++, built by library.py, faiss and numpy.

`nearest.cpp` searches the nearest codeword, `trellis.cpp` the cheapest path; `ordered.cpp` multiplies by a few columns;
`matrix.cpp` decodes a matrix, rotates it, and takes gradients back; `squares.cpp` sums x^T x. Where no compiler is
found, or `POCKETLLM_COMPILE=0` is set, none of these is available and `select.py` takes another.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pocketllm.codec.kernels.library import call, library
from pocketllm.codec.kernels.reference import PathProblem, Signs, hartley, power_and_odd

MAX_VECTOR_LEN = 16
MOST_COLUMNS = 10  # of `ordered_product`
# faiss takes its fused search only from this many numbers (points * d) on, and is 10 times slower below.
FUSED_NUMBERS = 1 << 17
_WORTH_PADDING = 1 << 22


def searches_nearest(vector_len: int) -> bool:
    """Whether `Table.nearest` runs here for this d."""
    return vector_len <= MAX_VECTOR_LEN and library("nearest") is not None


class Table:
    """A codebook [K, d] float32 laid out for the compiled search."""

    def __init__(self, codebook: Tensor) -> None:
        codebook = codebook.detach().float()
        missing = -codebook.shape[0] % 32
        self.columns = torch.nn.functional.pad(codebook.T, (0, missing)).contiguous()
        half_norms = codebook.square().sum(dim=1) / 2
        self.half_norms = torch.nn.functional.pad(half_norms, (0, missing), value=float("inf"))

    def nearest(self, points: Tensor) -> Tensor:
        """[N, d] float32 -> [N] int64, ties to the lower index."""
        points = points.detach().float().contiguous()
        found = torch.empty(points.shape[0], dtype=torch.int32)
        sizes = (points.shape[0], self.columns.shape[1], points.shape[1])
        failed = call("nearest", "nearest", points, self.columns, self.half_norms, *sizes, found)
        assert not failed
        return found.long()


def add_square(total: Tensor, x: Tensor) -> None:
    """See `reference.add_square`; numpy sees that both sides are the same and computes one triangle."""
    array = x.float().contiguous().numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # the caller checks that the sum is finite
        total += torch.from_numpy(array.T @ array)


def multiplies_bfloat16() -> bool:
    """Whether `add_square_bfloat16` runs here: on processors with AVX-512 BF16."""
    return library("matrix") is not None and bool(call("matrix", "squares_supported"))


def add_square_bfloat16(total: Tensor, x: Tensor) -> None:
    """See `reference.add_square`; x bfloat16. Takes a quarter of the time that numpy takes."""
    assert x.dtype == torch.bfloat16
    failed = call("matrix", "add_square_bfloat16", x.contiguous(), *x.shape, torch.get_num_threads(), total)
    if failed:
        raise MemoryError(f"no memory to sum {x.shape[0]} products of {x.shape[1]} columns")


def nearest_faiss(points: Tensor, codebook: Tensor) -> Tensor:
    """[N, d], [K, d] float32 -> [N] int64, the nearest codewords, by faiss."""
    import faiss

    count, d = points.shape
    missing = -(-FUSED_NUMBERS // d) - count
    if missing > 0 and count * codebook.shape[0] >= _WORTH_PADDING:
        points = torch.nn.functional.pad(points, (0, 0, 0, missing))
    _, found = faiss.knn(np.ascontiguousarray(points.numpy()), np.ascontiguousarray(codebook.numpy()), 1)
    return torch.from_numpy(found[:count, 0])


def kmeans_faiss(points: Tensor, size: int, iterations: int, seed: int) -> Tensor:
    """[N, d] -> [K, d] float32 centroids by faiss; an empty cluster takes half of a large one."""
    import faiss

    kmeans = faiss.Kmeans(
        points.shape[1],
        size,
        niter=iterations,
        seed=seed & 0x7FFFFFFF,
        min_points_per_centroid=1,
        max_points_per_centroid=1 << 30,
    )
    kmeans.train(np.ascontiguousarray(points.float().numpy()))
    return torch.from_numpy(np.array(kmeans.centroids))


def searches(problem: PathProblem) -> bool:
    """Whether `cheapest_paths` runs here for this problem: on a CPU, of a d and trellis it was written for."""
    d, device = problem.points.shape[1], problem.points.device
    fits = device.type == "cpu" and d <= 4 and problem.stride <= 8 and problem.width >= 4
    return fits and library("trellis") is not None


def cheapest_paths(problem: PathProblem) -> Tensor:
    """States [rows] int64 of the cheapest paths, on the CPU."""
    out = torch.empty(sum(problem.lengths), dtype=torch.int64)
    tensors = (
        problem.points,
        problem.weights,
        problem.tables,
        problem.halves,
        problem.which,
        problem.after,
        problem.start,
        problem.stop,
        torch.tensor(problem.lengths),
        torch.tensor(problem.lookahead),
    )
    numbers = (
        len(problem.lengths),
        problem.width,
        problem.stride,
        problem.points.shape[1],
        torch.get_num_threads(),
    )
    if call("trellis", "trellis_search", *tensors, *numbers, out):
        raise MemoryError("trellis search: no memory for its tables")
    return out


def multiplies(left: Tensor, columns: int) -> bool:
    """Whether `ordered_product` takes a left side: few columns, float32 on a CPU, rows next to each other."""
    is_plain = left.dtype == torch.float32 and left.device.type == "cpu" and left.stride(-2) == 1
    return is_plain and 0 < columns <= MOST_COLUMNS and library("trellis") is not None


def ordered_product(left: Tensor, right: Tensor) -> Tensor:
    """left [..., rows, depth] @ right [..., depth, columns], with one batch dimension or none."""
    a, b = (x if x.ndim == 3 else x[None] for x in (left, right))
    out = torch.empty(len(a), a.shape[1], b.shape[2])
    sizes = (len(a), a.shape[2], a.shape[1], b.shape[2], torch.get_num_threads())
    strides = (a.data_ptr(), a.stride(0), a.stride(2), b.data_ptr(), *b.stride())
    failed = call("trellis", "ordered_product", *strides, *sizes, out)
    assert not failed
    return out if left.ndim == 3 else out[0]


def _run(function: str, *arguments: Tensor | int) -> None:
    """Call a function of matrix.cpp."""
    if call("matrix", function, *arguments):
        raise MemoryError(f"{function}: no memory for the scratch space")


def decodes(*tensors: Tensor) -> bool:
    """Whether the compiled decoding runs here for these tensors: float32 on a CPU."""
    on_cpu = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    return on_cpu and library("matrix") is not None


def rotate(weight: Tensor, signs: Signs, inverse: bool) -> Tensor:
    """See `reference.rotate`; both sides in one copy of the matrix."""
    weight = weight.detach().clone(memory_format=torch.contiguous_format)
    for name, values in zip(("rotate_columns", "rotate_rows"), signs, strict=True):
        if values is not None:
            mixer = hartley(power_and_odd(len(values))[1])
            _run(
                name, weight, *weight.shape, values, mixer, len(mixer), int(inverse), torch.get_num_threads()
            )
    return weight


def gather(table: Tensor, indices: Tensor, scale: Tensor, columns: int) -> Tensor:
    """scale * table[indices] joined to rows: [K, d], [rows, n] int32, [rows] -> [rows, columns]."""
    out = torch.empty(indices.shape[0], columns)
    sizes = (*indices.shape, columns, table.shape[1], torch.get_num_threads())
    inputs = (t.contiguous() for t in (table, indices.to(torch.int32), scale))
    _run("gather", *inputs, out, *sizes)
    return out


def scatter(table: Tensor, indices: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Transpose of `gather`: gradient [rows, columns] -> gradients of table [K, d] and scale [rows].

    The same thread count gives the same bits.
    """
    parts = torch.get_num_threads()
    sums, scale_grad = torch.zeros(parts, *table.shape), torch.empty_like(scale)
    inputs = (t.contiguous() for t in (table, indices.to(torch.int32), scale, grad))
    sizes = (*indices.shape, grad.shape[1], table.shape[1], len(table), parts)
    _run("scatter", *inputs, sums, scale_grad, *sizes)
    return sums.sum(dim=0), scale_grad
