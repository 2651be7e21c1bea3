"""A GPU that is not there: tensors that say they are on it, compute on the CPU, and refuse to meet others.

Inside `PretendGpu()` whatever is made on `cuda` or moved there is an `OnGpu`. An operation on such tensors and
on ordinary ones together raises, as it would on a real GPU; what a real GPU computes is not imitated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_GPU = torch.device("cuda", 0)
# Operations that a real GPU lets take tensors of both sides, or that only look at them.
_EITHER = {"__getitem__", "__setitem__", "__get__", "__set__", "copy_", "_has_compatible_shallow_copy_type"}


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: _GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]


def _on_gpu(value: Any) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, OnGpu):
        return value  # an alias of a leaf would be no leaf
    return value.as_subclass(OnGpu)


def _off_gpu(value: Tensor) -> Tensor:
    return value.as_subclass(Tensor) if isinstance(value, OnGpu) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors among the arguments of a function; several times faster than torch's `tree_flatten`."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class PretendGpu(TorchFunctionMode):
    """Stands for a GPU while it is entered."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        tensors = list(_tensors((args, kwargs)))
        ours = [value for value in tensors if isinstance(value, OnGpu)]
        if name == "cpu":
            return _off_gpu(args[0])
        if name == "to":
            return self._to(*args, **kwargs)
        if name == "numpy" and ours:
            raise TypeError("can't convert a tensor on a GPU to numpy")
        others = [
            value for value in tensors if not isinstance(value, OnGpu) and value.ndim and not value.is_meta
        ]
        if ours and others and name not in _EITHER:
            raise RuntimeError(
                f"{name}: tensors on a GPU and on the CPU, {[tuple(t.shape) for t in tensors]}"
            )
        made_there = bool(ours)
        if kwargs.get("device") is not None:
            made_there = torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = "cpu" if made_there else kwargs["device"]
        result = func(*args, **kwargs)
        if not made_there:
            return result
        return tree_map(_on_gpu, result) if isinstance(result, tuple | list | dict) else _on_gpu(result)

    @staticmethod
    def _to(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`Tensor.to` in all its forms."""
        device: Any = kwargs.pop("device", value.device)
        dtype = kwargs.pop("dtype", None)
        for argument in args:
            if isinstance(argument, str | torch.device):
                device = argument
            elif isinstance(argument, torch.dtype):
                dtype = argument
            elif isinstance(argument, Tensor):
                device, dtype = argument.device, argument.dtype
        device = torch.device(device)
        if device.type == "meta":
            return Tensor.to(_off_gpu(value), "meta", dtype)
        moved = value if dtype is None else Tensor.to(value, dtype=dtype)
        return _on_gpu(moved) if device.type == "cuda" else _off_gpu(moved)


@contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU without bfloat16, and without memory for more than one matrix at once: threads would not see it."""
    from pocketllm.calibrate import autocast as compute

    monkeypatch.setattr(compute, "fast_dtype", lambda device: torch.float32)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 1))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with PretendGpu():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
