"""Which codewords are used, over training and at the end, by initialization; and a collapse, provoked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from pocketllm.codec import codebook_perplexity, codebook_utilization
from pocketllm.config import CodecConfig, Safeguards
from pocketllm.studies.definition import Measurement, Progress, Setup, Step
from pocketllm.studies.measure.over_seeds import part
from pocketllm.studies.measure.trials import (
    OURS,
    PUBLISHED,
    UNGUARDED,
    Sample,
    check_size,
    digits,
    sample,
    settings,
    train,
    up_projection,
)

_SIZE, _QUICK_SIZE = 1024, 256
_EPOCHS, _QUICK_EPOCHS = 30, 15
_RANKS = 48
_SHOWN = (0.0, 0.25, 0.5, 1.0)  # of training, where the whole histogram is kept


def steps(setup: Setup) -> list[Step]:
    """Each start by itself; then two trainings that collapse."""
    quick = setup.quick
    size, most = (_QUICK_SIZE, 1 << 16) if quick else (_SIZE, 1 << 18)
    matrix = up_projection(setup)
    check_size(matrix, most, [(PUBLISHED.vector_len, size)])
    rows = partial(sample, setup, matrix, most)
    seeds = range(setup.seed, setup.seed + (1 if quick else 3))
    batch = dataclasses.replace(PUBLISHED, batch_size=most // PUBLISHED.vector_len // 16)
    published = dataclasses.replace(batch, epochs=_QUICK_EPOCHS if quick else _EPOCHS)
    ours = dataclasses.replace(OURS, batch_size=batch.batch_size, epochs=published.epochs)
    kinds: dict[str, tuple[CodecConfig, Safeguards]] = {
        "published": (published, UNGUARDED),
        "revived": (published, Safeguards(max_grad_norm=math.inf)),
        "guarded": (published, Safeguards()),
        "ours": (ours, UNGUARDED),
        "collapse-norm": (dataclasses.replace(published, norm="none"), UNGUARDED),
        "collapse-rate": (dataclasses.replace(published, learning_rate=1.6e-1), UNGUARDED),
    }
    return [Step(name, partial(_run, rows, *how, size, seeds)) for name, how in kinds.items()]


def _run(
    chosen: Callable[[], Sample],
    config: CodecConfig,
    guards: Safeguards,
    size: int,
    seeds: Sequence[int],
    progress: Progress,
) -> dict[str, Any]:
    matrix, trials = chosen(), []
    for number, seed in enumerate(seeds):
        told = partial(part, progress, number, len(seeds))
        trials.append(train(matrix.weight, config, size, seed, guards, told))
    first = trials[0]
    epochs = len(first.epoch_counts)
    return {
        "matrix": matrix.facts(),
        "codebook_size": size,
        "settings": settings(config, guards),
        "seeds": list(seeds),
        "steps": len(first.steps),
        "end_nmse": [digits(t.end) for t in trials],
        "nmse": [digits(t.nmse) for t in trials],
        "trained_used": [digits(codebook_utilization(t.epoch_counts[-1])) for t in trials],
        "trained_perplexity": [digits(codebook_perplexity(t.epoch_counts[-1])) for t in trials],
        "coded_used": [digits(codebook_utilization(t.counts)) for t in trials],
        "coded_perplexity": [digits(codebook_perplexity(t.counts)) for t in trials],
        "used_over_epochs": [[digits(codebook_utilization(c)) for c in t.epoch_counts] for t in trials],
        "perplexity_over_epochs": [[digits(codebook_perplexity(c)) for c in t.epoch_counts] for t in trials],
        "ranks": _ranks(size),
        "use_by_rank": {
            str(1 + round(share * (epochs - 1))): _by_rank(first.epoch_counts[round(share * (epochs - 1))])
            for share in _SHOWN
        },
        "coded_use_by_rank": _by_rank(first.counts),
    }


def _ranks(size: int) -> list[int]:
    """Ranks from 1 to K, evenly on a logarithmic axis."""
    return sorted({round(size ** (n / (_RANKS - 1))) for n in range(_RANKS)})


def _by_rank(counts: Tensor) -> list[float]:
    """How often the codewords of those ranks are used, most used first; 1 is the mean."""
    ordered = counts.double().sort(descending=True).values * len(counts) / counts.sum().clamp(min=1)
    return [digits(float(ordered[rank - 1])) for rank in _ranks(len(counts))]


MEASUREMENT = Measurement(steps=steps)
