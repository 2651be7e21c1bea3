"""Train the codec on one matrix and record its course, for the studies of training."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pocketllm.codec import (
    EncodedMatrix,
    Independent,
    MatrixCodec,
    TrainingStep,
    fit,
    fold,
    subvectors_per_row,
)
from pocketllm.config import CodecConfig, CompressConfig, Safeguards
from pocketllm.errors import SourceError
from pocketllm.plan import CODEWORD_BITS, ROW_SCALE_BITS, Matrix, Spec, classify
from pocketllm.studies.definition import Progress, Setup

PUBLISHED = CodecConfig(vector_len=8, decoder="row", init="normal", epochs=50, learning_rate=1.6e-2)
"""As the paper states it: random networks, normal codebook, its learning rate and number of epochs."""

OURS = CodecConfig(vector_len=8, decoder="row", kmeans_iterations=10, epochs=8)
"""The same networks, initialized to the identity with a k-means codebook, trained at our learning rate."""

GUARDED = Safeguards()
"""As `compress` trains."""

UNGUARDED = Safeguards(max_grad_norm=math.inf, revive=False)
"""As the paper states it, which mentions neither clipping of gradients nor moving of dead codewords."""

TRAININGS = {"published": "published start", "guarded": "published start, guarded", "ours": "our start"}
"""The trainings that studies compare, and their names on pages."""

TRAINING_TICKS = ("published\nstart", "the same,\nguarded", "our start")
"""The same on an axis, in the same order."""

NORMS = {"rln": "RLN", "ln": "LayerNorm", "none": "no norm"}
"""The norms inside encoder and decoder, and their names on pages."""


@dataclass(frozen=True)
class Training:
    """How a codec is trained: everything except the matrix and the seed."""

    config: CodecConfig
    codebook_size: int
    guards: Safeguards = GUARDED

    def having(self, codebook_size: int | None = None, **changes: Any) -> Training:
        """With another codebook size, or other settings of the codec."""
        config = dataclasses.replace(self.config, **changes)
        return Training(config, codebook_size or self.codebook_size, self.guards)

    @property
    def settings(self) -> dict[str, Any]:
        """Config and safeguards as plain values."""
        return {**dataclasses.asdict(self.config), **dataclasses.asdict(self.guards)}


def training_of(name: str, codebook_size: int, **changes: Any) -> Training:
    """One of `TRAININGS`, with some settings of the codec changed."""
    config = dataclasses.replace(OURS if name == "ours" else PUBLISHED, **changes)
    return Training(config, codebook_size, UNGUARDED if name == "published" else GUARDED)


@dataclass(frozen=True)
class Sample:
    """Rows of one matrix. weight: [rows, columns] float32. whole: whether these are all of its rows."""

    name: str
    kind: str
    weight: Tensor
    whole: bool

    def facts(self) -> dict[str, Any]:
        """What it is, as plain values."""
        square = self.weight.double().square().mean()
        return {
            "name": self.name,
            "kind": self.kind,
            "rows": self.weight.shape[0],
            "columns": self.weight.shape[1],
            "whole": self.whole,
            "mean_square": float(square),
            "kurtosis": float(self.weight.double().pow(4).mean() / square.square()),
        }


def middle_kinds(setup: Setup) -> list[Matrix]:
    """The matrices of the middle block that `compress` would encode, one of each kind.

    Raises:
        SourceError: the model has none.
    """
    matrices = [m for m in classify(setup.source(), CompressConfig())[0] if m.in_blocks]
    if not matrices:
        raise SourceError(f"{setup.model}: has no linear layer in its blocks; nothing to study")
    kinds = list(dict.fromkeys(m.kind for m in matrices))
    by_kind = [[m for m in matrices if m.kind == kind] for kind in kinds]
    return [found[len(found) // 2] for found in by_kind]


def up_projection(setup: Setup) -> Matrix:
    """The first projection of the middle block's MLP: the one named `up`, else the first that widens most."""
    found = middle_kinds(setup)
    named = [m for m in found if "up" in m.kind]
    return (named or sorted(found, key=lambda m: m.columns / m.rows))[0]


def sample(setup: Setup, matrix: Matrix, most: int) -> Sample:
    """At most about `most` weights of a matrix, as complete rows chosen at random."""
    weight = fold(setup.source().read(matrix.name), matrix.transposed).float()
    count = _rows(matrix, most)
    generator = torch.Generator().manual_seed(zlib.crc32(matrix.name.encode(), setup.seed))
    rows = torch.randperm(matrix.rows, generator=generator)[:count].sort().values
    return Sample(matrix.name, matrix.kind, weight[rows].to(setup.device), count == matrix.rows)


Rows = Callable[[], Sample]
"""Reads the rows that a study trains on, when a step wants them."""


@dataclass(frozen=True)
class Trial:
    """A training of the codec on one matrix.

    nmse, mse: of the matrix encoded and decoded with the best state met, rounded as it is stored, in the
        weights' own units.
    end: nmse of unit rows when training ended, infinite where it broke off; start: before it.
    curve: of unit rows, after each epoch. steps: what was observed. epoch_counts: [epochs][K] index use.
    counts: [K] index use of the encoded matrix.
    """

    nmse: float
    mse: float
    start: float
    curve: list[float]
    steps: list[TrainingStep]
    epoch_counts: list[Tensor]
    counts: Tensor
    codec: MatrixCodec
    wanted_epochs: int
    seconds: float

    @property
    def end(self) -> float:
        """See the class."""
        if len(self.curve) < self.wanted_epochs:
            return math.inf
        return self.curve[-1] if self.curve else self.start

    @property
    def grad_norms(self) -> list[float]:
        return [step.grad_norm for step in self.steps]


def train(weight: Tensor, training: Training, seed: int, progress: Progress = lambda share: None) -> Trial:
    """Fit a codec of its own to a matrix [rows, columns], and encode the matrix with it.

    Raises:
        SourceError: the matrix has fewer subvectors than the codebook has codewords.
    """
    config, size = training.config, training.codebook_size
    rows, columns = weight.shape
    _check_size("the matrix under study", rows, columns, config.vector_len, size)
    steps: list[TrainingStep] = []
    started = time.monotonic()
    fitted = fit(
        {"": [weight]},
        config,
        Independent(size),
        seed,
        progress=progress,
        safeguards=training.guards,
        observer=steps.append,
    )
    codec = as_stored(fitted.codecs[""])
    encoded = codec.encode(weight)
    mse = mean_square_error(weight, codec, encoded)
    epochs = range(1 + max((step.epoch for step in steps), default=-1))
    used = [
        torch.stack([step.counts for step in steps if step.epoch == epoch]).sum(0).cpu() for epoch in epochs
    ]
    return Trial(
        nmse=mse / max(float(weight.double().square().mean()), 1e-300),
        mse=mse,
        start=fitted.start_nmse[""],
        curve=fitted.curve,
        steps=steps,
        epoch_counts=used,
        counts=torch.bincount(encoded.indices(config.vector_len).reshape(-1).cpu(), minlength=size),
        codec=codec,
        wanted_epochs=config.epochs,
        seconds=time.monotonic() - started,
    )


def reader(setup: Setup, matrix: Matrix, most: int, sizes: Iterable[tuple[int, int]]) -> Rows:
    """What reads a `sample` of at most about `most` weights; checks at once that codebooks can be fitted to it.

    Args:
        sizes: of the codebooks: pairs (d, K).

    Raises:
        SourceError: the sample has fewer subvectors than a codebook has codewords.
    """
    for d, codebook_size in sizes:
        _check_size(matrix.name, _rows(matrix, most), matrix.columns, d, codebook_size)
    return partial(sample, setup, matrix, most)


def _check_size(name: str, rows: int, columns: int, d: int, codebook_size: int) -> None:
    available = rows * subvectors_per_row(columns, d)
    if available < codebook_size:
        raise SourceError(
            f"{name}: {rows} x {columns} weights have {available} subvectors of {d} weights, wanted at least "
            f"K = {codebook_size}; study a larger model"
        )


def _rows(matrix: Matrix, most: int) -> int:
    """How many rows a sample of at most about `most` weights has."""
    return min(matrix.rows, max(1, most // matrix.columns))


@torch.no_grad()
def as_stored(codec: MatrixCodec) -> MatrixCodec:
    """Codebook and decoder rounded to the 16 bits that they are stored in."""
    for parameter in (codec.codebook, *codec.decoder.parameters()):
        parameter.copy_(parameter.half().float())
    return codec


def mean_square_error(weight: Tensor, codec: MatrixCodec, encoded: EncodedMatrix | None = None) -> float:
    """Mean square error of a matrix [rows, columns], encoded (unless it is already) and decoded."""
    decoded = codec.decode(encoded or codec.encode(weight))
    return float((weight - decoded).double().square().mean())


def stored_bits(weight: Tensor, config: CodecConfig, codebook_size: int) -> dict[str, int]:
    """Bits of a matrix [rows, columns] with a codec of its own, by part."""
    rows, columns = weight.shape
    spec = Spec(config.vector_len, codebook_size)
    indices = 8 * spec.form.nbytes(rows, subvectors_per_row(columns, config.vector_len))
    return {
        "indices": indices,
        "row_scales": ROW_SCALE_BITS * rows if config.row_scale else 0,
        "codebook": CODEWORD_BITS * codebook_size * config.vector_len,
        "decoder": config.decoder_bits,
    }


def binned(values: Sequence[float], bins: int, highest: bool = False) -> list[float]:
    """A long series reduced to a limited number of values: the mean of each section, or its highest value."""
    if not values:
        return []
    bins = min(bins, len(values))
    edges = [len(values) * n // bins for n in range(bins + 1)]
    parts = [values[a:b] for a, b in itertools.pairwise(edges)]
    return [digits(max(part) if highest else sum(part) / len(part)) for part in parts]


def digits(value: float, count: int = 5) -> float:
    """Rounded to this many significant digits, which keeps results small."""
    return float(f"{value:.{count}g}") if math.isfinite(value) else value
