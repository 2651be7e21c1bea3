"""A compressed model and its teacher for index_learning.py: gradients, curvature, candidates for better segments."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from index_segments import Segments, SegmentSearch
from torch import Tensor

from pocketllm.codec.index_form import form_for
from pocketllm.codec.reconstruct import rotate_matrix
from pocketllm.codec.subvectors import cut
from pocketllm.config import DistillConfig
from pocketllm.config.constants import LOUDEST_GRADIENT
from pocketllm.format.checkpoint import STORE
from pocketllm.recover import trainable
from pocketllm.recover.base_model import compute_dtype, find_teacher, open_base
from pocketllm.recover.distill_task import Distillation, load_student
from pocketllm.recover.teacher import LiveTeacher, open_teacher
from pocketllm.runtime.layers import parameter_name

GROUPS = 4  # of micro-batches
MICRO_BATCH = 4  # windows
SEARCHED, KEPT = (
    3000,
    200,
)  # segments of a matrix, of the largest bound on their gain, and of the largest gain
STEPS = {1: 6, 2: 4, 3: 2, 4: 2}  # of a segment, by bits of a step; else 1: at most 256 alternatives
CPU = torch.device("cpu")
_TRAINED = trainable._Linear  # what a trial replaces

OnGradient = Callable[[str, Tensor, Tensor], None]


class FixedLinear(torch.autograd.Function):
    """x W^T with W decoded beforehand; hands inputs and output gradients to `watch` in the backward pass."""

    decoded: ClassVar[dict[int, tuple[str, Tensor]]] = {}
    watch: ClassVar[OnGradient] = staticmethod(lambda name, x, grad: None)

    @staticmethod
    def forward(ctx, matrix, x, gain, *shared):  # type: ignore[no-untyped-def]
        ctx.key, ctx.others = id(matrix), 1 + len(shared)
        ctx.save_for_backward(x)
        return x @ FixedLinear.decoded[ctx.key][1].T

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,), (name, weight) = ctx.saved_tensors, FixedLinear.decoded[ctx.key]
        grad = grad.to(x.dtype)
        FixedLinear.watch(name, x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]))
        return None, grad @ weight, *[None] * ctx.others


@dataclass
class Candidates:
    """Segments of one matrix. moves: [S, touched, d] of its rotated weights. slopes: [S, GROUPS], first-order gains.
    alone: [S] cost by G and H. along: [windows, S], so that moves cost the square of their sum, summed, / 2."""

    name: str
    segments: Segments
    moves: Tensor
    slopes: Tensor
    alone: Tensor
    along: Tensor = field(default_factory=lambda: torch.empty(0))


class Trial:
    """A compressed model, its teacher, and passes over text."""

    def __init__(
        self, folder: Path, teacher: str, windows: Tensor, config: DistillConfig, dtype: str
    ) -> None:
        trainable._Linear = _TRAINED  # type: ignore[misc]
        FixedLinear.decoded.clear()
        base, self.dtype = open_base(folder, None), compute_dtype(dtype, CPU)
        dense = open_teacher(find_teacher(teacher or str(base.report["model"]), base), self.dtype, CPU)
        self.student = load_student(base, config, CPU)
        self.task = Distillation(self.student, LiveTeacher(dense), (windows, windows[:1]), config, self.dtype)
        self.matrices = {
            parameter_name(name): module
            for name, module in self.student.named_modules()
            if isinstance(module, trainable.TrainableMatrix)
        }
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        self.forms = {}
        for name, matrix in self.matrices.items():
            size, *_, window = stored["codebooks"][matrix.entry.codebook]
            self.forms[name] = form_for(size, *stored["matrices"][name][4:6], window)
        trainable._Linear = FixedLinear  # type: ignore[misc, assignment]
        for parameter in self.student.parameters():
            parameter.requires_grad_(False)
        # So that gradients reach every matrix although no parameter asks for any.
        self.student.get_input_embeddings().register_forward_hook(lambda *call: call[2].requires_grad_())
        self.decode(*self.matrices)

    @torch.no_grad()
    def decode(self, *names: str) -> None:
        """Decode matrices for the passes that follow."""
        getattr(self.student, STORE).refresh()
        for name in names:
            matrix = self.matrices[name]
            weight = matrix.matrix(matrix.gain, matrix.shared()).to(self.dtype)
            FixedLinear.decoded[id(matrix)] = name, weight

    def backward(self, ids: Tensor, watch: OnGradient, seed: int | None = None) -> None:
        """Gradients of the mean KL, or with a seed, of the summed loss of tokens that the teacher draws."""
        FixedLinear.watch = staticmethod(watch)
        target, scale = self.task.teacher.target(torch.arange(len(ids)), ids), 1 / ids.numel()
        if seed is not None:
            generator, scale = torch.Generator().manual_seed(seed), 1.0
            parts = [target(slice(at, at + 256)).float().softmax(dim=1) for at in range(0, ids.numel(), 256)]
            drawn = torch.cat([torch.multinomial(part, 1, generator=generator) for part in parts])
            target = lambda part: (drawn[part], torch.zeros(len(drawn[part]), 1))  # noqa: E731
        self.task.head.kl(ids, target, scale, self.dtype).backward()
        self.student.zero_grad(set_to_none=True)

    @torch.no_grad()
    def kl(self, windows: Tensor) -> Tensor:
        """[windows] mean KL per token."""
        targets = ((ids, self.task.teacher.target(torch.arange(1), ids)) for ids in windows.split(1))
        found = [self.task.head.kl(ids, target, 1 / ids.numel(), self.dtype) for ids, target in targets]
        return torch.stack(found)

    def gradients(self, windows: Tensor) -> dict[str, Tensor]:
        """[GROUPS, rows, columns] by matrix, rotated: of the mean KL, loud tokens cut."""
        found = {n: torch.zeros(GROUPS, m.entry.rows, m.entry.columns) for n, m in self.matrices.items()}
        batches = windows.split(MICRO_BATCH)

        def add(name: str, x: Tensor, grad: Tensor) -> None:
            size = grad.float().norm(dim=1) * x.float().norm(dim=1)
            factor = (LOUDEST_GRADIENT * size.median() / size.clamp(min=1e-30)).clamp(max=1)
            found[name][group] += ((grad * factor[:, None].to(grad.dtype)).T @ x).float()

        for number, ids in enumerate(batches):
            group = number % GROUPS
            self.backward(ids, add)
        scale = GROUPS / len(batches)
        rotations = {n: m.entry.rotation for n, m in self.matrices.items()}
        return {
            n: torch.stack([rotate_matrix(g, rotations[n]) for g in groups]) * scale
            for n, groups in found.items()
        }

    def curvature(self, windows: Tensor) -> dict[str, Tensor]:
        """[rows, columns] by matrix, rotated: diag(G) diag(H)^T with the trace of the Fisher information."""
        rows, columns, traces = dict[str, Any](), dict[str, Any](), dict[str, float]()

        def add(name: str, x: Tensor, grad: Tensor) -> None:
            (right, down), x, grad = self.matrices[name].entry.rotation, x.float(), grad.float()
            size = grad.norm(dim=1)
            middle = size.median().clamp(min=1e-30)
            traces[name] = traces.get(name, 0.0) + float((size * x.norm(dim=1)).square().sum())
            x = rotate_matrix(x * (size / middle).clamp(1e-3, 30)[:, None], (right, None))
            grad = grad * (LOUDEST_GRADIENT * middle / size.clamp(min=1e-30)).clamp(max=1)[:, None]
            grad = rotate_matrix(grad, (down, None))
            rows[name] = rows.get(name, 0) + grad.square().sum(dim=0)
            columns[name] = columns.get(name, 0) + x.square().sum(dim=0)

        for number, ids in enumerate(windows.split(MICRO_BATCH)):
            self.backward(ids, add, seed=number)
        found = {}
        for name, trace in traces.items():
            g, h = rows[name] / rows[name].mean(), columns[name] / columns[name].mean()
            mean = trace / windows.numel() / (len(g) * len(h))
            found[name] = mean * ((g + 0.3) / 1.3)[:, None] * ((h + 0.01) / 1.01)
        return found

    @torch.no_grad()
    def candidates(self, gradients: dict[str, Tensor], curvature: dict[str, Tensor]) -> list[Candidates]:
        """The best segments of every matrix, none of which shares a window with another."""
        found = []
        for name, matrix in self.matrices.items():
            form, table = self.forms[name], matrix.shared()[0].detach()
            scale, d = (matrix.scale * matrix.gain.exp()).detach()[:, None], table.shape[1]
            search = SegmentSearch(form, table, STEPS.get(form.stride, 1))
            groups, bend = gradients[name] * scale, curvature[name] * scale.square()
            places = search.places(*matrix.indices.shape)
            slope = groups.mean(dim=0)
            bound = cut(slope.square() / (2 * bend), d).reshape(-1, d).sum(dim=1)
            bounds = torch.cat([bound, torch.zeros(1)])[places].sum(dim=1)
            some = places[bounds.topk(min(SEARCHED, len(places))).indices.sort().values]
            best = search.best(matrix.indices, slope, bend, some).apart(KEPT)
            moves, at = best.moves(matrix.indices, table), best.places.clamp(min=0)
            slopes = [-(cut(g, d).reshape(-1, d)[at] * moves).sum(dim=(1, 2)) for g in groups]
            alone = (cut(bend, d).reshape(-1, d)[at] * moves.square()).sum(dim=(1, 2)) / 2
            moves = moves * scale[at // matrix.indices.shape[1]]
            found.append(Candidates(name, best, moves, torch.stack(slopes, dim=1), alone))
        return found

    def project(self, candidates: list[Candidates], windows: Tensor) -> None:
        """Set `along`: the moves along the gradients of drawn tokens of each window, scaled to cost nats per token."""
        by_name = {one.name: one for one in candidates}
        for one in candidates:
            one.along = torch.zeros(len(windows), len(one.alone))

        def add(name: str, x: Tensor, grad: Tensor) -> None:
            if name not in by_name:
                return
            one, rotation = by_name[name], self.matrices[name].entry.rotation
            gradient = rotate_matrix((grad.T @ x).float(), rotation)
            d = one.moves.shape[-1]
            moved = cut(gradient, d).reshape(-1, d)[one.segments.places.clamp(min=0)] * one.moves
            one.along[number] = moved.sum(dim=(1, 2)) / windows.numel() ** 0.5

        for number, ids in enumerate(windows.split(1)):
            self.backward(ids, add, seed=number)

    def replace(self, candidates: list[Candidates], chosen: list[Tensor]) -> dict[str, Tensor]:
        """Replace the chosen segments [n] of each of the candidates; returns the indices that were there."""
        before = {}
        for one, numbers in zip(candidates, chosen, strict=True):
            if len(numbers):
                matrix = self.matrices[one.name]
                before[one.name] = matrix.indices.clone()
                matrix.indices.copy_(one.segments.chosen(numbers).applied(matrix.indices))
        self.decode(*before)
        return before

    def put_back(self, before: dict[str, Tensor]) -> None:
        """Undo `replace`."""
        for name, indices in before.items():
            self.matrices[name].indices.copy_(indices)
        self.decode(*before)
