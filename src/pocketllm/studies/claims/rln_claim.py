"""Does LayerNorm fail where RLN does not: do its gradients explode, or does it end worse?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pocketllm.studies.definition import Results
from pocketllm.studies.measure.over_seeds import exploded, over_entries
from pocketllm.studies.measure.significance import Difference, by_seed, mean
from pocketllm.studies.measure.trials import NORMS, TRAININGS

_ZEROS = 0.99  # nmse above which training is no better than zeros, whose nmse is 1


def entries_of(results: Results, training: str, norm: str) -> list[Any]:
    """The results of a training and a norm, one for each kind."""
    return [value for key, value in results.items() if key.startswith(f"{training}.{norm}.")]


def tried(results: Results, what: str) -> list[str]:
    """The learning rates (`rate`) or codebook sizes (`size`) that were tried."""
    return [key.split(".", 2)[2] for key in results if key.startswith(f"{what}.rln.")]


def learned_nothing(entry: Any) -> bool:
    """Whether training ended no better than zeros in most seeds."""
    lost = sum(value is None or value >= _ZEROS for value in entry["latent_nmse"])
    return 2 * lost > len(entry["latent_nmse"])


def numbers(results: Results) -> dict[str, Any]:
    """For the findings: exploded trainings, the gap of LayerNorm over RLN, and the final errors of all trainings."""
    grew = {norm: exploded(entries_of(results, "published", norm)) for norm in NORMS}
    trainings = {name: _training(results, name) for name in TRAININGS}
    gap = trainings["published"]["gap"]
    signs = grew["ln"][0] > grew["rln"][0], gap is not None and gap.value > 0 and gap.clear
    return {
        "verdict": "Held" if all(signs) else "Held in part" if any(signs) else "Did not hold here",
        "norms": NORMS,
        "grew": grew,
        "trainings": trainings,
        "highest_rate": tried(results, "rate")[-1],
        "exploding": _rates(results, lambda entry: exploded([entry])[0] > 0),
        "idle": _rates(results, learned_nothing),
        "sizes": {size: _size(results, size) for size in tried(results, "size")},
    }


def _training(results: Results, name: str) -> dict[str, Any]:
    """Final errors by norm; the gap of LayerNorm over RLN; the number of trainings in which RLN is better."""
    entries = {norm: entries_of(results, name, norm) for norm in NORMS}
    ends = {norm: [v for e in entries[norm] for v in e["end_nmse"]] for norm in NORMS}
    pairs = list(zip(ends["rln"], ends["ln"], strict=True))
    means = {norm: over_entries(entries[norm], "end_nmse") for norm in NORMS}
    return {
        "title": TRAININGS[name],
        "start": mean(over_entries(entries["rln"], "start_nmse")),
        "end": means,
        "latent": {norm: over_entries(entries[norm], "latent_nmse") for norm in NORMS},
        "gap": by_seed(means["ln"], means["rln"]),
        "better": sum(a is not None and (b is None or a < b) for a, b in pairs),
        "count": len(pairs),
    }


def _rates(results: Results, when: Callable[[Any], bool]) -> dict[str, list[str]]:
    """Title of a norm -> the learning rates at which that is so."""
    return {
        title: [rate for rate in tried(results, "rate") if when(results[f"rate.{norm}.{rate}"])]
        for norm, title in NORMS.items()
    }


def _size(results: Results, size: str) -> dict[str, Any]:
    """Final errors by norm at a codebook size, and the lowest one if it is significant."""
    ends = {title: results[f"size.{norm}.{size}"]["end_nmse"] for norm, title in NORMS.items()}
    known = {title: value for title, values in ends.items() if (value := mean(values)) is not None}
    first, *others = sorted(known, key=lambda title: known[title]) or ["none"]
    gaps: list[Difference | None] = [by_seed(ends[other], ends[first]) for other in others]
    clear = bool(gaps) and all(gap is not None and gap.clear for gap in gaps)
    return {"lowest": first if clear else "none beyond noise", "ends": ends}
