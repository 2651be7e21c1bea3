"""Which codewords are used, over training and at the end, by initialization; and two provoked collapses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from pocketllm.codec import codebook_perplexity, codebook_utilization
from pocketllm.config import Safeguards
from pocketllm.studies.definition import Measurement, Setup, Step
from pocketllm.studies.measure.over_seeds import step_over_seeds
from pocketllm.studies.measure.trials import (
    PUBLISHED,
    TRAININGS,
    UNGUARDED,
    Training,
    Trial,
    check_size,
    digits,
    sample,
    training_of,
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
    how = {"batch_size": most // PUBLISHED.vector_len // 16, "epochs": _QUICK_EPOCHS if quick else _EPOCHS}
    published, guarded, ours = (training_of(name, size, **how) for name in TRAININGS)
    kinds = {
        "published": published,
        "revived": Training(published.config, size, Safeguards(max_grad_norm=math.inf)),
        "guarded": guarded,
        "ours": Training(ours.config, size, UNGUARDED),
        "collapse-norm": published.having(norm="none"),
        "collapse-rate": published.having(learning_rate=1.6e-1),
    }
    return [step_over_seeds(name, rows, training, seeds, _figures) for name, training in kinds.items()]


def _figures(trials: Sequence[Trial]) -> dict[str, Any]:
    """Use of the codebook: in the last epoch, in the coded matrix, over the epochs, by rank (of the first seed)."""
    first, by_epoch = trials[0], [t.epoch_counts for t in trials]
    shown = [round(share * (len(first.epoch_counts) - 1)) for share in _SHOWN]
    return {
        "steps": len(first.steps),
        "end_nmse": [digits(t.end) for t in trials],
        "nmse": [digits(t.nmse) for t in trials],
        "trained_used": [digits(codebook_utilization(counts[-1])) for counts in by_epoch],
        "trained_perplexity": [digits(codebook_perplexity(counts[-1])) for counts in by_epoch],
        "coded_used": [digits(codebook_utilization(t.counts)) for t in trials],
        "coded_perplexity": [digits(codebook_perplexity(t.counts)) for t in trials],
        "used_over_epochs": [[digits(codebook_utilization(c)) for c in counts] for counts in by_epoch],
        "perplexity_over_epochs": [[digits(codebook_perplexity(c)) for c in counts] for counts in by_epoch],
        "ranks": _ranks(len(first.counts)),
        "use_by_rank": {str(1 + epoch): _by_rank(first.epoch_counts[epoch]) for epoch in shown},
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
