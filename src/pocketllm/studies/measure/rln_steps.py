"""Is reshaped layer normalization needed? RLN, LayerNorm and no norm, trained on matrices of each kind."""

from __future__ import annotations

from pocketllm.studies.definition import Measurement, Setup, Step
from pocketllm.studies.measure import trials
from pocketllm.studies.measure.over_seeds import step_over_seeds
from pocketllm.studies.measure.trials import NORMS, PUBLISHED, TRAININGS

_SIZE, _MOST, _BATCH = 256, 1 << 16, 512
_EPOCHS, _QUICK_EPOCHS = 25, 12


def steps(setup: Setup) -> list[Step]:
    """Each training, norm and kind of matrix; then learning rates and codebook sizes on one matrix."""
    quick, d, matrices = setup.quick, PUBLISHED.vector_len, trials.middle_kinds(setup)
    if quick:
        matrices = matrices[:: max(1, len(matrices) // 3)][:3]
    largest = _SIZE if quick else 4 * _SIZE
    up = trials.reader(setup, trials.up_projection(setup), _MOST, [(d, largest)])
    kinds = {m.kind: trials.reader(setup, m, _MOST, [(d, _SIZE)]) for m in matrices}
    seeds = range(setup.seed, setup.seed + (2 if quick else 5))
    epochs = {"epochs": _QUICK_EPOCHS if quick else _EPOCHS}
    trainings = {
        name: trials.training_of(name, _SIZE, batch_size=_BATCH, **({} if name == "ours" else epochs))
        for name in TRAININGS
    }
    made = [
        step_over_seeds(f"{name}.{norm}.{kind}", rows, training.having(norm=norm), seeds)
        for name, training in trainings.items()
        for norm in NORMS
        for kind, rows in kinds.items()
    ]
    for norm in NORMS:
        for rate in (1.6e-2, 1.6e-1) if quick else (1.6e-3, 1.6e-2, 5e-2, 1.6e-1, 5e-1):
            training = trainings["published"].having(norm=norm, learning_rate=rate)
            made.append(step_over_seeds(f"rate.{norm}.{rate:g}", up, training, seeds[:3]))
        for size in (_SIZE // 4, _SIZE) if quick else (_SIZE // 4, _SIZE, 4 * _SIZE):
            training = trainings["guarded"].having(size, norm=norm)
            made.append(step_over_seeds(f"size.{norm}.{size}", up, training, seeds[:3]))
    return made


MEASUREMENT = Measurement(steps)
