"""What an error in each matrix costs the model: measured on the dense model before anything is encoded.

If every weight of a matrix W is off by independent noise of variance v, the KL divergence between the outputs
of the dense and the noisy model grows by v / 2 * F, with F the trace of the Fisher information of W: the mean
over tokens of |d log p(token) / dW|^2, the tokens drawn from the model's own distribution. Error feedback
shapes the noise of an encoded matrix by the Hessian H of its inputs and lowers that by the factor

    feedback gain = mean of 1 / U_jj^2, over mean of H_jj        (H^-1 = U^T U; see codec/feedback.py)

so a matrix encoded with a given nmse costs  nmse * |W|^2 / (rows * columns) * F / 2 * gain.

Where a few tokens have gradients far above those of the others, the cost of errors is determined by these tokens:
in key and value projections, the first tokens of a text, to which all others attend. The inputs of such a matrix
are weighted by the norm of the gradient at its output (`gradients.py`).

The same gradients give the Hessian of each layer's outputs, G = E[g g^T], with g the gradient at an output of
the loss of tokens drawn from the model's own distribution. Feedback between strips of rows lowers the cost by
another such factor; shorter strips gain more from it, but paths on a trellis lose more (the first rows of a
strip have few codewords to choose from). The length with the smallest product is used.

The measurement takes one forward and one backward pass, with one block of the model in memory at a time; the
inputs of each block stay on disk for the backward pass.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from pocketllm.calibrate.activations import Activations, SpooledActivations, spooled
from pocketllm.calibrate.blocks import BlockStream
from pocketllm.calibrate.embedding_cost import (
    EndCost,
    EndCosts,
    embedding_costs,
    end_hessian,
    mean_square,
    row_squares,
)
from pocketllm.calibrate.gradients import Head, block_backward
from pocketllm.calibrate.output_hessians import as_kept, least_rows_in_8_bits, scaled_hessian
from pocketllm.calibrate.row_gain import row_gain
from pocketllm.calibrate.window_sums import WindowSums
from pocketllm.codec.hessian import conditional_diagonal, triangular_root
from pocketllm.codec.rotation import rotate_hessian
from pocketllm.config.constants import OUTPUT_DAMPING, SHORTEST_STRIPS, STRIP_START_LOSS
from pocketllm.format.kept import read_kept
from pocketllm.format.workspace import keep_tensors
from pocketllm.plan.matrices import Matrix
from pocketllm.ranks import SOLO, Ranks
from pocketllm.source.dense_checkpoint import DenseCheckpoint


@dataclass(frozen=True)
class Sensitivity:
    """Results of the measurement.

    importance: loss (nats per token) per unit of nmse, by matrix. head_hessian: [C, C] of the inputs of the
    output head. head_share: share of the loss that errors in embedding or head cause as the head, by matrix.
    row_importance: [rows] for embedding and head, by matrix: what an error in a row costs, mean 1.
    strip_rows: rows per strip for matrices whose rows compensate for each other, by matrix.
    token_weights: [N, context] float16 of matrices whose inputs are weighted.
    """

    importance: dict[str, float]
    head_hessian: Tensor
    head_share: dict[str, float]
    row_importance: dict[str, Tensor]
    strip_rows: dict[str, int]
    token_weights: dict[str, Tensor]

    @property
    def for_plan(self) -> dict[str, dict[str, Any]]:
        """The arguments of `make_plan` that it gives."""
        return {"importance": self.importance, "strip_rows": self.strip_rows}

    def save(self, path: Path) -> None:
        """Write to a temporary name, then rename.

        Raises:
            OutputError: it cannot be written.
        """
        rows = {f"rows|{name}": value for name, value in self.row_importance.items()}
        tokens = {f"tokens|{name}": value for name, value in self.token_weights.items()}
        tensors = {"head_hessian": self.head_hessian.contiguous(), **rows, **tokens}
        kept = ("importance", "head_share", "strip_rows")
        keep_tensors(path, tensors, {name: getattr(self, name) for name in kept})

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """Inverse of `save`.

        Raises:
            ValueError: damaged. OSError: it cannot be read.
        """
        tensors, facts = read_kept(path)

        def named(what: str) -> dict[str, Tensor]:
            return {k.removeprefix(what): value for k, value in tensors.items() if k.startswith(what)}

        return cls(
            importance=facts["importance"],
            head_hessian=tensors["head_hessian"],
            head_share=facts["head_share"],
            row_importance=named("rows|"),
            strip_rows=facts["strip_rows"],
            token_weights=named("tokens|"),
        )


def measure(
    source: DenseCheckpoint,
    windows: Tensor,
    matrices: list[Matrix],
    damping: float,
    seed: int,
    device: str = "cpu",
    progress: Callable[[float], None] = lambda share: None,
    *,
    two_sided: bool = False,
    weigh_tokens: bool = True,
    on_paths: bool = False,
    outputs: Path | None = None,
    counts: Tensor | None = None,
    ranks: Ranks = SOLO,
    on_disk: bool = False,
) -> Sensitivity:
    """Measure a dense model.

    Args:
        windows: [N, context] token ids. matrices: those to encode. damping: of the Hessians of inputs.
        seed: of the tokens drawn from the model. progress: called with the finished share.
        two_sided: whether rows will compensate for each other. weigh_tokens: whether inputs will be weighted.
        on_paths: whether indices lie on paths down the rows; see `row_gain`.
        outputs: folder for the Hessians of outputs, one file per block; see `output_hessians`. The inputs of
            blocks are kept there as well, or if it is None in the system's temporary folder.
        counts: [vocabulary] how often each token occurs in all of the text; None counts those in the windows.
        ranks: among which the windows are divided; the first writes the Hessians of outputs.
        on_disk: whether all activations are kept there, not only the inputs of blocks.

    Raises:
        OutputError: they cannot be written.
    """
    if outputs is not None:
        outputs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="inputs-", dir=outputs) as scratch:
        folder, tokens = Path(scratch), windows.numel()
        stream = BlockStream(source, windows, device, 1, ranks=ranks, folder=folder if on_disk else None)
        blocks = _Blocks(stream, matrices, len(windows), tokens, damping, two_sided, weigh_tokens, outputs)
        inputs, count = list[SpooledActivations](), len(stream.blocks)
        for number, (_, block) in enumerate(stream):
            inputs.append(spooled(stream.hidden, folder, device))
            stream.hidden = stream.run(block, stream.hidden)
            progress(0.3 * (number + 1) / count)
        head = Head(stream, seed)
        gradients, hessian, rows = head.all_backward(), head.hessian / tokens, head.rows.cpu()
        stream.drop_head()
        for number in reversed(range(count)):
            gradients = blocks.backward(number, inputs.pop(), gradients)
            progress(0.4 + 0.6 * (count - number) / count)
        ends = EndCosts(rows, embedding_costs(stream, windows, gradients, counts))
        stream.hidden = gradients = []
    at_ends = {m.name: ends.of(stream, m) for m in matrices if not m.in_blocks}
    return Sensitivity(
        importance=_importance(source, blocks, at_ends, hessian, on_paths),
        head_hessian=hessian.cpu(),
        head_share={name: end.share for name, end in at_ends.items()},
        row_importance={name: end.rows for name, end in at_ends.items()},
        strip_rows=blocks.strip_rows,
        token_weights=blocks.token_weights,
    )


@dataclass
class _Blocks:
    """The backward pass through the blocks, last one first, and what it measures, by matrix.

    windows, tokens: numbers of them. damping, two_sided, weigh_tokens, outputs: as in `measure`.
    energy: squared gradients of the weights, summed.
    gains: of feedback along inputs and, with `two_sided`, outputs.
    """

    stream: BlockStream
    matrices: list[Matrix]
    windows: int
    tokens: int
    damping: float
    two_sided: bool
    weigh_tokens: bool
    outputs: Path | None
    energy: dict[str, float] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)
    strip_rows: dict[str, int] = field(default_factory=dict)
    token_weights: dict[str, Tensor] = field(default_factory=dict)

    def backward(self, number: int, hidden: Activations, gradients: Activations) -> Activations:
        """Measure a block; hidden: its inputs. gradients at its outputs -> gradients at its inputs."""
        ranks = self.stream.ranks
        with self.stream.loaded(number, number - 1) as (path, block):
            inside = [m for m in self.matrices if m.name.startswith(f"{path}.")]
            self.stream.hidden = hidden
            hessians = self.stream.inputs(block, inside).hessians
            self.gains |= _input_gains(inside, hessians, self.damping, ranks)
            wide = None if self.outputs is None else least_rows_in_8_bits(self.tokens)
            gradients, after = block_backward(self.stream, block, inside, gradients, wide)
        self.energy |= after.energy
        self.token_weights |= after.token_weights(self.windows) if self.weigh_tokens else {}
        measured = self._measure_outputs(after.sums) if self.two_sided else {}
        if self.outputs is not None and ranks.is_first:
            keep_tensors(self.outputs / f"{path}.safetensors", measured, {"tokens": self.tokens})
        return gradients

    def _measure_outputs(self, sums: WindowSums) -> dict[str, Tensor]:
        """Choose the strips of matrices from the sums of g g^T; returns their Hessians as stored, on the first rank."""
        ranks, own, chosen = self.stream.ranks, list[tuple[str, Tensor]](), dict[str, tuple[int, float]]()
        for name in list(sums.squares):
            scaled = scaled_hessian(sums.squares.pop(name), self.tokens)
            chosen[name] = strips_for(triangular_root(rotate_hessian(scaled, 1), OUTPUT_DAMPING))
            own += as_kept(name, scaled, sums.in_8_bits.pop(name, [])).items()
        everywhere = {name: found for part in ranks.gather(chosen) for name, found in part.items()}
        for name in sums.rows:
            self.strip_rows[name], gain = everywhere[name]
            self.gains[name] *= gain
        stored = ranks.in_order(own, lambda name, shape: 0)
        return {name: value for name, value in stored if value is not None}

    def loss(self, matrix: Matrix, scale: float) -> float:
        """`scale` times the Fisher trace of a matrix, summed over tokens, with feedback."""
        return scale * self.energy.get(matrix.name, 0.0) * self.gains[matrix.name]


def _importance(
    source: DenseCheckpoint, blocks: _Blocks, ends: dict[str, EndCost], head: Tensor, on_paths: bool
) -> dict[str, float]:
    """Loss per unit of nmse, by matrix; at least a tiny share of the largest."""
    found: dict[str, float] = {}
    inside = [m for m in blocks.matrices if not m.in_tower and m.name not in ends]
    jobs, costs = [partial(mean_square, source, m) for m in inside], [m.weights for m in inside]
    means = iter(blocks.stream.ranks.map(jobs, costs))
    for matrix in blocks.matrices:
        if matrix.in_tower:
            continue
        end, scale = ends.get(matrix.name), 1 / 2 / blocks.tokens
        if end is None:
            found[matrix.name] = blocks.loss(matrix, next(means) * scale)
        else:
            by_row = row_squares(source, matrix)
            gain = _gain(end_hessian(head, end.share), blocks.damping)
            gain *= row_gain(end.rows * by_row) if on_paths else 1.0
            found[matrix.name] = float(end.costs @ by_row) * scale * gain
    found |= _of_towers(blocks.matrices, found)
    floor = 1e-9 * max(found.values(), default=1.0)
    return {name: max(value, floor) for name, value in found.items()}


def _of_towers(matrices: list[Matrix], importance: Mapping[str, float]) -> dict[str, float]:
    """The importance of what text does not run through: per weight, that of the blocks on average."""
    measured = [m for m in matrices if m.in_blocks and not m.in_tower]
    per_weight = sum(importance[m.name] for m in measured) / max(1, sum(m.weights for m in measured))
    return {m.name: per_weight * m.weights for m in matrices if m.in_tower}


def _input_gains(
    matrices: list[Matrix], hessians: dict[str, Tensor], damping: float, ranks: Ranks
) -> dict[str, float]:
    """Gain of feedback along the inputs, by matrix; 1 where no inputs were seen."""
    unique = {id(hessian): hessian for hessian in hessians.values()}
    jobs = [partial(_gain, hessian, damping) for hessian in unique.values()]
    found = dict(zip(unique, ranks.map(jobs, [len(h) ** 3 for h in unique.values()]), strict=True))
    return {m.name: found[id(hessians[m.name])] if m.name in hessians else 1.0 for m in matrices}


def _gain(hessian: Tensor, damping: float) -> float:
    """See the module's docstring; of the rotated Hessian."""
    root = triangular_root(rotate_hessian(hessian, 1), damping)
    return float(conditional_diagonal(root, 1).mean() / conditional_diagonal(root, len(root)).mean())


def strips_for(root: Tensor) -> tuple[int, float]:
    """Rows of a strip, and the factor by which feedback between such strips lowers the loss.

    Args:
        root: `triangular_root` of a Hessian of outputs, rotated.
    """
    mean = conditional_diagonal(root, len(root)).mean()  # nothing is compensated
    gains = {rows: float(conditional_diagonal(root, rows).mean() / mean) for rows in SHORTEST_STRIPS}
    best = min(gains, key=lambda rows: gains[rows] * (1 + STRIP_START_LOSS / rows))
    return best, gains[best]
