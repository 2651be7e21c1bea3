"""1, 3 or 5 blocks in encoder and decoder: is more worse, and if so, is it optimization or capacity?"""

from __future__ import annotations

import dataclasses
from functools import partial

from pocketllm.config import CodecConfig, Safeguards
from pocketllm.studies import depth_page as page
from pocketllm.studies.registry import STUDIES
from pocketllm.studies.repeated import Training, repeated
from pocketllm.studies.study import Setup, Step, Study
from pocketllm.studies.trials import OURS, PUBLISHED, UNGUARDED, check_size, sample, up_projection

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
        return repeated(key, rows, Training(config, guards, _SIZE), seeds)

    made = []
    for depth in page.DEPTHS:
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


STUDY = Study(
    name="depth",
    title=STUDIES["depth"],
    claim=(
        "Three MLP blocks in encoder and decoder are right; five do worse, because of too many nonlinear factors."
    ),
    method=(
        "Codecs with 1, 3 and 5 blocks are trained on random rows of the up projection of the middle block, from "
        "several seeds: as published; with safeguards (gradients cut, dead codewords moved); with wider networks; at "
        "other learning rates and four times longer; and from our start, where networks begin as the identity."
    ),
    left_out="two seeds, 12 passes instead of 25, two widths, two learning rates, nothing longer.",
    steps=steps,
    tables=page.tables,
    draw=page.draw,
    findings=page.findings,
)
