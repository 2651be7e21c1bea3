"""Tune what is not yet encoded of a block so that it makes up for the errors of what is.

The matrices of a block are encoded in groups, in the order in which the block uses them. After each group, the weights
of the groups that follow are trained for a few steps until the block gives the outputs that it gave with dense
weights for the same inputs. Error feedback does the same within a matrix; this does it between matrices, and through
what lies between them. The loss is the squared error of a token's output over its squared size, because the following
norm removes a token's scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pocketllm.calibrate.activations import Activations
from pocketllm.calibrate.blocks import BlockStream
from pocketllm.config import CalibrationConfig
from pocketllm.plan.matrices import Matrix

COMPENSATE_TOKENS = 1024
"""Tokens of a step, at least one window."""
HELD_OUT = 8
"""One of so many batches is held out from the steps, the last ones."""


def groups_in_order(stream: BlockStream, block: nn.Module, matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    """Matrices of the loaded block in the order in which it uses them; those with the same input form one group.

    All matrices of a kind, such as the experts of a layer, are in one group. Kinds that are no layers of their own,
    such as fused experts, come last, in one group.
    """
    order, first = dict[str, int](), list[Tensor]()  # group of each kind, first input of each group

    def note(kind: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(module: nn.Module, given: tuple[Any, ...]) -> None:
            if kind not in order:
                if not (first and first[-1] is given[0]):
                    first.append(given[0])
                order[kind] = len(first) - 1

        return see

    layers = [(m, stream.model.get_submodule(m.name.rpartition(".")[0])) for m in matrices]
    hooks = [layer.register_forward_pre_hook(note(m.kind)) for m, layer in layers if len(m.shape) == 2]
    with torch.no_grad():
        stream.call(block, stream.hidden[0], 0)
    for hook in hooks:
        hook.remove()
    groups: list[list[Matrix]] = [[] for _ in range(len(first) + 1)]
    for matrix in matrices:
        groups[order.get(matrix.kind, -1)].append(matrix)
    return [group for group in groups if group]


def compensated(
    stream: BlockStream,
    block: nn.Module,
    matrices: Sequence[Matrix],
    targets: Activations,
    settings: CalibrationConfig,
    seed: int,
) -> dict[str, Tensor]:
    """Train weights of the loaded block for `settings.compensate` steps; each takes one batch.

    Args:
        matrices: those to train. targets: [batch, context, C] outputs of the dense block, by batch.
        seed: of the order of batches.

    Returns:
        The trained weights, float32, by name; the given ones if the loss is not lower on the batches that are held out.
    """
    prefix, steps = f"{stream.path}.{stream.number}.", settings.compensate
    given = {m.name: stream.model.get_parameter(m.name).detach() for m in matrices}
    values = {name: value.clone().requires_grad_() for name, value in given.items()}
    optimizer = torch.optim.Adam(_rates(matrices, values, settings.compensate_rate), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: (1 + math.cos(math.pi * n / steps)) / 2)
    own = {name.removeprefix(prefix): value for name, value in values.items()}

    def output(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = functional_call(block, own, (hidden, *args), kwargs)
        return result[0] if isinstance(result, tuple) else result

    def loss(number: int) -> Tensor:
        target = targets[number]
        error = (stream.call(output, stream.hidden[number], number) - target).square().sum(dim=-1)
        return (error / target.square().sum(dim=-1).clamp(min=1e-12)).mean()

    @torch.no_grad()
    def mean_loss(numbers: range) -> float:
        return sum(loss(number).item() for number in numbers) / len(numbers)

    used = len(targets) - len(targets) // HELD_OUT
    held = range(used, len(targets)) or range(used)
    before = mean_loss(held)
    for number in _batches(used, steps, seed):
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss(number).backward()
        optimizer.step()
        schedule.step()
    return {name: value.detach() for name, value in values.items()} if mean_loss(held) < before else given


def _rates(matrices: Sequence[Matrix], values: Mapping[str, Tensor], rate: float) -> list[dict[str, Any]]:
    """Learning rates: steps of Adam are equal in all weights, and add up over the inputs of a layer."""
    sizes = {name: float(value.detach().square().mean().sqrt()) for name, value in values.items()}
    return [{"params": [values[m.name]], "lr": rate * sizes[m.name] / m.columns} for m in matrices]


def _batches(count: int, steps: int, seed: int) -> Iterator[int]:
    """Numbers of batches in random order, all before one comes again."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step % count == 0:
            order = torch.randperm(count, generator=generator).tolist()
        yield order[step % count]


def compensated_unit(number: int, group: int) -> str:
    """File name of the weights of a block that were tuned after a group of it, in the workspace."""
    return f"compensated-{number:05d}-{group:03d}.safetensors"
