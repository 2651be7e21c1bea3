"""What errors in the rows of the embedding and of the head cost: the two ends of a model; see sensitivity.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pocketllm.calibrate.activations import Activations
from pocketllm.calibrate.blocks import BlockStream
from pocketllm.calibrate.window_sums import WindowSums
from pocketllm.codec.subvectors import fold
from pocketllm.config.constants import LOUDEST_POSITION, OCCURRENCE_PRIOR, UNSEEN_ROW_SHARE
from pocketllm.format.mapped_pages import drop_files
from pocketllm.plan.matrices import Matrix
from pocketllm.source.dense_checkpoint import DenseCheckpoint

_ROWS_AT_ONCE = 1 << 14


def embedding_costs(
    stream: BlockStream, windows: Tensor, gradients: Activations, counts: Tensor | None = None
) -> Tensor:
    """[vocabulary] what an error in each row of the embedding costs; see `expected_costs`.

    Args:
        windows: [N, context] token ids.
        gradients: of each window of this rank, [1, context, C] at the input of the first block.
        counts: [vocabulary] how often each token occurs in all of the text; None counts those in the windows.
    """
    costs = torch.zeros(len(stream.source.model.get_input_embeddings().weight))
    sums = WindowSums(ranks=stream.ranks)
    for turn in range(stream.rounds):
        for number in stream.numbers[turn : turn + 1]:
            size = stream.embedding_gradient(windows[number][None], gradients[turn]).norm(dim=1)
            sums.add_item("sizes", size.clamp(max=LOUDEST_POSITION * size.median()).square().cpu())
        sums.end_round()
    for ids, size in zip(windows, sums.items["sizes"], strict=True):
        costs.index_add_(0, ids, size)
    seen = torch.bincount(windows.flatten(), minlength=len(costs))
    return expected_costs(costs, seen, seen if counts is None else counts)


def expected_costs(costs: Tensor, seen: Tensor, counts: Tensor) -> Tensor:
    """[vocabulary] what an error in each row of the embedding costs, for a text with the frequencies of `counts`.

    The frequency of a token is estimated with absolute discounting: every count is lowered by
    D = n1 / (n1 + 2 n2), n1 and n2 the numbers of tokens that occur once and twice, and what that frees is shared
    equally by the vocabulary (Ney, Essen and Kneser 1994). The cost of one occurrence is the mean of the token's own,
    shrunk towards the mean of all.

    Args:
        costs: [vocabulary] measured, summed over occurrences. seen: [vocabulary] number of those occurrences.
        counts: [vocabulary] occurrences in a larger text.
    """
    total, mean = counts.sum().clamp(min=1), costs.sum() / seen.sum().clamp(min=1)
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = once / (once + 2 * twice).clamp(min=1)
    freed = discount * (counts > 0).sum()
    frequency = ((counts - discount).clamp(min=0) + freed / len(counts)) / total
    one = (costs + OCCURRENCE_PRIOR * mean) / (seen + OCCURRENCE_PRIOR)
    expected = frequency * one
    return expected * (costs.sum() / expected.sum().clamp(min=1e-30))


def row_squares(source: DenseCheckpoint, matrix: Matrix) -> Tensor:
    """[rows] mean square of the weights of each row; some rows at a time, since vocabularies are large."""
    parts = fold(source.read(matrix.name), matrix.transposed).split(_ROWS_AT_ONCE)
    found = torch.cat([part.float().square().mean(dim=1) for part in parts])
    drop_files(source.files)
    return found


def mean_square(source: DenseCheckpoint, matrix: Matrix) -> float:
    """Mean square of the weights of a matrix."""
    found = float(fold(source.read(matrix.name), matrix.transposed).float().square().mean())
    drop_files(source.files)
    return found


class EndCost(NamedTuple):
    """costs: [rows], Fisher trace. rows: [rows], importance, mean 1. share: of the loss as the head."""

    costs: Tensor
    rows: Tensor
    share: float


@dataclass(frozen=True)
class EndCosts:
    """head: [rows] squared gradients of the head's rows; embedded: of the embedding's."""

    head: Tensor
    embedded: Tensor

    def of(self, stream: BlockStream, matrix: Matrix) -> EndCost:
        """The measurement of embedding or head."""
        module = stream.model.get_submodule(matrix.name.rpartition(".")[0])
        is_input = module is stream.model.get_input_embeddings()
        is_head = not is_input or stream.is_tied
        none = torch.zeros(matrix.rows)  # embedding and head may differ in size
        head, embedded = self.head if is_head else none, self.embedded if is_input else none
        costs = head + embedded
        share = float(head.sum() / costs.sum().clamp(min=1e-30))
        # Tokens that do not occur in the text still matter.
        rows = costs + UNSEEN_ROW_SHARE * costs.mean() + 1e-30
        return EndCost(costs, rows / rows.mean(), share)


def end_hessian(head: Tensor, share: float) -> Tensor:
    """[C, C] what errors in a row of embedding or head cost: as the head by the Hessian of its inputs, else uniformly.

    Args:
        head: [C, C] Hessian of the inputs of the head. share: of the loss that errors cause as the head.
    """
    hessian = share * head / head.diagonal().mean()
    hessian.diagonal().add_(1 - share)
    return hessian
