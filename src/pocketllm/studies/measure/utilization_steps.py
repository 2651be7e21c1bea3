"""Which codewords are used, over training and at the end, by initialization; and two provoked collapses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pocketllm.codec import codebook_perplexity, codebook_utilization
from pocketllm.config import Safeguards
from pocketllm.studies.definition import Measurement, Setup, Step
from pocketllm.studies.measure import trials
from pocketllm.studies.measure.over_seeds import step_over_seeds
from pocketllm.studies.measure.trials import PUBLISHED, TRAININGS, UNGUARDED, Training, Trial, digits

_SIZE, _QUICK_SIZE = 1024, 256
_EPOCHS, _QUICK_EPOCHS = 30, 15
_RANKS = 48
_SHOWN = (0.0, 0.25, 0.5, 1.0)  # of training, where the whole histogram is kept


def steps(setup: Setup) -> list[Step]:
    """Each start by itself; then two trainings that collapse."""
    quick = setup.quick
    size, most = (_QUICK_SIZE, 1 << 16) if quick else (_SIZE, 1 << 18)
    rows = trials.reader(setup, trials.up_projection(setup), most, [(PUBLISHED.vector_len, size)])
    seeds = range(setup.seed, setup.seed + (1 if quick else 3))
    how = {"batch_size": most // PUBLISHED.vector_len // 16, "epochs": _QUICK_EPOCHS if quick else _EPOCHS}
    published, guarded, ours = (trials.training_of(name, size, **how) for name in TRAININGS)
    kinds = {
        "published": published,
        "revived": Training(published.config, size, Safeguards(max_grad_norm=math.inf)),
        "guarded": guarded,
        "ours": Training(ours.config, size, UNGUARDED),
        "collapse-norm": published.having(norm="none"),
        "collapse-rate": published.having(learning_rate=1.6e-1),
    }
    return [step_over_seeds(name, rows, training, seeds, _figures) for name, training in kinds.items()]


def _figures(found: Sequence[Trial]) -> dict[str, Any]:
    """Use of the codebook: in the last epoch, in the coded matrix, over the epochs, by rank (of the first seed)."""
    first = found[0]
    used, perplexity = (
        [[digits(how(counts)) for counts in trial.epoch_counts] for trial in found]
        for how in (codebook_utilization, codebook_perplexity)
    )
    shown = [round(share * (len(first.epoch_counts) - 1)) for share in _SHOWN]
    return {
        "steps": len(first.steps),
        "end_nmse": [digits(t.end) for t in found],
        "nmse": [digits(t.nmse) for t in found],
        "trained_used": [each[-1] for each in used],
        "trained_perplexity": [each[-1] for each in perplexity],
        "coded_used": [digits(codebook_utilization(t.counts)) for t in found],
        "coded_perplexity": [digits(codebook_perplexity(t.counts)) for t in found],
        "used_over_epochs": used,
        "perplexity_over_epochs": perplexity,
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


MEASUREMENT = Measurement(steps)
