"""Gradients of the loss of tokens drawn from the model itself, one block of the model at a time.

The forward pass writes the inputs of each block to disk (`SpooledActivations`); after the head (`Head`) the backward
pass runs block by block (`block_backward`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pocketllm.calibrate.activations import Activations
from pocketllm.calibrate.autocast import autocast, fast_dtype
from pocketllm.calibrate.blocks import BlockStream
from pocketllm.calibrate.window_sums import WindowSums
from pocketllm.config.constants import LARGEST_TOKEN_WEIGHT, LOUDEST_GRADIENT, UNEVEN_GRADIENTS
from pocketllm.plan.matrices import Matrix

LOGITS_AT_ONCE = 256  # positions, at most
LOGIT_NUMBERS = 1 << 24  # of those positions, unless the vocabulary is larger
STRIP_WEIGHTS = 1 << 24  # of the head, converted at once


class Head:
    """The part after the blocks: final norm, head, and the loss of tokens drawn from the model itself.

    rows: [vocabulary] the Fisher information of each row of the head, summed over its weights and the tokens:
    p (1 - p) |h|^2 of every token, with p the probability of the row's token and h the input of the head.
    """

    def __init__(self, stream: BlockStream, seed: int) -> None:
        self.stream, self.seed = stream, seed
        stream.load_head()
        self.head = stream.model.get_output_embeddings()
        # A float32 copy of it would be large. Autocast converts what it needs.
        is_float32 = self.head.weight.dtype == torch.float32
        self.is_converted = fast_dtype(stream.device) == torch.float32 and not is_float32
        self.sums = WindowSums(stream.device, stream.ranks)

    @property
    def rows(self) -> Tensor:
        """[vocabulary], see above."""
        return self.sums.values["rows"]

    @property
    def hessian(self) -> Tensor:
        """[C, C] sum of x x^T of the head's inputs; all ranks must ask for it."""
        return self.sums.shared()["hessian"]

    def all_backward(self) -> Activations:
        """`backward` of every window of this rank."""
        found = self.stream.activations()
        for turn in range(self.stream.rounds):
            if turn < len(self.stream.hidden):
                found.append(self.backward(turn))
            self.sums.end_round()
        return found

    def backward(self, turn: int) -> Tensor:
        """Gradient of a window's loss with respect to the output of the blocks, [1, context, C].

        Args:
            turn: number of the window among those of this rank.
        """
        hidden = self.stream.hidden[turn].detach().clone().requires_grad_()
        with torch.enable_grad():
            final = self.stream.after_blocks(hidden)
        final_gradient = torch.zeros_like(final)
        generator = torch.Generator().manual_seed(self.seed + self.stream.numbers[turn])
        with torch.no_grad():
            flat, out = final.detach().reshape(-1, final.shape[-1]), []
            self.sums.add_square("hessian", flat)
            most = max(1, min(LOGITS_AT_ONCE, LOGIT_NUMBERS // len(self.head.weight)))
            for part in flat.split(most):
                p = self._logits(part).softmax(dim=-1)
                variance = p.square()
                torch.sub(p, variance, out=variance)
                self.sums.add_value("rows", (part.float().square().sum(dim=1) @ variance).cpu())
                del variance
                drawn = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
                p.scatter_add_(1, drawn, torch.full_like(p[:, :1], -1.0))  # d loss / d logits
                out.append(self._times_weight(p))
            final_gradient = torch.cat(out).reshape(final.shape)
        final.backward(final_gradient)
        assert hidden.grad is not None
        return hidden.grad

    def _logits(self, x: Tensor) -> Tensor:
        """Logits [n, vocabulary] float32 of inputs [n, C] of the head."""
        if self.is_converted:
            parts = [x @ strip.T.float() for strip in self._strips()]
            return torch.cat(parts, dim=1) + (0 if self.head.bias is None else self.head.bias)
        with autocast(x.device):
            found: Tensor = self.head(x).float()
        return found

    def _times_weight(self, x: Tensor) -> Tensor:
        """x W [n, C] float32 of x [n, vocabulary]."""
        if self.is_converted:
            strips = self._strips()
            parts = x.split(len(strips[0]), dim=1)
            return torch.stack([a @ b.float() for a, b in zip(parts, strips, strict=True)]).sum(dim=0)
        with autocast(x.device):
            return (x @ self.head.weight).float()

    def _strips(self) -> tuple[Tensor, ...]:
        """The head's weight, some rows at a time."""
        return self.head.weight.split(max(1, STRIP_WEIGHTS // self.head.weight.shape[1]))


@dataclass
class OutputGradients:
    """Gradients at the outputs of a block's layers, by matrix.

    sums: of g g^T, lists of the norms per token of every window, and the squared gradients of the weights.
    """

    sums: WindowSums = field(default_factory=WindowSums)

    def add(self, name: str, gradient: Tensor) -> None:
        """Add the gradient of one window, [1, context, rows]."""
        flat = gradient.reshape(-1, gradient.shape[-1]).float()
        size = flat.norm(dim=1)
        self.sums.add_item(name, size.cpu())
        most = LOUDEST_GRADIENT * size.median()
        self.sums.add_square(name, flat * (most / size.clamp(min=1e-30)).clamp(max=1)[:, None])

    def add_weights(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Add the squared gradients of weights for one window."""
        for name, value in gradients.items():
            if value is not None:
                self.sums.add_value(name, value.square().sum().double().cpu())

    @property
    def squares(self) -> dict[str, Tensor]:
        """Sums of g g^T that this rank keeps."""
        return self.sums.squares

    @property
    def energy(self) -> dict[str, float]:
        """Squared gradient of each weight, summed over windows."""
        return {name: float(value) for name, value in self.sums.values.items()}

    def token_weights(self, windows: int) -> dict[str, Tensor]:
        """Weights [N, context] float16 of the matrices in which a few tokens have most of the gradient.

        Matrices that did not see every token of every window, such as experts, are left out.
        """
        found = {}
        for name, norms in self.sums.items.items():
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
    gradients: Activations,
    rows_in_8_bits: int | None = None,
) -> tuple[Activations, OutputGradients]:
    """Gradients before a block from those after it, of the windows of this rank; also collects those of all windows
    at the outputs of its layers, and the squared gradient of each weight.

    Args:
        rows_in_8_bits: of layers whose gradients are kept as well; see `WindowSums`.
    """
    weights = {m.name: stream.model.get_parameter(m.name).requires_grad_() for m in matrices}
    layers = {m.name: stream.model.get_submodule(m.name.rpartition(".")[0]) for m in matrices}
    sums = WindowSums(stream.device, stream.ranks, columns_in_8_bits=rows_in_8_bits)
    before, after = stream.activations(), OutputGradients(sums)
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _layer, _inputs, out, name=name: seen.update({name: out}))
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear | Conv1D)
    ]
    for turn in range(stream.rounds):
        for gradient in gradients[turn : turn + 1]:
            hidden = stream.hidden[turn].detach().clone().requires_grad_()
            seen.clear()
            with torch.enable_grad():
                out = stream.call(block, hidden, turn)
            for name in [name for name, value in seen.items() if not value.requires_grad]:
                del seen[name]  # computed without gradients, as indexers of sparse attention are
            asked = [hidden, *weights.values(), *seen.values()]
            found = torch.autograd.grad(out, asked, gradient, allow_unused=True)
            assert found[0] is not None
            before.append(found[0])
            after.add_weights(dict(zip(weights, found[1:], strict=False)))
            for name, value in zip(seen, found[1 + len(weights) :], strict=True):
                if (
                    value is not None and value.numel() == value.shape[-1] * hidden.shape[1]
                ):  # not some experts'
                    after.add(name, value)
        after.sums.end_round()
    for hook in hooks:
        hook.remove()
    return before, after
