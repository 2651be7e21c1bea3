"""Do decoders lower the error at equal stored bytes, and the divergence, before and after distillation?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pocketllm.studies.definition import Finding, Results, Values
from pocketllm.studies.measure.significance import CONFIDENCE, Difference, measured, paired
from pocketllm.studies.show import plot
from pocketllm.studies.show.numbers import number
from pocketllm.studies.verdicts import holds

REFERENCE = "none-kind"
CALIBRATED = ("calibrated-none", "calibrated-mlp")
_SHARED = ("none-model", "mlp-matrix")  # one codebook for all matrices, without and with decoders
_LEAST = 0.01  # relative difference above which an error counts as lower
_WHENS = {"before": "As encoded", "after": "After distillation"}


def variants(results: Results) -> dict[str, list[str]]:
    """Title of a table -> the variants in it."""
    titles = {"Plain compression": False, "Calibrated compression": True}
    return {t: [key for key in results if key.startswith("calibrated") is c] for t, c in titles.items()}


def divergence(results: Results, key: str, when: str) -> Difference:
    """The KL to the dense model with its error over the windows."""
    seen = results[key][when]
    return measured(seen["kl"], seen["kl_stderr"], seen["windows"] - 1)


def shown(results: Results, key: str) -> str:
    """The name of a variant, with the bytes that it stores more or fewer than its reference.

    Those beside the indices, of which plain variants have as many; in all (up to a factor) where bits are allocated.
    """
    in_all = key in CALIBRATED
    reference = CALIBRATED[0] if key.startswith("calibrated") else REFERENCE
    own, other = (
        values["bpw"] if in_all else values["codebook_bytes"] + values["decoder_bytes"]
        for values in (results[key], results[reference])
    )
    name = str(results[key]["shown"])
    if own == other:
        return name
    words = f"{number(abs(own / other - 1) * 100, 2)} % {'more' if own > other else 'fewer'} bytes"
    return f"{name} ({words}{' in all' if in_all else ''})"


def _equal(results: Results) -> list[str]:
    """The plain variants that spend the reference's bytes otherwise."""
    plain = variants(results)["Plain compression"]
    return [key for key in plain if results[key]["equal"] and key != REFERENCE]


def _error(results: Results) -> Iterator[Values]:
    rest, base = [results[key] for key in _equal(results)], results[REFERENCE]["nmse"]
    if not rest:
        yield {"best": None, "gain": -math.inf}
        return
    best = min(rest, key=lambda found: found["nmse"])
    learned = [100 * (1 - found["trained_nmse"] / found["start_nmse"]) for found in rest]
    yield {"best": best, "base": base, "gain": 1 - best["nmse"] / base, "learned": learned}


def _lowest(results: Results) -> Iterator[Values]:
    """The lowest divergence with a decoder and that without, as encoded and distilled."""
    for when, words in _WHENS.items() if _equal(results) else ():
        finite = [key for key in _equal(results) if _finite(results, key, when)]
        if finite and _finite(results, REFERENCE, when):
            best = min(finite, key=lambda key: results[key][when]["kl"])
            found = {"count": len(finite), "shown": results[best]["shown"]}
            yield {"words": words, **found, **_against(results, REFERENCE, best, when)}
        else:
            yield {"words": words, "count": 0}


def _pair(results: Results, without: str, with_: str) -> Iterator[Values]:
    """Two variants, without and with decoders; nothing where one is missing or not finite."""
    if not _equal(results) or not all(_finite(results, key, *_WHENS) for key in (without, with_)):
        return
    own, other = results[with_], results[without]
    more = (own["bpw"] / other["bpw"] - 1) * 100
    whens = {when: _against(results, without, with_, when) for when in _WHENS}
    yield {"with": own, "without": other, "more_bytes": more, **whens}


def _against(results: Results, without: str, with_: str, when: str) -> dict[str, Any]:
    """Divergence and perplexity of both, and their difference window by window."""
    own, other = results[with_][when], results[without][when]
    return {
        "kl": [divergence(results, key, when) for key in (with_, without)],
        "gap": paired(own["window_kl"], other["window_kl"]),
        "perplexity": [own["perplexity"], other["perplexity"]],
    }


def _finite(results: Results, key: str, *whens: str) -> bool:
    return key in results and all(results[key][when]["kl"] is not None for when in whens)


FINDINGS = (
    Finding("a decoder lowers the error at equal bytes", _error, lambda v: holds(v["gain"] > _LEAST)),
    Finding("the lowest divergence with a decoder", _lowest),
    Finding("a decoder for each matrix beside one codebook", lambda results: _pair(results, *_SHARED)),
    Finding("the same on the calibrated path", lambda results: _pair(results, *CALIBRATED)),
)


def picture(results: Results) -> plot.Picture:
    """Error and divergence of every variant, as encoded and distilled."""
    keys = list(results)[::-1]
    names = [f"{'calibrated: ' if key.startswith('calibrated') else ''}{shown(results, key)}" for key in keys]
    names = [name.replace(", ", ",\n", 1) if len(name) > 30 else name for name in names]
    errors = [results[key]["nmse"] for key in keys]
    bars = plot.mark("barh", names, errors, color=plot.COLOURS[0], height=0.6)
    divergences = [
        plot.interval_bars(
            [place + offset for place in range(len(keys))],
            [divergence(results, key, when) for key in keys],
            height=0.36,
            color=plot.COLOURS[colour],
            label=label,
        )
        for when, offset, colour, label in (
            ("before", 0.18, 1, "as encoded"),
            ("after", -0.18, 2, "distilled"),
        )
    ]
    kl = plot.Axis(f"nats per token; lines: {CONFIDENCE:.0%} intervals")
    row = [
        plot.Panel("nmse of the encoded matrices", [bars], plot.Axis("nmse"), small=True),
        plot.Panel(
            "KL to the dense model", divergences, kl, plot.Axis(ticks=[]), {"fontsize": 8}, small=True
        ),
    ]
    return plot.Picture(9, 4.8, [plot.Part([row], (1, 1.1))])
