"""The inputs of a block's layers: the Hessian H = E[x x^T] of each matrix.

Linear layers are watched by hooks. Fused experts, one parameter for all experts of a block, are watched where their
slices are multiplied; all experts of a parameter are encoded with one Hessian, the mean over every pair of a token and
an expert that it was sent to.

A Hessian of fewer tokens than columns has directions that were never seen, in which errors would seem to cost
nothing. The missing tokens are replaced by the mean of its siblings (the same layer of the block's other experts)
if there are any, otherwise by uncorrelated inputs. An expert that saw no token thus gets the mean of its siblings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pocketllm.calibrate.window_sums import WindowSums
from pocketllm.errors import SourceError
from pocketllm.format.kept import read_kept
from pocketllm.format.workspace import keep_tensors
from pocketllm.plan.matrices import Matrix


@dataclass(frozen=True)
class Inputs:
    """The inputs of the matrices of a block.

    hessians: [columns, columns] float32 by matrix name; matrices with the same inputs share one tensor.
    tokens: number of tokens behind each; 0 if no input was seen. unseen_experts: number of experts of each fused
    parameter that saw no token.
    """

    hessians: dict[str, Tensor]
    tokens: dict[str, int]
    unseen_experts: dict[str, int]

    def save(self, path: Path) -> None:
        """Write to a temporary name and then rename; shared Hessians are stored once.

        Raises:
            OutputError: it cannot be written.
        """
        owner = {id(hessian): name for name, hessian in reversed(self.hessians.items())}
        facts = {
            "same": {name: owner[id(hessian)] for name, hessian in self.hessians.items()},
            "tokens": self.tokens,
            "unseen_experts": self.unseen_experts,
        }
        tensors = {name: self.hessians[name].cpu().contiguous() for name in owner.values()}
        keep_tensors(path, tensors, facts)

    @classmethod
    def load(cls, path: Path, device: str) -> Inputs:
        """Inverse of `save`.

        Raises:
            ValueError: damaged. OSError: it cannot be read.
        """
        stored, facts = read_kept(path)
        tensors = {name: value.to(device) for name, value in stored.items()}
        hessians = {name: tensors[owner] for name, owner in facts["same"].items()}
        return cls(hessians, facts["tokens"], facts["unseen_experts"])


def regularized_hessian(total: Tensor, tokens: int, filler: Tensor | None = None) -> Tensor:
    """H [C, C] from the sum of x x^T over `tokens` inputs; those missing to C are made up.

    Args:
        filler: [C, C], the Hessian of the inputs that are made up; None for uncorrelated inputs.
    """
    columns = total.shape[0]
    if tokens >= columns:
        return total / tokens
    if filler is None:
        mean = float(total.diagonal().double().mean()) / max(1, tokens)
        filler = torch.eye(columns, device=total.device) * (mean if mean > 0 else 1.0)
    return (total + (columns - tokens) * filler) / columns


@dataclass
class Collector:
    """Sums x^T x of the inputs of matrices while a block runs inside `watching`.

    model: the model that the block belongs to. matrices: of the block.
    """

    model: nn.Module
    matrices: list[Matrix]
    sums: WindowSums = field(default_factory=WindowSums)
    by_expert: dict[str, list[int]] = field(default_factory=dict)
    unseen: set[str] = field(default_factory=set)
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def batch(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """One run of the block, which ends as soon as every matrix has seen its inputs.

        Args:
            weights: [tokens of the batch] that inputs are multiplied by, for matrices that have them.
        """
        self.unseen, self.weights = {m.name for m in self.matrices}, weights
        with suppress(_AllSeenError):
            yield

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect from whatever runs inside, each run of the block inside a `batch`."""
        fused = [m for m in self.matrices if m.experts]
        self.by_expert = {m.name: [0] * m.experts for m in fused}
        latest: list[tuple[Tensor, str]] = []  # the latest input and the first matrix that read it
        handles = [
            self.model.get_submodule(m.name.rpartition(".")[0]).register_forward_pre_hook(
                self._hook(m, latest), with_kwargs=True
            )
            for m in self.matrices
            if not m.experts
        ]
        try:
            if fused:
                with _Products(self._slices(fused), self._add_expert):
                    yield
            else:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(
        self, matrix: Matrix, latest: list[tuple[Tensor, str]]
    ) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def collect(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = (*inputs, *named.values())[0]
            if matrix.name in self.weights:
                self._add(matrix.name, x, self.weights[matrix.name])
            elif latest and latest[0][0] is x:
                self.sums.share(matrix.name, latest[0][1])
            else:
                latest[:] = [(x, matrix.name)]
                self._add(matrix.name, x)
            self.unseen.discard(matrix.name)
            if not self.unseen:  # the product of the last one is not needed
                raise _AllSeenError

        return collect

    def _slices(self, fused: list[Matrix]) -> dict[int, _Slice]:
        """Slice of every expert by its address."""
        found = {}
        for matrix in fused:
            weight = self.model.get_parameter(matrix.name)
            step = weight.stride(0) * len(weight) // matrix.experts * weight.element_size()
            column = weight.stride(-2 if matrix.transposed else -1)
            found.update(
                {weight.data_ptr() + step * n: _Slice(matrix, n, column) for n in range(matrix.experts)}
            )
        return found

    def _add_expert(self, matrix: Matrix, expert: int, x: Tensor) -> None:
        self.by_expert[matrix.name][expert] += x.numel() // x.shape[-1]
        self._add(matrix.name, x)

    @torch.no_grad()
    def _add(self, name: str, x: Tensor, weights: Tensor | None = None) -> None:
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        if weights is not None and len(weights) == len(flat):
            there = weights > 0
            flat = flat[there] * weights[there, None]
        self.sums.add_square(name, flat)

    def inputs(self, device: torch.device | str) -> Inputs:
        """The Hessian of every matrix.

        Raises:
            SourceError: inputs are not finite.
        """
        sums, rows, by_expert = self.sums.shared(), self.sums.rows, self._by_expert()
        fillers = self._fillers(sums)
        made: dict[int, Tensor] = {}
        hessians: dict[str, Tensor] = {}
        for name, seen in sums.items():
            if not bool(seen.isfinite().all()):
                raise SourceError(
                    f"{name}: the inputs of this layer overflow on the calibration text (NaN or Inf); "
                    "the stored model does not work on this text"
                )
        for matrix in self.matrices:
            filler = fillers.get((matrix.kind, matrix.columns))
            total = sums.get(matrix.name)
            if total is None:  # siblings of the same kind share what stands for inputs not seen
                total = torch.zeros(matrix.columns, matrix.columns, device=device)
                key = id(filler) if filler is not None else -matrix.columns
            else:
                key = id(total)
            if key not in made:
                made[key] = regularized_hessian(total, rows.get(matrix.name, 0), filler)
            hessians[matrix.name] = made[key]
        tokens = {m.name: rows.get(m.name, 0) for m in self.matrices}
        return Inputs(hessians, tokens, {name: seen.count(0) for name, seen in by_expert.items()})

    def _by_expert(self) -> dict[str, list[int]]:
        """Tokens by expert, of all ranks."""
        found = self.sums.ranks.gather(self.by_expert)
        return {
            name: [sum(counts) for counts in zip(*(f[name] for f in found), strict=True)] for name in found[0]
        }

    def _fillers(self, sums: Mapping[str, Tensor]) -> dict[tuple[str, int], Tensor]:
        """Mean Hessian of siblings, by kind and columns, where one of them saw too few tokens."""
        kinds: dict[tuple[str, int], list[Matrix]] = defaultdict(list)
        for matrix in self.matrices:
            kinds[matrix.kind, matrix.columns].append(matrix)
        found = {}
        for key, members in kinds.items():
            seen = [m.name for m in members if m.name in sums]
            enough = all(self.sums.rows.get(m.name, 0) >= m.columns for m in members)
            if len(members) > 1 and seen and not enough:
                total = torch.stack([sums[name] for name in seen]).sum(dim=0)
                found[key] = regularized_hessian(total, sum(self.sums.rows[name] for name in seen))
        return found


_PRODUCTS = ("linear", "matmul", "__matmul__", "bmm")


class _AllSeenError(Exception):
    """Every matrix of the block has seen its inputs."""


@dataclass(frozen=True)
class _Slice:
    """The part of a parameter that holds the matrix of one expert.

    column_stride: distance in memory from a weight to that of the next column of the matrix, as it is encoded.
    """

    matrix: Matrix
    expert: int
    column_stride: int

    def is_summed_over_columns(self, product: str, weight: Tensor) -> bool:
        """Whether a product with the slice sums over the columns of the matrix, and not over its rows."""
        if weight.ndim < 2:
            return False
        summed = -1 if product == "linear" else -2
        at = weight.shape[summed], weight.stride(summed)
        return at == (self.matrix.columns, self.column_stride)


class _Products(TorchFunctionMode):
    """Reports every product of an input with a slice of a watched parameter, or with all of it at once."""

    def __init__(self, slices: Mapping[int, _Slice], tell: Callable[[Matrix, int, Tensor], None]) -> None:
        super().__init__()
        self.slices, self.tell = slices, tell

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor):
            x, weight = args[:2]
            found = self.slices.get(weight.data_ptr())
            if found is not None and found.is_summed_over_columns(name, weight):
                matrix = found.matrix
                if weight.numel() == matrix.weights // matrix.experts:
                    self.tell(matrix, found.expert, x)
                elif weight.numel() == matrix.weights and x.ndim == 3:  # one batch of inputs for each expert
                    for number, batch in enumerate(x):
                        sent = batch[batch.any(dim=1)]  # the inputs of other experts are zeros
                        if len(sent):
                            self.tell(matrix, number, sent)
        return func(*args, **(kwargs or {}))
