"""y = x W^T with a matrix that stays packed: one operator of torch, its gradient, and the choice of a kernel.

`packed_matmul` is the call. `torch.ops.pocketllm.packed_matmul` is what it runs, opaque to torch.compile and
torch.export: rotate x, multiply by U from the stream, scale, rotate back. On a CPU that is done by the kernels of
packed_cpu.py, on a GPU by those of packed_gpu.py, if there are any and they pass a self-check (select.py); everywhere
else by the reference, in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from pocketllm.codec.hashed_table import ENTRIES
from pocketllm.codec.index_form import Independent, Trellis
from pocketllm.codec.kernels import packed_cpu, select
from pocketllm.codec.kernels.banded_cpu import BANDED_ROWS
from pocketllm.codec.kernels.library import Isa
from pocketllm.codec.kernels.packed_cpu import Tensors
from pocketllm.codec.kernels.packed_weight import PackedWeight, Sizes, hashed_weight, packed_weight
from pocketllm.codec.kernels.reference import hartley, power_and_odd
from pocketllm.codec.packing import pack
from pocketllm.codec.subvectors import strip_lengths
from pocketllm.errors import ShapeError
from pocketllm.torch_state import in_default_torch_state

# Of the self-check: rounding is far below, a wrong index far above; many rows of bfloat16 are rounded to 8 bits.
CHECK_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


def packed_matmul(x: Tensor, weight: PackedWeight) -> Tensor:
    """x [..., columns] -> x W^T [..., rows], in the dtype of x; differentiable in x.

    Raises:
        ShapeError: x has another number of columns.
    """
    sizes = weight.sizes
    if x.shape[-1] != sizes.columns:
        raise ShapeError(f"packed_matmul: got x [..., {x.shape[-1]}], wanted [..., {sizes.columns}]")
    tensors = (weight.stream, weight.table, weight.row_scale, weight.signs_out, weight.signs_in)
    return torch.ops.pocketllm.packed_matmul(x, *tensors, list(map(int, sizes)))


def packed_matmul_reference(x: Tensor, weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """What every kernel must agree with up to rounding: torch alone, on any device, computed in `dtype`."""
    return _rotated_back(
        _rotated(x.to(dtype), weight.signs_in) @ weight.unit().to(dtype).T * weight.row_scale.to(dtype),
        weight.signs_out,
    )


def transposed_reference(y: Tensor, weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """y [..., rows] -> y W [..., columns], as `packed_matmul_reference`."""
    scaled = _rotated(y.to(dtype), weight.signs_out) * weight.row_scale.to(dtype)
    return _rotated_back(scaled @ weight.unit().to(dtype), weight.signs_in)


def _rotated(x: Tensor, signs: Tensor | None) -> Tensor:
    """x [..., n] -> x R^T in the dtype of x; see rotation.py."""
    return x if signs is None else mixed(x * signs.to(x.dtype))


def _rotated_back(x: Tensor, signs: Tensor | None) -> Tensor:
    return x if signs is None else mixed(x) * signs.to(x.dtype)


def mixed(x: Tensor) -> Tensor:
    """x [..., n] times Hadamard(power) (x) Hartley(odd), stage by stage."""
    power, odd = power_and_odd(x.shape[-1])
    groups = x.reshape(*x.shape[:-1], power, odd) @ hartley(odd).to(x)
    half = 1
    while half < power:
        pairs = groups.reshape(*x.shape[:-1], power // (2 * half), 2, half * odd)
        first, second = pairs.unbind(-2)
        groups, half = torch.stack([first + second, first - second], dim=-2), 2 * half
    return groups.reshape(x.shape) / math.sqrt(power)


class _Kernel(Protocol):
    """Products with packed matrices on one kind of device."""

    def multiply(self, x: Tensor, weight: Tensors, sizes: Sizes) -> Tensor:
        """x [T, columns] -> x W^T [T, rows]."""

    def multiply_transposed(self, y: Tensor, weight: Tensors, sizes: Sizes) -> Tensor:
        """y [T, rows] -> y W [T, columns]."""


class _Reference:
    def multiply(self, x: Tensor, weight: Tensors, sizes: Sizes) -> Tensor:
        return packed_matmul_reference(x, weight.sized(sizes))

    def multiply_transposed(self, y: Tensor, weight: Tensors, sizes: Sizes) -> Tensor:
        return transposed_reference(y, weight.sized(sizes))


@dataclass(frozen=True)
class _OnCpu:
    isa: Isa

    def multiply(self, x: Tensor, weight: Tensors, sizes: Sizes) -> Tensor:
        return packed_cpu.multiply(x, weight, sizes, self.isa)

    def multiply_transposed(self, y: Tensor, weight: Tensors, sizes: Sizes) -> Tensor:
        return packed_cpu.multiply_transposed(y, weight.sized(sizes).in_stream_order(), self.isa)


def _kernel(device: torch.device) -> _Kernel:
    """What multiplies on a device."""
    isa = select.packed_isa() if device.type == "cpu" else None
    return (_OnCpu(isa) if isa is not None else select.packed_gpu(device)) or _Reference()


@torch.library.custom_op("pocketllm::packed_matmul", mutates_args=())
def _operator(
    x: Tensor,
    stream: Tensor,
    table: Tensor,
    row_scale: Tensor,
    signs_out: Tensor | None,
    signs_in: Tensor | None,
    sizes: list[int],
) -> Tensor:
    sized, weight = sizes_of(sizes), Tensors(stream, table, row_scale, signs_out, signs_in)
    out = _kernel(x.device).multiply(x.reshape(-1, sized.columns), weight, sized)
    return out.to(x.dtype).view(*x.shape[:-1], sized.rows)


@torch.library.custom_op("pocketllm::packed_matmul_backward", mutates_args=())
def _backward(
    grad: Tensor,
    stream: Tensor,
    table: Tensor,
    row_scale: Tensor,
    signs_out: Tensor | None,
    signs_in: Tensor | None,
    sizes: list[int],
) -> Tensor:
    sized, weight = sizes_of(sizes), Tensors(stream, table, row_scale, signs_out, signs_in)
    out = _kernel(grad.device).multiply_transposed(grad.reshape(-1, sized.rows), weight, sized)
    return out.to(grad.dtype).view(*grad.shape[:-1], sized.columns)


def sizes_of(numbers: list[int]) -> Sizes:
    """Sizes as an operator gets them."""
    rows, columns, vector_len, width, stride, strip_rows, banded = numbers
    return Sizes(rows, columns, vector_len, width, stride, strip_rows, bool(banded))


@_operator.register_fake
def _(x: Tensor, *packed: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], sizes_of(packed[-1]).rows)


@_backward.register_fake
def _(grad: Tensor, *packed: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], sizes_of(packed[-1]).columns)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, ctx.sizes = inputs
    ctx.save_for_backward(*tensors)


def _input_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.pocketllm.packed_matmul_backward(grad, *ctx.saved_tensors, ctx.sizes)
    return found, *[None] * 6


_operator.register_autograd(_input_gradient, setup_context=_save)


_Multiply = Callable[[Tensor, Tensors, Sizes], Tensor]


def cpu_products_differ(isa: Isa) -> str:
    """How the CPU kernels of an instruction set differ from the reference; empty if they agree."""
    cases = [(count, torch.float32) for count in (1, packed_cpu.FEW_ROWS + 1, BANDED_ROWS + 1)]
    weights, half = check_weights(torch.device("cpu")), (BANDED_ROWS + 1, torch.bfloat16)
    return products_differ(_OnCpu(isa).multiply, weights, [*cases, half])


def gpu_products_differ(multiply: _Multiply, few: int, device: torch.device) -> str:
    """The same of the kernels of a GPU, of which each form and case has to be compiled.

    few: number of tokens up to which nothing is decoded.
    """
    cases = [(1, torch.float32), (3, torch.bfloat16), (few + 1, torch.bfloat16)]
    return products_differ(multiply, islice(check_weights(device), 3), cases)


@in_default_torch_state
def products_differ(
    multiply: _Multiply, weights: Iterable[PackedWeight], cases: list[tuple[int, torch.dtype]]
) -> str:
    """How products differ from the reference, in cases of (rows of x, its dtype); empty if they agree."""
    for weight in weights:
        for count, dtype in cases:
            generator = torch.Generator().manual_seed(count)
            x = torch.randn(count, weight.sizes.columns, generator=generator).to(weight.stream.device, dtype)
            wanted = packed_matmul_reference(x, weight)
            found = multiply(x, packed_cpu.tensors_of(weight), weight.sizes)
            error, most = float((found - wanted).norm() / wanted.norm()), CHECK_TOLERANCES[dtype]
            if not error < most:
                return f"products are off by {error:.1e}, wanted {most:.0e}"
    return ""


def check_weights(device: torch.device) -> Iterator[PackedWeight]:
    """Small matrices of every form on a device, for the self-check."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = 37, 50
    scale = (torch.rand(rows, generator=generator) + 0.5).to(device)
    table = torch.randn(1 << 12, 2, generator=generator).to(device)
    indices = torch.randint(0, 1 << 12, (rows * columns // 2,), generator=generator)
    yield packed_weight(pack(indices, 12).to(device), table, scale, columns, Independent(1 << 12))
    for trellis, d in ((Trellis(12, 4, 16), 2), (Trellis(12, 2, 16), 1)):
        steps = torch.randint(0, 1 << trellis.stride, (rows, columns // d), generator=generator)
        lengths = strip_lengths(rows, trellis.strip_rows)
        paths = [trellis.windows(part.T.reshape(-1)).view(-1, len(part)).T for part in steps.split(lengths)]
        stream = trellis.pack(torch.cat(paths)).to(device)
        yield packed_weight(stream, table[:, :d].contiguous(), scale, columns, trellis).rotated((1, 2))
        entries = torch.randint(-127, 128, (d, ENTRIES), generator=generator).to(device, torch.int8)
        yield hashed_weight(stream, entries, scale / 64, columns, trellis)
