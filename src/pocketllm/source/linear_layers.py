"""Which modules of a model are linear layers: those of torch and transformers, and classes that compute the same."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pocketllm.torch_state import in_default_torch_state

LAYERS = (nn.Embedding, nn.Linear, Conv1D)
"""Classes whose subclasses hold the matrices that a model multiplies with, or looks rows up in."""
_KNOWN = "transformers."
"""Module of the classes whose forward is run; code that comes with a model is in `transformers_modules`."""
_INPUTS, _OUTPUTS = 5, 3
_SHAPES = ((_INPUTS,), (4, _INPUTS), (2, 3, _INPUTS))
_SCALES = (0.0, 1e-3, 1.0, 1e4)
_ROUNDING = 1e-5  # of the largest output


class _OtherAttributeError(BaseException):
    """A forward reads more than the weight and the bias; no `except Exception` within it hides this."""


def linear_kind(cls: Any) -> type[nn.Linear] | type[Conv1D] | None:
    """`nn.Linear` if modules of a class compute x W^T + b, `Conv1D` if they compute x W + b; None for any other.

    A subclass of transformers with its own forward is decided by running that forward on small random tensors, with
    and without bias: it must give the product, and must read no attribute but the weight, the bias and their sizes.
    Classes of other origin may do something else with other tensors, and count as any other layer.
    """
    return _kind(cls)


@cache
@in_default_torch_state
def _kind(cls: Any) -> type[nn.Linear] | type[Conv1D] | None:
    for plain in (nn.Linear, Conv1D):
        if issubclass(cls, plain):
            if cls.forward is plain.forward:
                return plain
            return plain if cls.__module__.startswith(_KNOWN) and _computes(cls, plain) else None
    return None


def _computes(cls: type[nn.Module], plain: type[nn.Module]) -> bool:
    """Whether the forward of a subclass of `nn.Linear` or `Conv1D` is the product."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(_OUTPUTS, _INPUTS, generator=random)
    biases = (torch.randn(_OUTPUTS, generator=random), *((None,) if plain is nn.Linear else ()))
    inputs = [torch.randn(shape, generator=random) * scale for shape in _SHAPES for scale in _SCALES]
    sizes = {"in_features": _INPUTS, "out_features": _OUTPUTS, "nx": _INPUTS, "nf": _OUTPUTS}
    stored = weight if plain is nn.Linear else weight.T.contiguous()
    with torch.no_grad():
        return all(
            _agrees(
                _probe(cls, {"weight": stored, "bias": bias, **sizes}),
                x,
                nn.functional.linear(x, weight, bias),
            )
            for bias in biases
            for x in inputs
        )


def _probe(cls: type[nn.Module], values: dict[str, Any]) -> Any:
    """An object of a class that has some attributes only."""

    def read(self: Any, name: str) -> Any:
        if name not in values:
            raise _OtherAttributeError(name)
        return values[name]

    return object.__new__(type("Probe", (cls,), {"__getattribute__": read}))


def _agrees(layer: Any, x: Tensor, wanted: Tensor) -> bool:
    """Whether the forward of a layer gives a result."""
    try:
        found = type(layer).forward(layer, x.clone())
    except (Exception, _OtherAttributeError):  # whatever a forward of another kind makes of these tensors
        return False
    if not isinstance(found, Tensor) or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        return False
    return bool(((found - wanted).abs() <= _ROUNDING * wanted.abs().max()).all())
