"""A single projection: the error reached, and the least error possible at that rate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pocketllm.codec import MatrixCodec
from pocketllm.config import CodecConfig
from pocketllm.studies.definition import Measurement, Progress, Setup, Step
from pocketllm.studies.measure import trials
from pocketllm.studies.measure.rates import bits_for_mse, gaussian_mse, lloyd_max
from pocketllm.studies.measure.trials import TRAININGS, Rows, Training, digits, train

TARGET = 1e-4
TARGETS = {"MSE": TARGET, "RMSE": TARGET**2}
"""Interpretations of the paper's figure, as mean square errors."""
_MOST, _BATCH = 1 << 20, 4096
CURVES = ((8, 4096), (4, 256))  # (d, K)
QUICK_CURVES, _QUICK_EPOCHS = ((8, 256),), 20
SWEEP = (
    *((8, 1 << n) for n in (8, 10, 12, 14, 15)),
    *((4, 1 << n) for n in (8, 10, 12, 14)),
    *((2, 1 << n) for n in (6, 8, 9, 10, 12)),
    *((1, 1 << n) for n in range(3, 14)),
)
QUICK_SWEEP = ((8, 256), (4, 256), (2, 64), (2, 1024), *((1, 1 << n) for n in range(3, 14, 2)))
TWINS = ((8, 4096), (4, 256), (4, 4096), (2, 1024))
QUICK_TWINS = ((4, 256), (2, 1024))


def steps(setup: Setup) -> list[Step]:
    """The bound; trainings; k-means and codec over the rates; the same of a Gaussian matrix."""
    quick = setup.quick
    curves, sweep, twins = sizes = (
        (QUICK_CURVES, QUICK_SWEEP, QUICK_TWINS) if quick else (CURVES, SWEEP, TWINS)
    )
    fitted = [(d, size) for tried in sizes for d, size in tried if d > 1]
    rows = trials.reader(setup, trials.up_projection(setup), 1 << 17 if quick else _MOST, fitted)
    made: dict[str, Callable[[Progress], dict[str, Any]]] = {"bound": partial(_bound, rows)}
    for d, size in curves:
        for name in TRAININGS:
            training = trials.training_of(name, size, vector_len=d, batch_size=_BATCH)
            if quick and name != "ours":
                training = training.having(epochs=_QUICK_EPOCHS, batch_size=1024)
            made[f"curve.{name}.{d}x{size}"] = partial(_curve, rows, training, setup.seed)
    made |= {f"sweep.{d}x{size}": partial(_point, rows, d, size, setup.seed) for d, size in sweep}
    made |= {f"twin.{d}x{size}": partial(_twin, rows, d, size, setup.seed) for d, size in twins}
    return [Step(key, run) for key, run in made.items()]


def _bound(rows: Rows, progress: Progress) -> dict[str, Any]:
    matrix = rows()
    squares = matrix.weight.double().square().mean(dim=1)
    rates = [n / 4 for n in range(1, 57)]
    return {
        "matrix": matrix.facts(),
        "levels_of_32": _levels(matrix.weight),
        "distinct_values": len(matrix.weight.unique()),
        "bfloat16_rounding_mse": digits(_rounding(matrix.weight)),
        "bits": rates,
        "mse": [digits(gaussian_mse(squares, rate)) for rate in rates],
        "impossible_below_bits": {name: bits_for_mse(squares, mse) for name, mse in TARGETS.items()},
    }


def _levels(weight: Tensor, run: int = 32) -> int:
    """The most different values in any aligned run of so many weights in a row."""
    runs = weight[:, : weight.shape[1] // run * run].reshape(-1, run).sort(dim=1).values
    return 1 + int((runs[:, 1:] != runs[:, :-1]).sum(dim=1).max()) if len(runs) else run


def _rounding(weight: Tensor) -> float:
    """Mean square error of rounding numbers as large as these to bfloat16, whose steps are 2^-7 of a power of 2."""
    _, exponent = torch.frexp(weight.double())
    step = torch.ldexp(torch.ones_like(weight, dtype=torch.float64), exponent - 8)
    return float((step.square() / 12).mean())


def _curve(rows: Rows, training: Training, seed: int, progress: Progress) -> dict[str, Any]:
    """A training, beside k-means and the bound at the rate of its indices."""
    matrix = rows()
    trial = train(matrix.weight, training, seed, progress)
    square = matrix.facts()["mean_square"]
    return {
        "settings": training.settings,
        "steps": len(trial.steps),
        "mse_over_epochs": [digits(square * value) for value in trial.curve],
        "unfinished": len(trial.curve) < training.config.epochs,
        **_measured(matrix.weight, training, trial.mse),
        "seconds": round(trial.seconds, 1),
    }


def _measured(weight: Tensor, training: Training, mse: float) -> dict[str, Any]:
    """What the encoded matrix comes to, in bits and in errors."""
    bits = trials.stored_bits(weight, training.config, training.codebook_size)
    rate = bits["indices"] / weight.numel()
    return {
        "vector_len": training.config.vector_len,
        "codebook_size": training.codebook_size,
        "bits": bits,
        "index_bpw": rate,
        "bpw": sum(bits.values()) / weight.numel(),
        "nmse": digits(mse / float(weight.double().square().mean())),
        "mse": digits(mse),
        "bound_mse": digits(gaussian_mse(weight.double().square().mean(dim=1), rate)),
    }


def _lookup(d: int, size: int, epochs: int) -> Training:
    """The look-up form without row scales: k-means in the weights' own units, then training."""
    config = CodecConfig(
        vector_len=d, row_scale=False, kmeans_iterations=10, epochs=epochs, batch_size=_BATCH
    )
    return Training(config, size)


def _point(rows: Rows, d: int, size: int, seed: int, progress: Progress) -> dict[str, Any]:
    """k-means and the codec at one size."""
    weight, training = rows().weight, _lookup(d, size, epochs=2)
    if d == 1:
        return _scalar(weight, size)
    trial = train(weight, training, seed, progress)
    kmeans = trial.start * float(weight.double().square().mean())
    return {"kmeans_mse": digits(kmeans), **_measured(weight, training, trial.mse)}


def _scalar(weight: Tensor, size: int) -> dict[str, Any]:
    """A scalar quantizer as a codec: networks have nothing to add to numbers that stand alone."""
    training = _lookup(1, size, epochs=0)
    codec = MatrixCodec(training.config, nn.Parameter(lloyd_max(weight, size)))
    for net in (codec.encoder, codec.decoder):
        net.reset("identity", torch.Generator())
        net.to(weight.device)
    kmeans = trials.mean_square_error(weight, codec)
    measured = _measured(weight, training, trials.mean_square_error(weight, trials.as_stored(codec)))
    return {"kmeans_mse": digits(kmeans), **measured}


def _twin(rows: Rows, d: int, size: int, seed: int, progress: Progress) -> dict[str, Any]:
    """k-means of a Gaussian matrix with the same shape and the same scale of each row."""
    weight, training = rows().weight, _lookup(d, size, epochs=0)
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight.device)
    drawn *= (weight.square().mean(dim=1) / drawn.square().mean(dim=1)).sqrt()[:, None]
    return _measured(drawn, training, train(drawn, training, seed, progress).mse)


MEASUREMENT = Measurement(steps)
