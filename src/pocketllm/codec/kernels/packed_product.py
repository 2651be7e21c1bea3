"""A packed matrix ready to be used by a layer: products and single rows, each by one call of a kernel.

If torch has to trace the computation (gradients, torch.compile, torch.export) or no kernel runs, products go
through the operator of packed_op.py, which computes the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pocketllm.codec.kernels import packed_cpu, select
from pocketllm.codec.kernels.banded_cpu import PreparedBands
from pocketllm.codec.kernels.library import Isa
from pocketllm.codec.kernels.packed_cpu import Prepared
from pocketllm.codec.kernels.packed_op import mixed, packed_matmul, sizes_of
from pocketllm.codec.kernels.packed_weight import PackedWeight
from pocketllm.codec.subvectors import join
from pocketllm.errors import ShapeError


class PackedProduct:
    """Products of one packed matrix W [rows, columns].

    Args:
        weight: in stream order, or banded.
    """

    def __init__(self, weight: PackedWeight) -> None:
        self.device, self.columns, self.rows = weight.stream.device, weight.sizes.columns, weight.sizes.rows
        if self.device.type == "cpu" and not weight.sizes.banded:
            weight = weight.in_stream_order()
        self.weight, self.tensors = weight, packed_cpu.tensors_of(weight)
        self.isa = select.packed_isa() if self.device.type == "cpu" else None
        self.gpu = select.packed_gpu(self.device)
        if weight.sizes.banded and self.isa is not None and self.isa < Isa.AVX512:
            self.isa = None
        self._prepared: Prepared | PreparedBands | None = None

    @property
    def prepared(self) -> Prepared | PreparedBands:
        """The weight as the kernel takes it; made when it is first needed, so not while torch traces."""
        if self._prepared is None:
            assert self.isa is not None
            banded = self.weight.sizes.banded
            self._prepared = PreparedBands.of(self.weight) if banded else Prepared(self.weight, self.isa)
        return self._prepared

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., columns] -> x W^T + bias [..., rows], in the dtype of x; differentiable in x and bias.

        Raises:
            ShapeError: x has another number of columns.
        """
        if self.isa is None or not self._runs_at_once(x, bias):
            out = packed_matmul(x, self.weight)
            return out if bias is None else out + bias
        if x.shape[-1] != self.columns:
            raise ShapeError(f"packed product: got x [..., {x.shape[-1]}], wanted [..., {self.columns}]")
        if x.numel() <= self.prepared.few_rows * self.columns and x.dtype in packed_cpu.DTYPES:
            return self.prepared.linear(x, bias)
        flat = x.reshape(-1, self.columns)
        out = packed_cpu.multiply(flat, self.tensors, self.weight.sizes, self.isa, bias)
        return out.to(x.dtype).view(*x.shape[:-1], self.rows)

    def linear_rows(self, x: Tensor, rows: range) -> Tensor:
        """x [..., columns] -> x W[rows]^T, where kernels run; W as for `look_up`."""
        assert self.isa is not None
        flat = x.reshape(-1, self.columns)
        flat = flat if x.dtype in packed_cpu.DTYPES else flat.float()
        out = packed_cpu.multiply_rows(flat, self.tensors, self.weight.sizes, self.isa, rows)
        return out.to(x.dtype).view(*x.shape[:-1], len(rows))

    def look_up(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of W: integers [...] -> [..., columns]; of a weight that is rotated on the side of its rows alone.

        Raises:
            IndexError: a row outside of the matrix.
        """
        if torch.compiler.is_compiling():
            row_scale, signs_in, sizes = (
                self.weight.row_scale,
                self.weight.signs_in,
                list(map(int, self.weight.sizes)),
            )
            stream, table = self.weight.stream, self.weight.table
            return torch.ops.pocketllm.packed_look_up(rows, stream, table, row_scale, signs_in, sizes, dtype)
        flat = rows.reshape(-1)
        at_once = self._runs_at_once(flat, None)
        if self.isa is not None and at_once and dtype in packed_cpu.DTYPES:
            found = self.prepared.look_up(flat.long(), dtype)
        elif self.gpu is not None and at_once:
            found = self.gpu.look_up(flat.long(), self.tensors, self.weight.sizes).to(dtype)
        else:
            found = self._decoded(flat.long()).to(dtype)
        return found.view(*rows.shape, self.columns)

    def _decoded(self, rows: Tensor) -> Tensor:
        """`look_up` in torch: rows [m] -> [m, columns] float32."""
        weight = self.weight.in_stream_order()
        subvectors = weight.table[weight.indices_of(rows)]
        found = join(subvectors, self.columns) * weight.row_scale[rows, None]
        return found if weight.signs_in is None else mixed(found) * weight.signs_in

    def _runs_at_once(self, x: Tensor, bias: Tensor | None) -> bool:
        """Whether a kernel can be called directly: x is a plain tensor next to W, without gradients or tracing."""
        if type(x) is not Tensor or x.device != self.device or torch.compiler.is_compiling():
            return False
        wants = x.requires_grad or (bias is not None and bias.requires_grad)
        return not (wants and torch.is_grad_enabled())


@torch.library.custom_op("pocketllm::packed_look_up", mutates_args=())
def _look_up(
    rows: Tensor,
    stream: Tensor,
    table: Tensor,
    row_scale: Tensor,
    signs_in: Tensor | None,
    sizes: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """`PackedProduct.look_up` as an operator, for torch.compile."""
    weight = PackedWeight(stream, table, row_scale, sizes_of(sizes), None, signs_in)
    return PackedProduct(weight).look_up(rows, dtype)


@_look_up.register_fake
def _(rows: Tensor, *packed: Any) -> Tensor:
    return rows.new_empty(*rows.shape, sizes_of(packed[-2]).columns, dtype=packed[-1])
