"""1, 3 or 5 blocks in encoder and decoder: are more blocks worse, and is the cause optimization or capacity?"""

from __future__ import annotations

from functools import partial

from pocketllm.studies.definition import Measurement, Setup, Step
from pocketllm.studies.measure.over_seeds import step_over_seeds
from pocketllm.studies.measure.trials import (
    PUBLISHED,
    TRAININGS,
    Training,
    check_size,
    sample,
    training_of,
    up_projection,
)

DEPTHS = (1, 3, 5)
_SIZE, _MOST, _BATCH, _LONGER = 256, 1 << 16, 512, 4
_EPOCHS, _QUICK_EPOCHS = 25, 12


def steps(setup: Setup) -> list[Step]:
    """As published; with safeguards; other widths, learning rates and lengths; from our start."""
    quick = setup.quick
    matrix = up_projection(setup)
    check_size(matrix, _MOST, [(PUBLISHED.vector_len, _SIZE)])
    rows = partial(sample, setup, matrix, _MOST)
    seeds = range(setup.seed, setup.seed + (2 if quick else 5))
    epochs = _QUICK_EPOCHS if quick else _EPOCHS

    def step(key: str, training: Training) -> None:
        made.append(step_over_seeds(key, rows, training, seeds))

    made: list[Step] = []
    for depth in DEPTHS:
        published, guarded, ours = (
            training_of(name, _SIZE, depth=depth, batch_size=_BATCH) for name in TRAININGS
        )
        step(f"published.{depth}", published.having(epochs=epochs))
        for hidden in (16, 64) if quick else (16, 32, 64):
            step(f"hidden.{depth}.{hidden}", guarded.having(hidden=hidden, epochs=epochs))
        for times in (1,) if quick else (1, _LONGER):
            for rate in (5e-3, 1.6e-2) if quick else (1.6e-3, 5e-3, 1.6e-2, 5e-2):
                tuned = guarded.having(learning_rate=rate, epochs=times * epochs)
                step(f"tuned.{depth}.{times}.{rate:g}", tuned)
        step(f"ours.{depth}", ours)
    return made


MEASUREMENT = Measurement(steps=steps)
