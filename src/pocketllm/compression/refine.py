"""Block-wise refinement: tune everything except the indices so that an encoded block matches the dense one.

After a block is encoded, its decoders, row scales, norms and biases are trained for a few steps; indices and
shared codebooks are unchanged. Inputs are the outputs of the encoded blocks before it, targets those of the dense
model, so that a block also compensates for the errors of its predecessors. The loss is the squared error of a
token's output over its squared target, because the following norm removes a token's scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pocketllm.calibrate.activations import Activations
from pocketllm.codec.index_form import IndexForm
from pocketllm.codec.matrix_codec import MatrixCodec
from pocketllm.codec.reconstruct import Lookup, decoded_table
from pocketllm.codec.rotation import Seeds
from pocketllm.config import CalibrationConfig


@dataclass(frozen=True)
class EncodedParameter:
    """An encoded matrix of a block.

    indices: [rows, n] int32. row_scale: [rows] float32. tunes_decoder: whether no other matrix shares it.
    unfold: matrix [rows, columns] -> the parameter's shape.
    """

    indices: Tensor
    row_scale: Tensor
    codec: MatrixCodec
    form: IndexForm
    tunes_decoder: bool
    columns: int
    rotation: Seeds
    unfold: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Refined:
    """row_scale, up and down by matrix, vectors by parameter name, error before and after."""

    row_scale: dict[str, Tensor]
    decoders: dict[str, tuple[Tensor, Tensor]]
    vectors: dict[str, Tensor]
    before: float
    after: float


class _Parameters:
    """The trained tensors, and the block's parameters computed from them."""

    def __init__(self, block: nn.Module, prefix: str, encoded: Mapping[str, EncodedParameter]) -> None:
        self.prefix, self.encoded = prefix, encoded
        self.gains = {name: torch.zeros_like(c.row_scale).requires_grad_() for name, c in encoded.items()}
        self.decoders = {
            name: tuple(t.detach().clone().requires_grad_(c.tunes_decoder) for t in c.codec.decoder.weights())
            for name, c in encoded.items()
        }
        self.vectors = {
            f"{prefix}{name}": p.detach().clone().requires_grad_()
            for name, p in block.named_parameters()
            if p.ndim < 2
        }

    def groups(self, settings: CalibrationConfig) -> list[dict[str, object]]:
        decoders = [t for pair in self.decoders.values() for t in pair if t.requires_grad]
        return [
            {"params": list(self.gains.values()), "lr": settings.refine_rate},
            {"params": decoders, "lr": settings.refine_rate},
            {"params": list(self.vectors.values()), "lr": settings.refine_rate},
        ]

    def values(self) -> dict[str, Tensor]:
        """Parameters of the block by their names in it, differentiable."""
        found = {name.removeprefix(self.prefix): value for name, value in self.vectors.items()}
        for name, c in self.encoded.items():
            decoded = decoded_table(c.codec.config, c.codec.codebook.detach(), *self.decoders[name])
            scale = c.row_scale * self.gains[name].exp()
            matrix = Lookup.apply(c.indices, c.form.table(decoded), scale, c.columns, c.rotation)
            found[name.removeprefix(self.prefix)] = c.unfold(matrix)
        return found

    def stored(self, before: float, after: float) -> Refined:
        """The trained tensors as they are stored. before, after: the error."""
        scales = {n: (c.row_scale * self.gains[n].detach().exp()).bfloat16() for n, c in self.encoded.items()}
        decoders = {
            name: (up.detach().half(), down.detach().half())
            for name, (up, down) in self.decoders.items()
            if self.encoded[name].tunes_decoder
        }
        return Refined(scales, decoders, {n: v.detach() for n, v in self.vectors.items()}, before, after)

    def state(self) -> list[Tensor]:
        """A copy of everything trained."""
        pairs = [t for pair in self.decoders.values() for t in pair]
        return [t.detach().clone() for t in (*self.gains.values(), *pairs, *self.vectors.values())]

    def restore(self, state: list[Tensor]) -> None:
        pairs = [t for pair in self.decoders.values() for t in pair]
        with torch.no_grad():
            for tensor, value in zip(
                (*self.gains.values(), *pairs, *self.vectors.values()), state, strict=True
            ):
                tensor.copy_(value)


def refine_block(
    block: nn.Module,
    prefix: str,
    encoded: Mapping[str, EncodedParameter],
    inputs: Activations,
    targets: Activations,
    call: Callable[[Callable[..., Tensor], Tensor, int], Tensor],
    settings: CalibrationConfig,
) -> Refined:
    """Train for `settings.refine_epochs` passes over the batches; the result is kept only if the error is lower.

    Args:
        prefix: of the block's parameter names, with a dot at its end. encoded: by full name.
        inputs, targets: [batch, context, C] each. call: (block, hidden, number of the batch) -> output.
    """
    parameters = _Parameters(block, prefix, encoded)
    optimizer = torch.optim.Adam(parameters.groups(settings))
    steps = settings.refine_epochs * len(inputs)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))

    def output(hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            values = parameters.values()
        result = functional_call(block, values, (hidden, *args), kwargs)
        return result[0] if isinstance(result, tuple) else result

    def loss(number: int) -> Tensor:
        target = targets[number]
        error = (call(output, inputs[number], number) - target).square().sum(dim=-1)
        return (error / target.square().sum(dim=-1).clamp(min=1e-12)).mean()

    @torch.no_grad()
    def mean_loss() -> float:
        return sum(loss(number).item() for number in range(len(inputs))) / len(inputs)

    before, state = mean_loss(), parameters.state()
    for _ in range(settings.refine_epochs):
        for number in range(len(inputs)):
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                loss(number).backward()
            optimizer.step()
            schedule.step()
    after = mean_loss()
    if not after < before:
        parameters.restore(state)
        after = before
    return parameters.stored(before, after)
