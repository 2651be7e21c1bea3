"""Stand-ins of packed parameters, for layers whose forward takes their weight in its own way.

Fused experts slice a parameter [experts, ...] and multiply with the slices, scaled embeddings ask for the dtype of
their weight. Inside such a forward the parameter is a tensor without values: products with slices of it run on the
packed matrix, and every operation that is not known here decodes it first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pocketllm.runtime.packed_tensors import PackedMatrix

_FACTS = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout")
    ),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point),
}
_MATMUL = {Tensor.matmul, Tensor.__matmul__, torch.matmul}
_BMM = {Tensor.bmm, torch.bmm}


class PackedParameter(Tensor):
    """A packed parameter, or the slice of one expert, as a tensor that holds no values.

    Args:
        matrix: with a product, and not rotated across its rows. expert: number of the slice, None for all.
    """

    matrix: PackedMatrix
    expert: int | None

    @staticmethod
    def __new__(cls, matrix: PackedMatrix, expert: int | None = None) -> PackedParameter:
        shape = matrix.entry.shape if expert is None else matrix.entry.shape[1:]
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=matrix.float_dtype)
        made.matrix, made.expert = matrix, expert
        found: PackedParameter = made
        return found

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found = _packed_result(func, args, kwargs)
        if found is not None:
            return found
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(PackedParameter, PackedParameter.decoded, (args, kwargs or {}))
        return func(*args, **kwargs)

    def decoded(self) -> Tensor:
        """Its values, in its shape."""
        matrix, expert = self.matrix, self.expert
        if expert is None:
            whole: Tensor = matrix()
            return whole
        product, rows = matrix.product(), matrix.expert_rows(expert)
        assert product is not None
        found = product.look_up(torch.arange(rows.start, rows.stop), matrix.float_dtype)
        return found.mT if matrix.entry.transposed else found

    def times(self, x: Tensor, expert: int) -> Tensor:
        """x [..., columns] times the transposed matrix of an expert."""
        product = self.matrix.product()
        assert product is not None
        return product.linear_rows(x, self.matrix.expert_rows(expert))


def _packed_result(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Tensor | None:
    """What a known operation gives without decoding; None for any other."""
    if func is Tensor.__getitem__ and isinstance(args[0], PackedParameter):
        whole, at = args
        one = isinstance(at, int) or (
            isinstance(at, Tensor) and not at.ndim and not at.dtype.is_floating_point
        )
        if not one or isinstance(at, bool) or whole.expert is not None or whole.ndim != 3:
            return None
        return PackedParameter(whole.matrix, range(whole.shape[0])[int(at)])
    if func is not nn.functional.linear and func not in _MATMUL | _BMM:
        return None
    x, weight = args[0], kwargs.get("weight") if len(args) < 2 else args[1]
    if not isinstance(weight, PackedParameter) or isinstance(x, PackedParameter):
        return None
    if x.dtype != weight.dtype or (torch.is_grad_enabled() and x.requires_grad):
        return None
    transposed, expert = weight.matrix.entry.transposed, weight.expert
    if func is nn.functional.linear and not transposed and expert is not None:
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        found = weight.times(x, expert)
        return found if bias is None else found + bias
    if func in _MATMUL and transposed and expert is not None:
        return weight.times(x, expert)
    if func in _BMM and transposed and expert is None:
        return torch.stack([weight.times(rows, n) for n, rows in enumerate(x)])
    return None


class RunsOnStandIns(nn.Module):
    """Base of packed layers in whose forward packed parameters are `PackedParameter`s."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return super().forward(*args, **kwargs)
        self.__dict__["_on_stand_ins"] = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.__dict__["_on_stand_ins"] = False


def value_of(module: nn.Module, matrix: PackedMatrix) -> Tensor:
    """A packed parameter of a layer: decoded, or inside a forward that runs on them, a stand-in."""
    if module.__dict__.get("_on_stand_ins") and takes_stand_in(matrix):
        return PackedParameter(matrix)
    found: Tensor = matrix()
    return found


def takes_stand_in(matrix: PackedMatrix) -> bool:
    """Whether single rows of a matrix can be multiplied with by a kernel."""
    product = matrix.product()
    return product is not None and product.isa is not None and product.weight.signs_out is None
