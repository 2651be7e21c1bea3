"""1, 3 or 5 blocks in encoder and decoder: are more blocks worse, and is the cause optimization or capacity?"""

from __future__ import annotations

from pocketllm.studies.definition import Measurement, Setup, Step
from pocketllm.studies.measure import trials
from pocketllm.studies.measure.over_seeds import step_over_seeds
from pocketllm.studies.measure.trials import PUBLISHED, TRAININGS

DEPTHS = (1, 3, 5)
_SIZE, _MOST, _BATCH, _LONGER = 256, 1 << 16, 512, 4
_EPOCHS, _QUICK_EPOCHS = 25, 12


def steps(setup: Setup) -> list[Step]:
    """As published; with safeguards; other widths, learning rates and lengths; from our start."""
    quick = setup.quick
    rows = trials.reader(setup, trials.up_projection(setup), _MOST, [(PUBLISHED.vector_len, _SIZE)])
    epochs = _QUICK_EPOCHS if quick else _EPOCHS
    made: dict[str, trials.Training] = {}
    for depth in DEPTHS:
        published, guarded, ours = (
            trials.training_of(name, _SIZE, depth=depth, batch_size=_BATCH) for name in TRAININGS
        )
        made[f"published.{depth}"] = published.having(epochs=epochs)
        for hidden in (16, 64) if quick else (16, 32, 64):
            made[f"hidden.{depth}.{hidden}"] = guarded.having(hidden=hidden, epochs=epochs)
        for times in (1,) if quick else (1, _LONGER):
            for rate in (5e-3, 1.6e-2) if quick else (1.6e-3, 5e-3, 1.6e-2, 5e-2):
                tuned = guarded.having(learning_rate=rate, epochs=times * epochs)
                made[f"tuned.{depth}.{times}.{rate:g}"] = tuned
        made[f"ours.{depth}"] = ours
    seeds = range(setup.seed, setup.seed + (2 if quick else 5))
    return [step_over_seeds(key, rows, training, seeds) for key, training in made.items()]


MEASUREMENT = Measurement(steps)
