"""Adapters that start as the error of the compression: B A is the best approximation of E = W - W' of its rank.

`error` minimizes ||E - B A||, as LoftQ does (arXiv 2310.08659). `output_error` minimizes tr((E - B A) H (E - B A)^T)
with the second moment H = E[x x^T] of the layer's inputs on the training text, as EoRA does (arXiv 2410.21271). With
H = L L^T and the r leading left singular vectors U of E L, both are B = U, A = U^T E (L = 1 for `error`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pocketllm.calibrate.input_hessians import regularized_hessian
from pocketllm.errors import ConfigError
from pocketllm.source.dense_checkpoint import DenseCheckpoint

ADAPTER = "default"
_TOKENS = 8192  # inputs are measured on
_DAMPING = 0.01  # of the mean diagonal of H
_HELD_BYTES = 1 << 31  # of Hessians at once


@torch.no_grad()
def start_from_error(model: Any, dense: DenseCheckpoint, sequences: Sequence[Tensor], weighted: bool) -> None:
    """Set an adapter in place to the best approximation of the compression error.

    Args:
        model: with PEFT's layers in it, the adapter without effect so far.
        dense: the model that was compressed.
        sequences: token ids [T] each, on which inputs are measured.
        weighted: `output_error` instead of `error`.

    Raises:
        ConfigError: the dense model is not the one that was compressed; names the tensor.
    """
    layers = {
        name: module for name, module in model.named_modules() if ADAPTER in getattr(module, "lora_A", ())
    }
    for part in _parts(layers) if weighted else [layers]:
        hessians = _hessians(model, part, sequences) if weighted else {}
        for name, layer in part.items():
            error = _error(f"{name}.weight", layer, dense)
            if error.any():
                _set(layer, *low_rank(error, layer.r[ADAPTER], hessians.get(name)))


def low_rank(error: Tensor, rank: int, hessian: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best approximation B A of an error [rows, columns], in the metric of a Hessian if there is one.

    Args:
        hessian: [columns, columns], positive definite.

    Returns:
        A [rank, columns] and B [rows, rank], of equal size; zeros beyond the rank that the shape allows.
    """
    seen = error if hessian is None else error @ torch.linalg.cholesky(hessian)
    rows, columns = error.shape
    most = min(rank, rows, columns)
    if rows <= columns:
        basis = torch.linalg.eigh(seen @ seen.T).eigenvectors[:, -most:]
    else:
        basis = torch.linalg.qr(seen @ torch.linalg.eigh(seen.T @ seen).eigenvectors[:, -most:]).Q
    down = basis.T @ error
    root = down.norm(dim=1).clamp(min=1e-20).sqrt()
    a, b = error.new_zeros(rank, columns), error.new_zeros(rows, rank)
    a[:most], b[:, :most] = down / root[:, None], basis * root
    return a, b


def _parts(layers: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Layers whose Hessians are held together, in order."""
    part: dict[str, Any] = {}
    used = 0
    for name, layer in layers.items():
        size = 4 * layer.in_features**2
        if part and used + size > _HELD_BYTES:
            yield part
            part, used = {}, 0
        part[name], used = layer, used + size
    if part:
        yield part


def _hessians(model: Any, layers: dict[str, Any], sequences: Sequence[Tensor]) -> dict[str, Tensor]:
    """Damped second moments of the layers' inputs, by name."""
    sums = {
        name: torch.zeros(layer.in_features, layer.in_features, device=model.device)
        for name, layer in layers.items()
    }

    def watch(name: str) -> Any:
        def add(module: Any, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            sums[name].addmm_(x.T, x)

        return add

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    tokens = 0
    for ids in sequences:
        model(input_ids=ids[None].to(model.device), use_cache=False)
        tokens += len(ids)
        if tokens >= _TOKENS:
            break
    for handle in handles:
        handle.remove()
    found = {}
    for name, total in sums.items():
        hessian = regularized_hessian(total, tokens)
        hessian.diagonal().add_(_DAMPING * float(hessian.diagonal().mean()))
        found[name] = hessian
    return found


def _error(name: str, layer: Any, dense: DenseCheckpoint) -> Tensor:
    """W - W' [rows, columns] float32 of a layer.

    Raises:
        ConfigError: the dense model has no such tensor, one of another shape, or one that differs by more than its
            own size.
    """
    own, stored = layer.get_base_layer().weight.detach(), dense.tied.get(name, name)
    wrong = f"{dense.folder}: is not the model that was compressed"
    if stored not in dense.parts:
        raise ConfigError(f"{wrong}: it has no {name}; name that model with --teacher")
    if dense.shape(stored) != tuple(own.shape):
        raise ConfigError(
            f"{wrong}: {name} is {dense.shape(stored)}, wanted {tuple(own.shape)}; name that model with --teacher"
        )
    value = dense.read(stored).to(own.device).float()
    error = value - own.float()
    size = float(error.square().sum() / value.square().sum().clamp(min=1e-30))
    if not size < 1:
        raise ConfigError(
            f"{wrong}: {name} differs by {size:.2g} of its squared size, wanted less than 1; name that model with "
            "--teacher"
        )
    return error.T if layer.fan_in_fan_out else error


def _set(layer: Any, a: Tensor, b: Tensor) -> None:
    """Let the adapter of a layer compute scaling * B A, and DoRA's magnitudes be those of the sum."""
    root = layer.scaling[ADAPTER] ** 0.5
    layer.lora_A[ADAPTER].weight.copy_(a / root)
    layer.lora_B[ADAPTER].weight.copy_(b / root)
    if ADAPTER in layer.lora_magnitude_vector:
        layer.lora_magnitude_vector[ADAPTER].update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=layer.lora_A[ADAPTER].weight,
            lora_B=layer.lora_B[ADAPTER].weight,
            scaling=layer.scaling[ADAPTER],
        )
