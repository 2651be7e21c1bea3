"""1, 3 or 5 blocks in encoder and decoder: is more worse, and if so, is it optimization or capacity?"""

from __future__ import annotations

import dataclasses
from functools import partial

from pocketllm.config import CodecConfig, Safeguards
from pocketllm.studies.definition import Measurement, Setup, Step
from pocketllm.studies.measure.over_seeds import Training, step_over_seeds
from pocketllm.studies.measure.trials import OURS, PUBLISHED, UNGUARDED, check_size, sample, up_projection

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

    def step(key: str, guards: Safeguards, config: CodecConfig) -> Step:
        config = dataclasses.replace(config, batch_size=_BATCH)
        return step_over_seeds(key, rows, Training(config, guards, _SIZE), seeds)

    made = []
    for depth in DEPTHS:
        published = dataclasses.replace(PUBLISHED, depth=depth, epochs=epochs)
        made.append(step(f"published.{depth}", UNGUARDED, published))
        for hidden in (16, 64) if quick else (16, 32, 64):
            wide = dataclasses.replace(published, hidden=hidden)
            made.append(step(f"hidden.{depth}.{hidden}", Safeguards(), wide))
        for times in (1,) if quick else (1, _LONGER):
            for rate in (5e-3, 1.6e-2) if quick else (1.6e-3, 5e-3, 1.6e-2, 5e-2):
                tuned = dataclasses.replace(published, learning_rate=rate, epochs=times * epochs)
                made.append(step(f"tuned.{depth}.{times}.{rate:g}", Safeguards(), tuned))
        made.append(step(f"ours.{depth}", Safeguards(), dataclasses.replace(OURS, depth=depth)))
    return made


MEASUREMENT = Measurement(steps=steps)
