"""Is reshaped layer normalization needed? RLN, LayerNorm and no norm, trained on matrices of each kind."""

from __future__ import annotations

from functools import partial

from pocketllm.studies.definition import Measurement, Setup, Step
from pocketllm.studies.measure.over_seeds import step_over_seeds
from pocketllm.studies.measure.trials import (
    NORMS,
    PUBLISHED,
    TRAININGS,
    Training,
    check_size,
    middle_kinds,
    sample,
    training_of,
    up_projection,
)

_SIZE, _MOST, _BATCH = 256, 1 << 16, 512
_EPOCHS, _QUICK_EPOCHS = 25, 12


def _training(name: str, quick: bool) -> Training:
    epochs = {} if name == "ours" else {"epochs": _QUICK_EPOCHS if quick else _EPOCHS}
    return training_of(name, _SIZE, batch_size=_BATCH, **epochs)


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
        for norm in NORMS:
            training = _training(name, quick).having(norm=norm)
            for matrix in matrices:
                check_size(matrix, _MOST, [(PUBLISHED.vector_len, _SIZE)])
                rows = partial(sample, setup, matrix, _MOST)
                made.append(step_over_seeds(f"{name}.{norm}.{matrix.kind}", rows, training, seeds))
    up, published = partial(sample, setup, middle, _MOST), _training("published", quick)
    for norm in NORMS:
        for rate in (1.6e-2, 1.6e-1) if quick else (1.6e-3, 1.6e-2, 5e-2, 1.6e-1, 5e-1):
            training = published.having(norm=norm, learning_rate=rate)
            made.append(step_over_seeds(f"rate.{norm}.{rate:g}", up, training, seeds[:3]))
        for size in (_SIZE // 4, _SIZE) if quick else (_SIZE // 4, _SIZE, 4 * _SIZE):
            training = _training("guarded", quick).having(size, norm=norm)
            made.append(step_over_seeds(f"size.{norm}.{size}", up, training, seeds[:3]))
    return made


MEASUREMENT = Measurement(steps=steps)
