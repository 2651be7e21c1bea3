"""Which packed matrices make up a layer that vLLM has fused, and products with them.

vLLM joins the rows of q, k and v, and of gate and up; each part keeps its own codebook, bits and rotation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pocketllm.codec.kernels.packed_product import PackedProduct
from pocketllm.errors import LoadError
from pocketllm.format.layout import Layout
from pocketllm.runtime.layers import PackedMatrix

PACKED = "packed"
"""Attribute of a tensor that stands for a packed matrix: the `PackedMatrix` itself."""
_ATTENTION = {"q": 0, "k": 1, "v": 2}


def carrier(packed: PackedMatrix) -> Tensor:
    """The stream of a packed matrix, which carries the matrix past vLLM's renaming."""
    tensor = packed.indices
    setattr(tensor, PACKED, packed)
    return tensor


def parts_of(layout: Layout, prefix: str, fused: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Names of the matrices that make up a layer; none unless every one of them can stay packed.

    Args:
        prefix: path of the layer in vLLM. fused: leaf of a fused layer -> leaves of its parts.
    """
    parent, dot, leaf = prefix.rpartition(".")
    names = tuple(f"{parent}{dot}{part}.weight" for part in fused.get(leaf, [leaf]))
    return names if all(_can_stay_packed(layout, name) for name in names) else ()


def embedding_of(layout: Layout, shape: tuple[int, int], heads: Collection[str]) -> tuple[str, ...]:
    """Name of the matrix of the token embedding, for which vLLM gives no path; none if that is not clear.

    Args:
        heads: names that are no embeddings, though of the same shape.
    """
    names = [name for name, entry in layout.matrices.items() if entry.shape == shape and name not in heads]
    if len(names) != 1 or not _can_stay_packed(layout, names[0]):
        return ()
    return () if layout.matrices[names[0]].rotation[0] is not None else (names[0],)


def _can_stay_packed(layout: Layout, name: str) -> bool:
    entry = layout.matrices.get(name)
    if entry is None or entry.transposed or len(entry.shape) != 2:
        return False
    return layout.decoders[entry.decoder].codec.decoder == "lookup"


class Parts:
    """The packed matrices of one layer, in the order in which it joins their rows.

    name: of the layer, for errors.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.products: list[PackedProduct] = []
        self._found: dict[int, PackedMatrix] = {}

    def take(self, parameter: Tensor, tensor: Tensor, shard: Any = None) -> None:
        """vLLM's `weight_loader`: take the matrix that a tensor carries.

        Args:
            shard: q, k or v, or the number of the part; also as `tensor.shard_id`.

        Raises:
            LoadError: the tensor carries none.
        """
        packed = getattr(tensor, PACKED, None)
        if packed is None:
            raise LoadError(
                f"{self.name}: got a tensor {tuple(tensor.shape)} of {tensor.dtype}, wanted a packed matrix; "
                "load the model decoded (mode dense)"
            )
        shard = getattr(tensor, "shard_id", None) if shard is None else shard
        self._found[_ATTENTION.get(shard, shard if isinstance(shard, int) else 0)] = packed

    def complete(self, rows: int) -> None:
        """Prepare the products, after all parts are there.

        Raises:
            LoadError: their rows are not those of the layer, or one has no kernel.
        """
        found = [self._found[shard] for shard in sorted(self._found)]
        got = sum(packed.entry.rows for packed in found)
        if got != rows:
            raise LoadError(
                f"{self.name}: got {len(found)} packed matrices of {got} rows, wanted {rows} rows; "
                "load the model decoded (mode dense)"
            )
        for packed in found:
            product = packed.product()
            if product is None:
                raise LoadError(f"{self.name}: has no kernel; load the model decoded (mode dense)")
            self.products.append(product)
        self._found.clear()

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., columns] -> x W^T + bias [..., rows]."""
        if len(self.products) == 1:
            return self.products[0].linear(x, bias)
        joined = torch.cat([product.linear(x) for product in self.products], dim=-1)
        return joined if bias is None else joined + bias

    def look_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of W: integers [...] -> [..., columns]."""
        return self.products[0].look_up(ids, dtype)
