"""How a calibrated compression keeps below a limit of memory, and the peak of each of its stages.

Two things can be had for less memory without changing a stored bit: activations can lie on disk, and fewer matrices
of a block can be encoded at once. What is computed together, such as the tokens of a batch or the logits of a part of
a window, stays as it is, since sums would be rounded differently.

The peaks are upper bounds, from the sizes of the tensors that a stage holds at the same time (float32, unless noted).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pocketllm.calibrate.block_list import block_list
from pocketllm.calibrate.blocks import BATCH_TOKENS
from pocketllm.calibrate.gradients import LOGIT_NUMBERS, LOGITS_AT_ONCE, STRIP_WEIGHTS
from pocketllm.compression.compensate import COMPENSATE_TOKENS
from pocketllm.compression.matrix_encoder import row_groups
from pocketllm.compression.matrix_jobs import MOST_PARALLEL, WEIGHT_BYTES
from pocketllm.config import CompressConfig
from pocketllm.config.constants import FEEDBACK_GROUP, SHORTEST_STRIPS, STRIP_LAG
from pocketllm.errors import ConfigError
from pocketllm.plan.matrices import Matrix, Plan
from pocketllm.source.dense_checkpoint import DenseCheckpoint

_TUNED_BYTES = 24  # for each weight that compensation tunes
_END_BYTES = 42  # for each weight of a group of rows of embedding or head
_FACTOR_BYTES = 40  # for each number of a Hessian while it is factorized in float64,
_ROOT_BYTES = 28  # or only its triangular root is computed
_ANY = 96 << 20  # what does not depend on sizes: tables, samples, the interpreter's and the allocator's own
_MARGIN = 3 * 10**7  # what the process holds differs from run to run
_STEP = 10**7  # of which limits in messages are multiples


@dataclass(frozen=True)
class MemoryPlan:
    """on_disk: activations are kept on disk. at_once: matrices of a block that are encoded at once, 0 for as many as
    there are threads.

    stages: peak bytes of the process by stage, with what it held before.
    """

    on_disk: bool = False
    at_once: int = 0
    stages: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Peak bytes of the process."""
        return max(self.stages.values())


def can_plan(config: CompressConfig, device: str, ranks: int, held: int | None) -> bool:
    """Whether the memory of a run can be planned.

    Args:
        ranks: number of processes. held: bytes that the process holds; None if the system does not say.

    Raises:
        ConfigError: it cannot, although a limit is set.
    """
    settings = config.calibration
    obstacles = {
        "no calibration": settings is None,
        "calibration.refine_epochs": settings is not None and settings.refine_epochs > 0,
        f"device {device}": device != "cpu",
        f"{ranks} processes": ranks > 1,
        "a system without /proc/self/statm": held is None,
    }
    found = [name for name, is_there in obstacles.items() if is_there]
    if found and config.max_memory_gb is not None:
        raise ConfigError(
            f"max_memory_gb: got {found[0]}, wanted a calibrated compression by one process on the CPU, without "
            "refinement, on Linux; leave the limit out"
        )
    return not found


def plan_memory(source: DenseCheckpoint, plan: Plan, windows: Tensor, held: int) -> MemoryPlan:
    """The fastest way that keeps below `max_memory_gb` of the plan's settings.

    Args:
        windows: [N, context] token ids of the calibration text. held: bytes that the process holds already.

    Raises:
        ConfigError: there is none; names the smallest limit that can be kept.
    """
    sizes = _Sizes(source, plan, windows, held)
    most = min(MOST_PARALLEL, torch.get_num_threads())
    ways = [(on_disk, at_once) for on_disk in (False, True) for at_once in (0, *range(most, 0, -1))]
    plans = [MemoryPlan(*way, sizes.stages(*way)) for way in ways]
    limit = plan.config.max_memory_gb
    for found in plans:
        if limit is None or found.peak <= limit * 1e9:
            return found
    least = min(plans, key=lambda found: found.peak)
    stage = max(least.stages, key=lambda name: least.stages[name])
    wanted = -(-(least.peak + _MARGIN) // _STEP) * _STEP
    raise ConfigError(
        f"max_memory_gb: got {limit:g}, wanted at least {wanted / 1e9:.2f} for this model and text (the process holds "
        f"{held / 1e9:.2f} already; most is needed for: {stage}); raise the limit, or give fewer calibration tokens"
    )


@dataclass(frozen=True)
class _Block:
    """matrices: those to encode. loaded: bytes of all parameters as they are read, and in float32."""

    matrices: list[Matrix]
    loaded: int


def _number(name: str, path: str) -> int:
    """The block that a parameter belongs to, among those at a path."""
    return int(name.removeprefix(f"{path}.").partition(".")[0])


@dataclass(frozen=True)
class _Sizes:
    """source, plan, windows, held: as for `plan_memory`."""

    source: DenseCheckpoint
    plan: Plan
    windows: Tensor
    held: int

    def stages(self, on_disk: bool, at_once: int) -> dict[str, int]:
        """Peak bytes by stage."""
        settings = self.plan.config.calibration
        assert settings is not None
        measured = min(self.windows.numel(), settings.sensitivity_tokens)
        context, batch = self.windows.shape[1], max(BATCH_TOKENS, self.windows.shape[1])
        blocks, looked_up = self._blocks, self._looked_up
        in_measuring = looked_up + self._activations(measured, context, 3, on_disk)
        in_encoding = looked_up + self._activations(self.windows.numel(), batch, 2, on_disk)
        found = {
            "check": max(self._reads.values()),
            "measure: head": in_measuring + self._head(),
            "measure: blocks": in_measuring
            + max(self._measured(block, measured, context) for block in blocks),
            "encode: embedding and head": max(map(self._end, self._ends), default=0),
            "encode: inputs of blocks": in_encoding + max(self._inputs(block, batch) for block in blocks),
            "encode: blocks": in_encoding + max(self._encoded(block, measured, at_once) for block in blocks),
            "write": max(self._written()),
        }
        if settings.compensate:
            step = max(COMPENSATE_TOKENS, context)
            found["encode: compensation"] = in_encoding + max(self._tuned(block, step) for block in blocks)
        return {name: self.held + _ANY + int(value) for name, value in found.items()}

    @property
    def _width(self) -> int:
        return int(self.source.model.get_input_embeddings().weight.shape[1])

    @property
    def _ends(self) -> list[Matrix]:
        return [m for m in self.plan.matrices if not m.in_blocks or m.in_tower]

    @cached_property
    def _looked_up(self) -> int:
        """Bytes of the rows of the embedding that the text uses."""
        return 4 * len(self.windows.unique()) * self._width

    @cached_property
    def _blocks(self) -> list[_Block]:
        path, blocks = block_list(self.source.model)
        matrices, loaded = [list[Matrix]() for _ in blocks], [0] * len(blocks)
        for matrix in self.plan.matrices:
            if matrix.name.startswith(f"{path}."):
                matrices[_number(matrix.name, path)].append(matrix)
        for name, size in self._reads.items():
            if name.startswith(f"{path}."):
                loaded[_number(name, path)] += size + 4 * math.prod(self.source.shape(name))
        return [_Block(*each) for each in zip(matrices, loaded, strict=True)]

    @cached_property
    def _reads(self) -> dict[str, int]:
        """Bytes of each parameter in the file, which is mapped, and of what is converted from it."""
        source = self.source
        own = {n: math.prod(source.shape(n)) * source.dtype(n).itemsize for n in source.names()}
        return {name: 3 * size if source.assembly.is_converted(name) else size for name, size in own.items()}

    def _written(self) -> Iterator[int]:
        """Bytes of each tensor as it is read and as it is stored: dense, or the indices of a matrix."""
        yield from (self._reads[d.name] + 4 * math.prod(d.shape) for d in self.plan.dense)
        yield from (2 * m.weights for m in self.plan.matrices)

    def _activations(self, tokens: int, at_once: int, lists: int, on_disk: bool) -> int:
        """Lists of the activations of all tokens, or of those of one batch."""
        return 4 * self._width * lists * (at_once if on_disk else tokens)

    def _head(self) -> int:
        """Logits of a part of a window in four forms, the head as it is read, a strip of it in float32, sums of its
        rows.
        """
        model, weight = self.source.model, self.source.model.get_output_embeddings().weight
        vocabulary = weight.shape[0]
        stored = [
            self._reads[name] for name in self.source.names() if model.get_parameter_or_buffer(name) is weight
        ]
        positions = max(1, min(LOGITS_AT_ONCE, LOGIT_NUMBERS // vocabulary))
        weights = vocabulary * self._width
        logits, strips = 4 * 4 * positions * vocabulary, 4 * min(weights, STRIP_WEIGHTS)
        mapped = max(stored, default=4 * weights)
        return logits + strips + mapped + 8 * self._width**2 + 16 * vocabulary

    def _measured(self, block: _Block, tokens: int, context: int) -> int:
        """The most of what is held with the Hessians of inputs: the largest of them factorized; the gradients of
        weights, a window's graph and sums of g g^T; these sums, what is kept of them, the largest factorized.
        """
        weights, squares = block.loaded, [m.rows**2 for m in block.matrices if self._is_two_sided(m)]
        codes = 2 * tokens * sum(m.rows for m in block.matrices if m.rows > tokens // 2)
        graph = self._graph(block, context)
        inputs = weights + _ROOT_BYTES * max((m.columns**2 for m in block.matrices), default=0)
        backward = weights + 4 * sum(m.weights for m in block.matrices) + graph + 4 * sum(squares) + codes
        outputs = 6 * sum(squares) + codes + (4 + _ROOT_BYTES) * max(squares, default=0)
        return 4 * sum(m.columns**2 for m in block.matrices) + max(inputs, backward, outputs)

    def _attention(self, tokens: int) -> int:
        """Masks of two kinds for some windows, and unless the kernel needs none, scores of all heads in three forms."""
        config = self.source.model.config
        heads = getattr(config.get_text_config(), "num_attention_heads", 1)
        scores = 0 if getattr(config, "_attn_implementation", None) == "sdpa" else 3 * heads
        return 4 * (scores + 2) * tokens * self.windows.shape[1]

    def _inputs(self, block: _Block, batch: int) -> int:
        """Weights, a batch's activations in the block, sums of x x^T and the Hessians made of them."""
        inside = 4 * batch * sum(m.rows + m.columns for m in block.matrices) + self._attention(batch)
        return block.loaded + inside + 8 * sum(m.columns**2 for m in block.matrices)

    def _encoded(self, block: _Block, tokens: int, at_once: int) -> int:
        """Weights, all Hessians of inputs, and of the matrices in flight what encoding needs."""
        parallel = at_once or min(MOST_PARALLEL, torch.get_num_threads())
        jobs = sorted((self._job(m) for m in block.matrices), reverse=True)
        factors = sorted((8 * m.columns**2 + self._output(m, tokens) for m in block.matrices), reverse=True)
        largest = max((m.columns for m in block.matrices), default=0)
        kept = block.loaded + 4 * sum(m.columns**2 for m in block.matrices)
        kept += self._targets(block)
        in_flight = sum(factors[: at_once or len(factors)])
        return kept + in_flight + max(sum(jobs[:parallel]), _FACTOR_BYTES * largest**2)

    def _tuned(self, block: _Block, tokens: int) -> int:
        """Weights; of those to encode values, gradients, two moments and copies in 16 bits; the graph of a step."""
        return (
            block.loaded + _TUNED_BYTES * sum(m.weights for m in block.matrices) + self._graph(block, tokens)
        )

    def _targets(self, block: _Block) -> int:
        """Tuned weights as they are read."""
        settings = self.plan.config.calibration
        is_tuned = settings is not None and settings.compensate > 0
        return 4 * sum(m.weights for m in block.matrices) if is_tuned else 0

    def _graph(self, block: _Block, tokens: int) -> int:
        """What the backward pass through a block needs."""
        return 3 * 4 * tokens * sum(m.rows + m.columns for m in block.matrices) + self._attention(tokens)

    def _output(self, matrix: Matrix, tokens: int) -> int:
        """The Hessian of a matrix's outputs, and what it is read from."""
        if not self._is_two_sided(matrix):
            return 0
        return 4 * matrix.rows**2 + min(2 * matrix.rows**2, tokens * matrix.rows)

    def _is_two_sided(self, matrix: Matrix) -> bool:
        settings = self.plan.config.calibration
        return settings is not None and settings.two_sided and not matrix.experts

    def _job(self, matrix: Matrix) -> int:
        """Copies of W; with G either its factors in float64, or in float32 with the feedback's part of U for every
        strip, shifted by its lag, and U padded by all lags.
        """
        rows, columns = matrix.rows, matrix.columns
        if not self._is_two_sided(matrix):
            return WEIGHT_BYTES * matrix.weights
        strips = -(-rows // SHORTEST_STRIPS[0])
        d = 2 if self.plan.config.codec.hashed else 4
        edge = STRIP_LAG * d * (strips - 1)
        shifted = 4 * (strips * FEEDBACK_GROUP * (columns + edge) + (columns + 2 * edge) ** 2)
        feedback = 16 * rows**2 + 8 * rows * edge + shifted
        return WEIGHT_BYTES * matrix.weights + max(_FACTOR_BYTES * rows**2, feedback)

    def _end(self, matrix: Matrix) -> int:
        """The parameter as it is read, a group of its rows, and the Hessian of the head's inputs with its factors."""
        form = matrix.form(self.plan.specs[matrix.name])
        groups = row_groups(matrix, form, is_whole=self.plan.rotation(matrix)[0] is not None)
        rows = max(group.stop - group.start for group in groups)
        hessian = (_FACTOR_BYTES + 16) * matrix.columns**2
        return _END_BYTES * rows * matrix.columns + self._reads[matrix.name] + hessian
