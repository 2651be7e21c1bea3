"""Is reshaped layer normalization needed? RLN, LayerNorm and no norm, trained alike on matrices of each kind."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from pocketllm.studies import rln_page as page
from pocketllm.studies.registry import STUDIES
from pocketllm.studies.repeated import Training, repeated
from pocketllm.studies.study import Setup, Step, Study
from pocketllm.studies.trials import (
    PUBLISHED,
    TRAININGS,
    check_size,
    middle_kinds,
    sample,
    training_of,
    up_projection,
)

_SIZE, _MOST, _BATCH = 256, 1 << 16, 512
_EPOCHS, _QUICK_EPOCHS = 25, 12


def _training(name: str, quick: bool) -> Training:
    config, guards = training_of(name)
    if name != "ours":
        config = dataclasses.replace(config, epochs=_QUICK_EPOCHS if quick else _EPOCHS)
    return Training(dataclasses.replace(config, batch_size=_BATCH), guards, _SIZE)


def _with(training: Training, size: int = _SIZE, **changes: Any) -> Training:
    return Training(dataclasses.replace(training.config, **changes), training.guards, size)


def steps(setup: Setup) -> list[Step]:
    """Each training, norm and kind of matrix; then learning rates and codebook sizes on one matrix."""
    quick, matrices = setup.quick, middle_kinds(setup)
    if quick:
        matrices = matrices[:: max(1, len(matrices) // 3)][:3]
    middle = up_projection(setup)
    check_size(middle, _MOST, [(PUBLISHED.vector_len, _SIZE if quick else 4 * _SIZE)])
    seeds = range(setup.seed, setup.seed + (2 if quick else 5))
    made = []
    for name in TRAININGS:
        for norm in page.NORMS:
            training = _with(_training(name, quick), norm=norm)
            for matrix in matrices:
                check_size(matrix, _MOST, [(PUBLISHED.vector_len, _SIZE)])
                rows = partial(sample, setup, matrix, _MOST)
                made.append(repeated(f"{name}.{norm}.{matrix.kind}", rows, training, seeds))
    up, published = partial(sample, setup, middle, _MOST), _training("published", quick)
    for norm in page.NORMS:
        for rate in (1.6e-2, 1.6e-1) if quick else (1.6e-3, 1.6e-2, 5e-2, 1.6e-1, 5e-1):
            training = _with(published, norm=norm, learning_rate=rate)
            made.append(repeated(f"rate.{norm}.{rate:g}", up, training, seeds[:3]))
        for size in (_SIZE // 4, _SIZE) if quick else (_SIZE // 4, _SIZE, 4 * _SIZE):
            training = _with(_training("guarded", quick), size, norm=norm)
            made.append(repeated(f"size.{norm}.{size}", up, training, seeds[:3]))
    return made


STUDY = Study(
    name="rln",
    title=STUDIES["rln"],
    claim=(
        "Inside encoder and decoder the statistics of the norm must be taken over the full row (reshaped "
        "layer normalization, RLN). A plain LayerNorm over the d numbers of a subvector fails in training; "
        "the sign of it is exploding gradients."
    ),
    method=(
        "Codecs of their own are trained on random rows of one matrix of each kind in the middle block, with "
        "RLN, LayerNorm or no norm in encoder and decoder, from several seeds: from the published start, "
        "with and without safeguards, and from ours. All rows are scaled to unit mean square first. The "
        "gradient norm is that of all parameters together, before it is cut. On one matrix learning rates "
        "and codebook sizes are varied, too."
    ),
    left_out=(
        "at most three kinds of matrix, two seeds, 12 passes instead of 25, two learning rates, two "
        "codebook sizes."
    ),
    steps=steps,
    tables=page.tables,
    draw=page.draw,
    findings=page.findings,
)
