"""Numbers of the tables and picture of the study `decoder`."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from pocketllm.studies.claims.decoder_claim import CALIBRATED, REFERENCE, divergence, keys_of
from pocketllm.studies.definition import Results
from pocketllm.studies.measure.significance import CONFIDENCE
from pocketllm.studies.show.numbers import number
from pocketllm.studies.show.plot import COLOURS, Axis, Bars, Panel, Part, Picture


def table_numbers(results: Results) -> dict[str, Any]:
    """For the tables: the variants of plain compression, and of calibrated coding where there is any."""
    return {
        "groups": {
            "Plain compression": keys_of(results, calibrated=False),
            "Calibrated compression": keys_of(results, calibrated=True),
        },
        "shown": partial(_shown, results),
        "divergence": partial(divergence, results),
    }


def _shown(results: Results, key: str) -> str:
    """The name of a variant, with the bytes that it stores more or fewer than its reference."""
    reference = CALIBRATED[0] if key.startswith("calibrated") else REFERENCE
    own, other = (_compared_bytes(results, each, key in CALIBRATED) for each in (key, reference))
    name = str(results[key]["shown"])
    if own == other:
        return name
    words = f"{number(abs(own / other - 1) * 100, 2)} % {'more' if own > other else 'fewer'} bytes"
    return f"{name} ({words}{' in all' if key in CALIBRATED else ''})"


def _compared_bytes(results: Results, key: str, in_all: bool) -> float:
    """Beside the indices, of which plain variants have as many; in all (up to a factor) where bits are allocated."""
    values = results[key]
    return float(values["bpw"] if in_all else values["codebook_bytes"] + values["decoder_bytes"])


def picture(results: Results) -> Picture:
    """Error and divergence of every variant, as encoded and distilled."""
    keys = list(results)[::-1]
    errors = Bars(
        [_name(results, key) for key in keys],
        [results[key]["nmse"] for key in keys],
        {"color": COLOURS[0], "height": 0.6},
    )
    row = [
        Panel("nmse of the encoded matrices", [errors], x=Axis("nmse"), small=True),
        Panel(
            "KL to the dense model",
            [
                _divergences(results, keys, 0.18, "before", {"color": COLOURS[1], "label": "as encoded"}),
                _divergences(results, keys, -0.18, "after", {"color": COLOURS[2], "label": "distilled"}),
            ],
            x=Axis(f"nats per token; lines: {CONFIDENCE:.0%} intervals"),
            y=Axis(ticks=[]),
            legend={"fontsize": 8},
            small=True,
        ),
    ]
    return Picture(9, 4.8, [Part([row], (1, 1.1))])


def _divergences(results: Results, keys: list[str], offset: float, when: str, style: dict[str, str]) -> Bars:
    """Bars beside the middle of each place; no whisker where there is one window."""
    found = [divergence(results, key, when) for key in keys]
    return Bars(
        [place + offset for place in range(len(keys))],
        [each.value for each in found],
        {"height": 0.36, **style},
        [each.margin if each.known and not math.isnan(each.value) else 0.0 for each in found],
    )


def _name(results: Results, key: str) -> str:
    name = f"{'calibrated: ' if key.startswith('calibrated') else ''}{_shown(results, key)}"
    return name.replace(", ", ",\n", 1) if len(name) > 30 else name
