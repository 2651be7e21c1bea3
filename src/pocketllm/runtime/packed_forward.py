"""Forward methods that multiply by packed weights, for known layer types: nothing is decoded to a dense matrix.

The class of a packed layer inherits from one of these classes in addition to the class whose forward it
replaces. An embedding that overrides that forward and calls `super()` (to scale its rows) works as well, and so do
fused experts, on stand-ins of their parameters; every other layer decodes its weight on access, as layers.py describes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pocketllm.codec.kernels.packed_product import PackedProduct
from pocketllm.runtime.packed_parameter import RunsOnStandIns, takes_stand_in
from pocketllm.runtime.packed_tensors import PACKED, TIED, PackedMatrix
from pocketllm.source.linear_layers import linear_kind


def packed_bases(dense: type[nn.Module]) -> tuple[type[nn.Module], ...]:
    """Base classes of the packed form of a layer's class, with a forward of this module where there is one."""
    if issubclass(dense, nn.Embedding):
        return (PackedEmbedding,) if dense is nn.Embedding else (RunsOnStandIns, dense, PackedEmbedding)
    for packed, plain in ((PackedLinear, nn.Linear), (PackedConv1D, Conv1D)):
        if dense is plain:
            return (packed,)
        if issubclass(dense, plain):
            return (packed, dense) if linear_kind(dense) is plain else (dense, packed)
    return (RunsOnStandIns, dense)


def reason_without_kernel(module: nn.Module, leaf: str, matrix: PackedMatrix) -> str:
    """Why a layer cannot run without decoding a parameter; empty if it can."""
    dense = getattr(
        type(module), "_dense_class", type(module)
    )  # of a packed layer, the class that it replaces
    plain = linear_kind(dense) is not None or dense.forward is nn.Embedding.forward
    if leaf == "weight" and (plain or (issubclass(dense, nn.Embedding) and takes_stand_in(matrix))):
        return ""
    if len(matrix.entry.shape) == 3 and takes_stand_in(matrix):
        return ""
    return dense.__name__


def product_of(module: nn.Module, transposed: bool = False) -> PackedProduct | None:
    """The product with a module's packed weight; None if it has no kernel or is no longer packed.

    Also None during torch.export, whose programs hold the packed tensors and decode them (decode_op.py).
    """
    if torch.compiler.is_exporting():
        return None
    matrix = _matrix_of(module)
    return None if matrix is None or matrix.entry.transposed != transposed else matrix.product()


def _matrix_of(module: nn.Module) -> Any:
    """The `PackedMatrix` of a module's weight."""
    matrix = module._modules.get(f"{PACKED}weight")
    return module.__dict__.get(TIED, {}).get("weight") if matrix is None else matrix


def _multiply(product: PackedProduct, x: Tensor, bias: Tensor | None) -> Tensor:
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
        bias = None if bias is None else bias.to(x.dtype)
    return product.linear(x, bias)


class PackedLinear(nn.Linear):
    """x W^T + b."""

    def forward(self, x: Tensor) -> Tensor:
        product = product_of(self)
        return super().forward(x) if product is None else _multiply(product, x, self.bias)


class PackedConv1D(Conv1D):
    """x W + b."""

    def forward(self, x: Tensor) -> Tensor:
        product = product_of(self, transposed=True)
        return super().forward(x) if product is None else _multiply(product, x, self.bias)


class PackedEmbedding(nn.Embedding):
    """Rows of W, decoded one by one."""

    def forward(self, input: Tensor) -> Tensor:
        product = product_of(self)
        if product is None or product.weight.signs_out is not None or self.max_norm is not None:
            return super().forward(input)
        return product.look_up(input, _matrix_of(self).float_dtype)
