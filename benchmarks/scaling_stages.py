"""Stages of a compression, how their work is divided among ranks, and the shapes of models, for scaling.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pocketllm.ranks import Ranks

Share = Callable[[int], float]  # number of ranks -> the busiest one's share of the work of a single rank


def rounds(count: int) -> Share:
    """Windows or batches, of which every rank runs one in a round."""
    return lambda size: -(-count // size) / count


def units(*groups: Sequence[float]) -> Share:
    """Jobs by cost; groups come one after another."""

    def share(size: int) -> float:
        busiest = [max(_loads(costs, size)) for costs in groups]
        return sum(busiest) / sum(map(sum, groups))

    return share


def _loads(costs: Sequence[float], size: int) -> list[float]:
    loads = [0.0] * size
    for cost, owner in zip(costs, Ranks(0, size).split(costs), strict=True):
        loads[owner] += cost
    return loads


def undivided(size: int) -> float:
    """What every rank does, or one while the others wait."""
    return 1.0


@dataclass(frozen=True)
class Stage:
    """seconds: on a single rank."""

    name: str
    seconds: float
    share: Share

    def on(self, size: int) -> float:
        """Seconds on the busiest of some ranks."""
        return self.seconds * self.share(size)


@dataclass(frozen=True)
class Matrix:
    """rows, columns: of one matrix. inputs: number of the inputs that it shares with others. experts: stacked in it,
    of which a token visits `active`.
    """

    rows: int
    columns: int
    inputs: int
    experts: int = 1
    active: int = 1

    @property
    def weights(self) -> int:
        return self.rows * self.columns * self.experts

    @property
    def used(self) -> int:
        """Weights that a token is multiplied by."""
        return self.rows * self.columns * self.active


@dataclass(frozen=True)
class Model:
    """blocks: number of equal ones. block: matrices of one."""

    blocks: int
    hidden: int
    vocabulary: int
    block: tuple[Matrix, ...]

    @property
    def weights(self) -> int:
        """Those of the blocks, embedding and head."""
        return self.blocks * sum(m.weights for m in self.block) + 2 * self.hidden * self.vocabulary

    def inputs(self) -> list[Matrix]:
        """The first matrix of each group that shares inputs."""
        return list({m.inputs: m for m in reversed(self.block)}.values())


def factors(model: Model) -> Share:
    """Every rank factorizes the Hessians that its matrices of a block need."""

    def share(size: int) -> float:
        needed: list[set[int]] = [set() for _ in range(size)]
        for matrix, owner in zip(
            model.block, Ranks(0, size).split([m.weights for m in model.block]), strict=True
        ):
            needed[owner].add(matrix.inputs)
        costs = {m.inputs: float(m.columns) ** 3 for m in model.block}
        return max(sum(costs[n] for n in some) for some in needed) / sum(costs.values())

    return share


def llama(blocks: int, hidden: int, inner: int, key_value: int, vocabulary: int = 128256) -> Model:
    """A model of Llama's form. key_value: rows of the key projection."""
    attention = [Matrix(rows, hidden, 0) for rows in (hidden, key_value, key_value)]
    mlp = [Matrix(inner, hidden, 2), Matrix(inner, hidden, 2), Matrix(hidden, inner, 3)]
    return Model(blocks, hidden, vocabulary, (*attention, Matrix(hidden, hidden, 1), *mlp))


MODELS = {
    "8B": llama(32, 4096, 14336, 1024),
    "70B": llama(80, 8192, 28672, 1024),
    "405B": llama(126, 16384, 53248, 1024),
    "1T MoE": Model(  # the dimensions of Kimi K2, every block a mixture; experts are stored fused
        *(60, 7168, 163840),
        (
            *(Matrix(1536, 7168, 0), Matrix(576, 7168, 0), Matrix(12288, 1536, 1), Matrix(16384, 512, 2)),
            *(Matrix(7168, 8192, 3), Matrix(2048, 7168, 4), Matrix(2048, 7168, 4), Matrix(7168, 2048, 5)),
            *(Matrix(4096, 7168, 6, 384, 8), Matrix(7168, 2048, 7, 384, 8)),
        ),
    ),
}
