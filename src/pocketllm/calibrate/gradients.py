"""Gradients of the loss of tokens drawn from the model itself, one block of the model at a time.

The forward pass writes the inputs of each block to disk (`ActivationSpool`); after the head (`Head`) the backward
pass runs block by block (`block_backward`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pocketllm.calibrate.autocast import autocast
from pocketllm.calibrate.blocks import BlockStream
from pocketllm.codec.kernels.select import add_square
from pocketllm.config.constants import LARGEST_TOKEN_WEIGHT, LOUDEST_GRADIENT, UNEVEN_GRADIENTS
from pocketllm.format.kept import read_kept
from pocketllm.format.workspace import keep_tensors
from pocketllm.plan.matrices import Matrix

_LOGITS_AT_ONCE = 256  # positions, at most
_LOGIT_NUMBERS = 1 << 24  # of those positions, unless the vocabulary is larger


class ActivationSpool:
    """The inputs of blocks, on disk."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device

    def write(self, number: int, hidden: list[Tensor]) -> None:
        """Write the batches of a block."""
        tensors = {str(batch): value.contiguous() for batch, value in enumerate(hidden)}
        keep_tensors(self.folder / f"{number}.safetensors", tensors, {})

    def pop(self, number: int) -> list[Tensor]:
        """Read the batches of a block and delete them."""
        path = self.folder / f"{number}.safetensors"
        tensors, _ = read_kept(path)
        hidden = [tensors[str(number)].to(self.device) for number in range(len(tensors))]
        path.unlink()
        return hidden


class Head:
    """The part after the blocks: final norm, head, and the loss of tokens drawn from the model itself.

    rows: [vocabulary] the Fisher information of each row of the head, summed over its weights and the tokens:
    p (1 - p) |h|^2 of every token, with p the probability of the row's token and h the input of the head.
    """

    def __init__(self, stream: BlockStream, seed: int) -> None:
        self.stream, self.seed = stream, seed
        stream.load_head()
        self.head = stream.model.get_output_embeddings()
        self.rows = torch.zeros(self.head.weight.shape[0], device=stream.device)
        columns = self.head.weight.shape[1]
        self.hessian = torch.zeros(columns, columns, device=stream.device)

    def backward(self, number: int) -> Tensor:
        """Gradient of a window's loss with respect to the output of the blocks, [1, context, C]."""
        hidden = self.stream.hidden[number].detach().clone().requires_grad_()
        with torch.enable_grad():
            final = self.stream.after_blocks(hidden)
        final_gradient = torch.zeros_like(final)
        generator = torch.Generator().manual_seed(self.seed + number)
        with torch.no_grad():
            flat, out = final.detach().reshape(-1, final.shape[-1]), []
            add_square(self.hessian, flat)
            most = max(1, min(_LOGITS_AT_ONCE, _LOGIT_NUMBERS // len(self.rows)))
            for part in flat.split(most):
                with autocast(flat.device):
                    logits = self.head(part).float()
                p = logits.softmax(dim=-1)
                self.rows += part.float().square().sum(dim=1) @ (p - p.square())
                drawn = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
                p.scatter_add_(1, drawn, torch.full_like(p[:, :1], -1.0))  # d loss / d logits
                with autocast(flat.device):
                    out.append((p @ self.head.weight).float())
            final_gradient = torch.cat(out).reshape(final.shape)
        final.backward(final_gradient)
        assert hidden.grad is not None
        return hidden.grad


@dataclass
class OutputGradients:
    """Gradients at the outputs of a block's layers: sums of g g^T and the norm per token, by matrix."""

    squares: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, name: str, gradient: Tensor) -> None:
        """Add the gradient of one window, [1, context, rows]."""
        flat = gradient.reshape(-1, gradient.shape[-1]).float()
        size = flat.norm(dim=1)
        self.norms.setdefault(name, []).append(size.cpu())
        most = LOUDEST_GRADIENT * size.median()
        flat = flat * (most / size.clamp(min=1e-30)).clamp(max=1)[:, None]
        add_square(self.squares.setdefault(name, flat.new_zeros(flat.shape[1], flat.shape[1])), flat)

    def token_weights(self, windows: int) -> dict[str, Tensor]:
        """Weights [N, context] float16 of the matrices in which a few tokens have most of the gradient.

        Matrices that did not see every token of every window, such as experts, are left out.
        """
        found = {}
        for name, norms in self.norms.items():
            if len(norms) < windows:
                continue
            sizes = torch.stack(norms)
            median = sizes.median()
            if median > 0 and sizes.square().mean() > UNEVEN_GRADIENTS * median.square():
                found[name] = (sizes / median).clamp(min=1e-3, max=LARGEST_TOKEN_WEIGHT).half()
        return found


def block_backward(
    stream: BlockStream,
    block: nn.Module,
    matrices: list[Matrix],
    gradients: list[Tensor],
    energy: dict[str, float],
) -> tuple[list[Tensor], OutputGradients]:
    """Gradients before a block from those after it; also collects those at the outputs of its layers.

    Adds each weight's squared gradient to `energy`.
    """
    weights = {m.name: stream.model.get_parameter(m.name).requires_grad_() for m in matrices}
    layers = {m.name: stream.model.get_submodule(m.name.rpartition(".")[0]) for m in matrices}
    before, after = list[Tensor](), OutputGradients()
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _layer, _inputs, out, name=name: seen.update({name: out}))
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear | Conv1D)
    ]
    for number, gradient in enumerate(gradients):
        hidden = stream.hidden[number].detach().clone().requires_grad_()
        seen.clear()
        with torch.enable_grad():
            out = stream.call(block, hidden, number)
        for name in [name for name, value in seen.items() if not value.requires_grad]:
            del seen[name]  # computed without gradients, as indexers of sparse attention are
        asked = [hidden, *weights.values(), *seen.values()]
        found = torch.autograd.grad(out, asked, gradient, allow_unused=True)
        assert found[0] is not None
        before.append(found[0])
        for name, value in zip(weights, found[1:], strict=False):
            if value is not None:
                energy[name] = energy.get(name, 0.0) + float(value.square().sum())
        for name, value in zip(seen, found[1 + len(weights) :], strict=True):
            if value is not None and value.numel() == value.shape[-1] * hidden.shape[1]:  # not some experts'
                after.add(name, value)
    for hook in hooks:
        hook.remove()
    return before, after
