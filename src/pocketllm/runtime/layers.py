"""Compressed layers: the model's own modules with a weight that is decoded instead of stored.

Any module works, regardless of what its forward does with the weight: the parameter is replaced by a
`PackedMatrix`, and the module's class by a subclass in which the parameter's name is a property that decodes. The
packed matrix of `weight` is registered as `weight` while a model is loaded, so that transformers finds its tensors
by their stored names (`NAME.indices`, `NAME.row_scale`), and as `packed_weight` afterwards; state dicts have the
stored names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pocketllm.codec.kernels import select
from pocketllm.format.layout import STORE, Layout
from pocketllm.format.mapped_pages import MappedPages
from pocketllm.runtime.packed_forward import packed_bases, reason_without_kernel
from pocketllm.runtime.packed_parameter import value_of
from pocketllm.runtime.packed_tensors import (
    PACKED as PACKED,
    TIED as TIED,
    Codebook as Codebook,
    Decoder as Decoder,
    PackedMatrix as PackedMatrix,
    Store as Store,
    make_products,
)


def replace_parameters(model: nn.Module, layout: Layout, float_dtype: torch.dtype) -> None:
    """Turn a model (on any device, meta included) into its compressed form, weights not yet filled."""
    store = Store(layout)
    model.add_module(STORE, store)
    for name, entry in layout.matrices.items():
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        module._parameters.pop(leaf, None)
        module._modules[leaf] = PackedMatrix(entry, store, float_dtype)


def attach_tied(model: nn.Module, name: str, source: str) -> None:
    """Let the parameter `name` decode the packed matrix registered as `source`."""
    packed = model.get_submodule(source)
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    module._parameters.pop(leaf, None)
    module.__dict__.setdefault(TIED, {})[leaf] = packed  # the dict hides it: registered once, as `source`


def packed_matrices(model: nn.Module) -> dict[str, PackedMatrix]:
    """Parameter name -> its packed matrix."""
    return {parameter_name(name): m for name, m in model.named_modules() if isinstance(m, PackedMatrix)}


def parameter_name(path: str) -> str:
    """Name of the parameter that the packed matrix at a path stands for."""
    parent, dot, key = path.rpartition(".")
    return f"{parent}{dot}{key.removeprefix(PACKED)}"


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Replace packed parameters by placeholders without values, marked as initialized.

    Used while transformers initializes tensors that no file holds: it must not touch packed parameters, but it
    inspects them from their modules and from those above, and computes buffers that no checkpoint stores (such
    as the scale of Gemma's embedding).
    """
    held: list[tuple[nn.Module, str, nn.Module | None]] = []
    for module in list(model.modules()):
        for leaf, packed in _packed_leaves(module):
            held.append((module, leaf, module._modules.pop(leaf, None)))
            stand_in = nn.Parameter(torch.empty(packed.entry.shape, device="meta"), requires_grad=False)
            stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
            module._parameters[leaf] = stand_in
    store = model._modules.pop(STORE, None)
    try:
        yield
    finally:
        if store is not None:
            model._modules[STORE] = store
        for module, leaf, original in held:
            del module._parameters[leaf]
            if original is not None:
                module._modules[leaf] = original


def compute_weights(model: nn.Module) -> None:
    """Give every layer a class whose weight is decoded on access, once the packed tensors are filled.

    Not earlier, because transformers finds the modules to fill by walking attributes.
    """
    for module in list(model.modules()):
        leaves = tuple(leaf for leaf, _ in _packed_leaves(module))
        if leaves:
            module._modules = {
                PACKED + key if isinstance(m, PackedMatrix) else key: m for key, m in module._modules.items()
            }
            dense: Any = type(module)
            module.__class__ = _packed_class(dense, leaves)
    pages, kept = MappedPages(), list[Tensor]()

    def drop_stream(matrix: PackedMatrix) -> None:
        """Bands are what is multiplied with; the file holds the stream."""
        product = matrix.product()
        if product is not None and product.weight.sizes.banded:
            pages.drop(matrix.indices)
            kept.extend(matrix.buffers(recurse=False))

    make_products(packed_matrices(model).values(), drop_stream)  # now: torch.compile does not trace this
    pages.drop(*kept)  # with the pages that neighbours share


def reason_to_decode(model: nn.Module) -> str:
    """Why a model cannot run from packed weights in every layer; empty if it can."""
    for name, module in model.named_modules():
        for leaf, matrix in _packed_leaves(module):
            why = select.no_packed_kernels(matrix.indices.device)
            if why:
                return why
            if not matrix.is_lookup:
                return f"there is no kernel for {name}.{leaf}, whose decoder has row statistics"
            kind = reason_without_kernel(module, leaf, matrix)
            if kind:
                return f"there is no kernel for {name}.{leaf} ({kind})"
    return ""


def _packed_leaves(module: nn.Module) -> list[tuple[str, PackedMatrix]]:
    children = module._modules.items()
    own = [(key.removeprefix(PACKED), m) for key, m in children if isinstance(m, PackedMatrix)]
    return [*own, *module.__dict__.get(TIED, {}).items()]


class _Packed(nn.Module):
    """Base of the classes of layers with packed parameters; see `_packed_class`."""

    _dense_class: type[nn.Module]
    _leaves: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:  # the class itself cannot be found by its name
        return _empty, (self._dense_class, self._leaves), self.__getstate__()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Replace a packed parameter by an ordinary one."""
        if name in self._leaves:
            self._modules.pop(PACKED + name, None)
            self.__dict__.get(TIED, {}).pop(name, None)
            rest = tuple(leaf for leaf in self._leaves if leaf != name)
            dense: Any = self._dense_class
            self.__class__ = _packed_class(dense, rest) if rest else dense
        nn.Module.register_parameter(self, name, param)  # it may be no `_Packed` any more

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """As for any module, under the stored names."""
        found = super().state_dict(*args, prefix=prefix, **kwargs)
        for leaf in self._leaves:
            _rename(found, f"{prefix}{PACKED}{leaf}.", f"{prefix}{leaf}.")
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for leaf in self._leaves:
            _rename(state_dict, f"{prefix}{leaf}.", f"{prefix}{PACKED}{leaf}.")
        super()._load_from_state_dict(state_dict, prefix, *args)


def _rename(tensors: dict[str, Any], old: str, new: str) -> None:
    for key in [key for key in tensors if key.startswith(old)]:
        tensors[new + key.removeprefix(old)] = tensors.pop(key)


def make_dense(*modules: nn.Module | None) -> None:
    """Decode the packed parameters of single modules permanently; shared ones stay shared."""
    made: dict[int, nn.Parameter] = {}
    for module in modules:
        if not isinstance(module, _Packed):
            continue
        for leaf, packed in _packed_leaves(module):
            if id(packed) not in made:
                made[id(packed)] = nn.Parameter(packed(), requires_grad=False)
            module.register_parameter(leaf, made[id(packed)])


@cache
def _packed_class(dense: Any, leaves: tuple[str, ...]) -> Any:
    """A subclass in which some parameters are decoded on access."""

    def decoded(leaf: str) -> property:
        return property(lambda self: value_of(self, dict(_packed_leaves(self))[leaf]))

    members: dict[str, Any] = {leaf: decoded(leaf) for leaf in leaves}
    bases = packed_bases(dense)
    return type(
        f"Packed{dense.__name__}", (_Packed, *bases), {**members, "_dense_class": dense, "_leaves": leaves}
    )


def _empty(dense: Any, leaves: tuple[str, ...]) -> Any:
    """An object of a packed class that pickle fills."""
    cls = _packed_class(dense, leaves)
    return cls.__new__(cls)


@torch.no_grad()
def decode_in_place(model: nn.Module) -> dict[str, PackedMatrix]:
    """Replace every packed parameter by its decoded value: ordinary layers again, at full speed.

    Returns:
        The packed matrices that were replaced, by parameter name.
    """
    packed = packed_matrices(model)
    decoded = {id(m): nn.Parameter(m(), requires_grad=False) for m in packed.values()}
    for module in list(model.modules()):
        for leaf, matrix in _packed_leaves(module):
            module._modules.pop(leaf, None)
            module.__dict__.get(TIED, {}).pop(leaf, None)
            module.register_parameter(leaf, decoded[id(matrix)])
    delattr(model, STORE)
    return packed
