"""Do decoders lower the error at equal stored bytes, and the divergence, before and after distillation?"""

from __future__ import annotations

from typing import Any

from pocketllm.studies.definition import Results
from pocketllm.studies.measure.significance import Difference, measured, paired

REFERENCE = "none-kind"
CALIBRATED = ("calibrated-none", "calibrated-mlp")
_SHARED = ("none-model", "mlp-matrix")  # one codebook for all matrices, without and with decoders
_LEAST = 0.01  # relative difference above which an error counts as lower
_WHENS = ("before", "after")


def keys_of(results: Results, calibrated: bool) -> list[str]:
    """The variants of plain or of calibrated encoding."""
    return [key for key in results if key.startswith("calibrated") is calibrated]


def divergence(results: Results, key: str, when: str) -> Difference:
    """The KL to the dense model with its error over the windows."""
    seen = results[key][when]
    return measured(seen["kl"], seen["kl_stderr"], seen["windows"] - 1)


def numbers(results: Results) -> dict[str, Any]:
    """For the findings: the best decoder by error and by divergence; one shared codebook; the calibrated pair."""
    rest = [key for key in keys_of(results, False) if results[key]["equal"] and key != REFERENCE]
    if not rest:
        return {"best": None}
    base = results[REFERENCE]["nmse"]
    best = results[min(rest, key=lambda key: results[key]["nmse"])]
    learned = [100 * (1 - results[key]["trained_nmse"] / results[key]["start_nmse"]) for key in rest]
    gain = 1 - best["nmse"] / base
    return {
        "held": gain > _LEAST,
        "best": best,
        "base": base,
        "gain": 100 * gain,
        "learned": [min(learned), max(learned)],
        "lowest_kl": {when: _lowest(results, rest, when) for when in _WHENS},
        "shared": _pair(results, *_SHARED),
        "calibrated": _pair(results, *CALIBRATED),
    }


def _lowest(results: Results, rest: list[str], when: str) -> dict[str, Any] | None:
    """The lowest divergence with a decoder and that without; None if one is not finite."""
    finite = [key for key in rest if _finite(results, key, when)]
    if not finite or not _finite(results, REFERENCE, when):
        return None
    best = min(finite, key=lambda key: results[key][when]["kl"])
    return {"count": len(finite), "shown": results[best]["shown"], **_against(results, REFERENCE, best, when)}


def _pair(results: Results, without: str, with_: str) -> dict[str, Any] | None:
    """Two variants, without and with decoders; None if one is missing or not finite."""
    if not all(_finite(results, key, *_WHENS) for key in (without, with_)):
        return None
    own, other = results[with_], results[without]
    return {
        "with": own,
        "without": other,
        "more_bytes": (own["bpw"] / other["bpw"] - 1) * 100,
        "whens": {when: _against(results, without, with_, when) for when in _WHENS},
    }


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
