"""What errors in the rows of the embedding and of the head cost: the two ends of a model; see sensitivity.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pocketllm.calibrate.blocks import BlockStream
from pocketllm.codec.subvectors import fold
from pocketllm.config.constants import OCCURRENCE_PRIOR, UNSEEN_ROW_SHARE
from pocketllm.plan.matrices import Matrix
from pocketllm.source.dense_checkpoint import DenseCheckpoint

_ROWS_AT_ONCE = 1 << 14


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
    return torch.cat([part.float().square().mean(dim=1) for part in parts])


class EndCost(NamedTuple):
    """costs: [rows], Fisher trace with feedback. rows: [rows], importance, mean 1. share: of the loss as the head."""

    costs: Tensor
    rows: Tensor
    share: float


@dataclass(frozen=True)
class EndCosts:
    """head: [rows] squared gradients of the head's rows; embedded: of the embedding's; gain: of the head."""

    head: Tensor
    embedded: Tensor
    gain: float

    def of(self, stream: BlockStream, matrix: Matrix) -> EndCost:
        """The measurement of embedding or head."""
        module = stream.model.get_submodule(matrix.name.rpartition(".")[0])
        is_input = module is stream.model.get_input_embeddings()
        is_head = not is_input or stream.is_tied
        none = torch.zeros(matrix.rows)  # embedding and head may differ in size
        head, embedded = self.head if is_head else none, self.embedded if is_input else none
        rows = head + embedded
        share = float(head.sum() / rows.sum().clamp(min=1e-30))
        costs = head * self.gain + embedded
        # Tokens that do not occur in the text still matter.
        rows = rows + UNSEEN_ROW_SHARE * rows.mean() + 1e-30
        return EndCost(costs, rows / rows.mean(), share)
