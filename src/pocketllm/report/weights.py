"""How the weights are distributed, before and after compression."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pocketllm.errors import SourceError
from pocketllm.report.collect import MatrixFacts, ModelFacts, spread
from pocketllm.runtime import Matrices
from pocketllm.source import DenseCheckpoint, open_dense, resolve, resolve_local

BINS = 41
WIDTH = 4.0  # histograms end at this many times the rms of the original weights
_AT_ONCE = 1 << 24  # weights that are turned into float64 at the same time

Progress = Callable[[float, str], None]


@dataclass
class Moments:
    """Sums over weights, in float64, from which the figures of a distribution follow."""

    count: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)
    largest: float = 0.0

    def add(self, values: Tensor) -> None:
        """values: float32 [n]."""
        self.count += values.numel()
        for part in values.split(_AT_ONCE):
            power = part.double()
            for n in range(4):
                self.sums[n] += float((power if n == 0 else power ** (n + 1)).sum())
        self.largest = max(self.largest, float(values.abs().max()))

    @property
    def mean(self) -> float:
        return self.sums[0] / self.count

    @property
    def rms(self) -> float:
        return math.sqrt(self.sums[1] / self.count)

    @property
    def kurtosis(self) -> float:
        """Fourth moment over the square of the second; 3 for a Gaussian, 0 where all weights are 0."""
        second = self.sums[1] / self.count
        return self.sums[3] / self.count / second**2 if second else 0.0


@dataclass
class Distribution:
    """Weights of one kind of matrix.

    edges: of the bins. original, decoded: shares of the weights per bin, those beyond the ends in the
    outermost bins. nmse: found here, by matrix. of: how many matrices of this kind the model has.
    """

    kind: str
    edges: list[float]
    original: list[float]
    decoded: list[float]
    moments: tuple[Moments, Moments]
    nmse: dict[str, float]
    of: int


@dataclass(frozen=True)
class Weights:
    """Distributions of every kind; empty, with the reason, where there is nothing to compare with.

    source: the dense model, as it was named. mismatch: set where the errors found are not the stored ones.
    """

    kinds: tuple[Distribution, ...] = ()
    source: str = ""
    absent: str = ""
    mismatch: str = ""


def dense_folder(model: ModelFacts, against: str | None) -> tuple[Path | None, str]:
    """The dense model's folder, or None and why.

    Args:
        against: dense model that the user named; None looks for the one that was compressed, locally.

    Raises:
        SourceError: the named one is not found.
    """
    if against is not None:
        return resolve(against), ""
    name = str(model.report["model"])
    folder = resolve_local(name)
    if folder is None:
        return None, f"The dense model ({name}) is not on this machine; name it with --against."
    return folder, ""


def compare_weights(
    model: ModelFacts,
    against: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = lambda share, detail: None,
) -> Weights:
    """Distributions of original and decoded weights, up to 8 matrices of each kind.

    Args:
        model: the compressed model. against: the dense one; None looks for it where it was compressed from.
        progress: called with the finished share and the matrix at work.

    Raises:
        SourceError: the model named by `against` is missing, or not the one that was compressed.
        FormatError: the compressed model is damaged.
    """
    folder, reason = dense_folder(model, against)
    if folder is None:
        return Weights(absent=reason)
    try:
        source = open_dense(folder, trust_remote_code)
        _check_same(model, source, folder)
    except SourceError as error:
        if against is not None:
            raise
        return Weights(absent=f"The dense model cannot be used: {error}. Name it with --against.")
    decoded = Matrices.open(model.folder)
    chosen = _chosen(model.matrices)
    total = sum(len(matrices) for matrices, _ in chosen.values())
    done, found = 0, []
    for kind, (matrices, of) in chosen.items():

        def told(number: int, name: str, before: int = done) -> None:
            progress((before + number) / total, name)

        found.append(_distribution(kind, [m.name for m in matrices], of, source, decoded, told))
        done += len(matrices)
    progress(1.0, "")
    return Weights(tuple(found), against or str(model.report["model"]), mismatch=_mismatch(model, found))


def _check_same(model: ModelFacts, source: DenseCheckpoint, folder: Path) -> None:
    """Every compressed matrix is in the dense model, in the same shape.

    Raises:
        SourceError: naming the matrix.
    """
    stored = set(source.names())
    for matrix in model.matrices:
        found = source.shape(matrix.name) if matrix.name in stored else None
        if found != matrix.shape:
            raise SourceError(
                f"{folder}: has {'no ' if found is None else ''}{matrix.name}"
                f"{'' if found is None else f' of shape {found}'}, the compressed model has it in shape "
                f"{matrix.shape}; this is not the model that was compressed"
            )


def _chosen(matrices: Iterable[MatrixFacts]) -> dict[str, tuple[list[MatrixFacts], int]]:
    """Kind -> (matrices spread over the depth, how many there are)."""
    kinds: dict[str, list[MatrixFacts]] = {}
    for matrix in matrices:
        kinds.setdefault(matrix.kind, []).append(matrix)
    return {kind: (spread(members), len(members)) for kind, members in kinds.items()}


def _distribution(
    kind: str,
    names: list[str],
    of: int,
    source: DenseCheckpoint,
    decoded: Matrices,
    progress: Callable[[int, str], None],
) -> Distribution:
    """One kind; originals are read twice, since the bins follow from all of them."""
    original, restored = Moments(), Moments()
    for name in names:
        original.add(source.read(name).float().flatten())
    bound = WIDTH * original.rms or 1.0
    counts = torch.zeros(2, BINS, dtype=torch.float64)
    nmse = {}
    for number, name in enumerate(names):
        progress(number, name)
        both = source.read(name).float().flatten(), decoded.read(name).flatten()
        restored.add(both[1])
        for n, values in enumerate(both):
            counts[n] += torch.histc(values.clamp(-bound, bound), BINS, -bound, bound).double()
        energy = float(both[0].square().sum(dtype=torch.float64))
        error = float((both[0] - both[1]).square().sum(dtype=torch.float64))
        nmse[name] = error / energy if energy else 0.0
    shares = (counts / counts.sum(dim=1, keepdim=True)).tolist()
    edges = torch.linspace(-bound, bound, BINS + 1, dtype=torch.float64).tolist()
    return Distribution(kind, edges, shares[0], shares[1], (original, restored), nmse, of)


def _mismatch(model: ModelFacts, found: list[Distribution]) -> str:
    """A sentence where an error is not the stored one: then this is another model, or it was tuned since."""
    stored = {m.name: m.nmse for m in model.matrices}
    for name, nmse in ((name, nmse) for distribution in found for name, nmse in distribution.nmse.items()):
        known = stored[name]
        if known is not None and abs(nmse - known) > 0.05 * known + 1e-4:
            return (
                f"{name}: the nmse found here is {nmse:.4g}, the stored one {known:.4g}. "
                "Either this is not the model that was compressed, or it was tuned afterwards."
            )
    return ""
