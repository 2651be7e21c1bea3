"""Distributions of the weights before and after compression."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pocketllm.errors import SourceError
from pocketllm.report.model_facts import MatrixFacts, ModelFacts, grouped, spread
from pocketllm.runtime import Matrices
from pocketllm.source import DenseCheckpoint, open_dense, resolve, resolve_local

BINS = 41
WIDTH = 4.0  # histograms end at this many times the rms of the original weights
_AT_ONCE = 1 << 24  # weights converted to float64 at a time

Progress = Callable[[float, str], None]


@dataclass
class Moments:
    """Sums over weights, in float64, from which the statistics of a distribution are computed."""

    count: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))  # of powers 1 to 4
    largest: float = 0.0

    def add(self, values: Tensor) -> None:
        """values: float32 [n]."""
        self.count += values.numel()
        for part in values.split(_AT_ONCE):
            self.sums += torch.stack([(part.double() ** power).sum() for power in (1, 2, 3, 4)])
        self.largest = max(self.largest, float(values.abs().max()))

    @property
    def mean(self) -> float:
        return float(self.sums[0]) / self.count

    @property
    def rms(self) -> float:
        return math.sqrt(float(self.sums[1]) / self.count)

    @property
    def kurtosis(self) -> float:
        """Fourth moment over the square of the second; 3 for a Gaussian, 0 where all weights are 0."""
        second, fourth = float(self.sums[1]) / self.count, float(self.sums[3]) / self.count
        return fourth / second**2 if second else 0.0


@dataclass(frozen=True)
class Distribution:
    """Weights of one kind of matrix.

    edges: of the bins. original, decoded: shares of the weights per bin, those beyond the ends in the
    outermost bins. moments: of both, by these names. nmse: measured here, by matrix. of: how many matrices of
    this kind the model has.
    """

    kind: str
    edges: list[float]
    original: list[float]
    decoded: list[float]
    moments: Mapping[str, Moments]
    nmse: dict[str, float]
    of: int

    @property
    def mean_nmse(self) -> float:
        return sum(self.nmse.values()) / len(self.nmse)


@dataclass(frozen=True)
class Weights:
    """Distributions of every kind; empty, with the reason, if there is no dense model to compare with.

    source: the dense model, as it was named. mismatch: set if the measured errors differ from the stored ones.
    """

    kinds: tuple[Distribution, ...] = ()
    source: str = ""
    absent: str = ""
    mismatch: str = ""


def compare_weights(
    model: ModelFacts,
    against: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = lambda share, detail: None,
) -> Weights:
    """Distributions of original and decoded weights, up to 8 matrices of each kind.

    Args:
        model: the compressed model.
        against: the dense one; None looks for the one that was compressed, on this machine only.
        trust_remote_code: let transformers run code that the dense model's folder contains.
        progress: called with the finished share and the name of the matrix in progress.

    Raises:
        SourceError: the model named by `against` is missing, or not the one that was compressed.
        FormatError: the compressed model is damaged.
    """
    name = str(model.report["model"])
    folder = resolve_local(name) if against is None else resolve(against)
    if folder is None:
        return Weights(absent=f"The dense model ({name}) is not on this machine; name it with --against.")
    try:
        source = open_dense(folder, trust_remote_code)
        _check_same(model, source, folder)
    except SourceError as error:
        if against is not None:
            raise
        return Weights(absent=f"The dense model cannot be used: {error}. Name it with --against.")
    decoded = Matrices.open(model.folder)
    kinds = grouped(model.matrices, lambda m: m.kind)
    chosen = {kind: spread(matrices) for kind, matrices in kinds.items()}
    names = [m.name for matrices in chosen.values() for m in matrices]
    found = tuple(
        _distribution(
            kind,
            [m.name for m in matrices],
            of=len(kinds[kind]),
            source=source,
            decoded=decoded,
            progress=lambda name: progress(names.index(name) / len(names), name),
        )
        for kind, matrices in chosen.items()
    )
    progress(1.0, "")
    return Weights(kinds=found, source=against or name, mismatch=_mismatch(model.matrices, found))


def _check_same(model: ModelFacts, source: DenseCheckpoint, folder: Path) -> None:
    """Check that every compressed matrix is in the dense model, with the same shape.

    Raises:
        SourceError: names the matrix.
    """
    stored = set(source.names())
    for matrix in model.matrices:
        found = source.shape(matrix.name) if matrix.name in stored else None
        if found != matrix.shape:
            got = f"no {matrix.name}" if found is None else f"{matrix.name} of shape {found}"
            raise SourceError(
                f"{folder}: has {got}, the compressed model has it in shape {matrix.shape}; "
                "this is not the model that was compressed"
            )


def _distribution(
    kind: str,
    names: list[str],
    *,
    of: int,
    source: DenseCheckpoint,
    decoded: Matrices,
    progress: Callable[[str], None],
) -> Distribution:
    """One kind; originals are read twice, since the bins follow from all of them."""
    before, after, nmse = Moments(), Moments(), {}
    for name in names:
        before.add(source.read(name).float().flatten())
    bound = WIDTH * before.rms or 1.0
    counts = torch.zeros(2, BINS, dtype=torch.float64)
    for name in names:
        progress(name)
        original, restored = source.read(name).float().flatten(), decoded.read(name).flatten()
        after.add(restored)
        for n, values in enumerate((original, restored)):
            counts[n] += torch.histc(values.clamp(-bound, bound), BINS, -bound, bound).double()
        energy = float(original.square().sum(dtype=torch.float64))
        error = float((original - restored).square().sum(dtype=torch.float64))
        nmse[name] = error / energy if energy else 0.0
    shares = (counts / counts.sum(dim=1, keepdim=True)).tolist()
    return Distribution(
        kind=kind,
        edges=torch.linspace(-bound, bound, BINS + 1, dtype=torch.float64).tolist(),
        original=shares[0],
        decoded=shares[1],
        moments={"original": before, "decoded": after},
        nmse=nmse,
        of=of,
    )


def _mismatch(matrices: tuple[MatrixFacts, ...], found: tuple[Distribution, ...]) -> str:
    """A note if a measured error differs from the stored one, '' if all agree."""
    measured = {name: nmse for distribution in found for name, nmse in distribution.nmse.items()}
    stored = {m.name: m.nmse for m in matrices}
    for name, nmse in measured.items():
        known = stored[name]
        if known is not None and abs(nmse - known) > 0.05 * known + 1e-4:
            return (
                f"{name}: the measured nmse is {nmse:.4g}, the stored one {known:.4g}. "
                "Either this is not the model that was compressed, or the compressed model was fine-tuned afterwards."
            )
    return ""
