"""The same training on one matrix from several seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from pocketllm.codec import TrainingStep, codebook_perplexity
from pocketllm.studies.definition import Progress, Step, portion
from pocketllm.studies.measure.trials import Rows, Training, Trial, binned, digits, train

_BINS = 40


def step_over_seeds(
    key: str,
    rows: Rows,
    training: Training,
    seeds: Sequence[int],
    figures: Callable[[Sequence[Trial]], dict[str, Any]] | None = None,
) -> Step:
    """A step that trains on `rows()` from each seed.

    Its values: matrix, settings, codebook_size, seeds, and the `figures` of the trials; by default
    steps, of a training; and one for each seed:
    start_nmse, end_nmse (of unit rows, indices as `compress` chooses them; None if training diverged),
    latent_nmse (of the last epoch, nearest latents), nmse and rmse (of the matrix coded with the best state
    met), first_, peak_ and last_gradient, perplexity_of_use (last epoch); gradient: over training,
    lowest, median and highest of the seeds in each bin.
    """

    def run(progress: Progress) -> dict[str, Any]:
        matrix, count = rows(), len(seeds)
        trials = [
            train(matrix.weight, training, seed, portion(progress, number / count, (number + 1) / count))
            for number, seed in enumerate(seeds)
        ]
        return {
            "matrix": matrix.facts(),
            "codebook_size": training.codebook_size,
            "settings": training.settings,
            "seeds": list(seeds),
            **(figures or _figures)(trials),
        }

    return Step(key, run)


def _figures(trials: Sequence[Trial]) -> dict[str, Any]:
    norms = [t.grad_norms for t in trials]
    series = [binned(values, _BINS, highest=True) for values in norms]
    columns = list(zip(*(values[: min(map(len, series))] for values in series), strict=True))
    return {
        "steps": max(map(len, norms)),
        "end_nmse": [digits(t.end) for t in trials],
        "start_nmse": [digits(t.start) for t in trials],
        "latent_nmse": [digits(_by_latent(t.steps)) for t in trials],
        "nmse": [digits(t.nmse) for t in trials],
        "rmse": [digits(t.mse**0.5) for t in trials],
        "first_gradient": [digits(values[0]) for values in norms],
        "peak_gradient": [digits(max(values)) for values in norms],
        "last_gradient": [digits(values[-1]) for values in norms],
        "perplexity_of_use": [digits(codebook_perplexity(t.epoch_counts[-1])) for t in trials],
        "gradient": {
            "low": [min(column) for column in columns],
            "middle": [digits(statistics.median(column)) for column in columns],
            "high": [max(column) for column in columns],
        },
    }


def _by_latent(steps: Sequence[TrainingStep]) -> float:
    last = [step.reconstruction for step in steps if step.epoch == steps[-1].epoch]
    return sum(last) / len(last)
