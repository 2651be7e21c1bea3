"""What is made of the results of the study `decoder`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pocketllm.studies.noise import CONFIDENCE, Difference, paired
from pocketllm.studies.study import Results, Table
from pocketllm.studies.style import COLOURS, INK, number, with_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCE = "none-kind"
CALIBRATED = ("calibrated-none", "calibrated-mlp")
_LEAST = 0.01  # a lower error is one from this share on


def _keys(results: Results, calibrated: bool) -> list[str]:
    return [key for key in results if key.startswith("calibrated") is calibrated]


def tables(results: Results) -> list[Table]:
    found = [_table(results, _keys(results, False), "Plain coding")]
    if _keys(results, True):
        found.append(_table(results, _keys(results, True), "Calibrated coding"))
    return found


def _table(results: Results, keys: list[str], title: str) -> Table:
    rows = []
    for key in keys:
        values = results[key]
        before, after = values["before"], values["after"]
        rows.append(
            [
                values["shown"] + _more_bytes(results, key),
                str(values["codewords"]),
                f"{values['codebook_bytes']} + {values['decoder_bytes']}",
                number(values["bpw"], 5),
                number(values["nmse"], 4),
                f"{number(values['start_nmse'], 4)} → {number(values['trained_nmse'], 4)}",
                _kl(before),
                number(before["perplexity"], 4),
                _kl(after),
                number(after["perplexity"], 4),
            ]
        )
    header = [
        *("decoder", "K", "bytes of codebooks + decoders", "bpw", "nmse", "nmse of the sample, by training"),
        *("KL", "perplexity", "KL, distilled", "perplexity, distilled"),
    ]
    first = results[keys[0]]
    before, distilled, config = first["before"], first["distilled"], first["config"]
    note = (
        f"{config['blocks']} blocks coded. nmse: of the stored matrices; beside it that of the sample before and "
        "after training, which is kept only if no matrix got worse by it. KL to the dense model in nats per token "
        "± its standard error over the windows; perplexity has none here. Differences are taken window by window. "
        "Bytes in brackets: more or fewer than in the first row, of those beside the indices unless it says in all. "
        f"{before['windows']} windows of {before['context']} tokens, dense perplexity "
        f"{number(before['reference_perplexity'], 4)}. Distilled for {distilled['steps']} steps of "
        f"{config['batch']} x {config['context']} tokens."
    )
    return Table(title, header, rows, note)


def _more_bytes(results: Results, key: str) -> str:
    """How many more bytes than its reference it stores, in all where indices differ; nothing where as many."""
    own, reference = (_compared_bytes(results[each], key) for each in (key, _reference(key)))
    if own == reference:
        return ""
    where = " in all" if key in CALIBRATED else ""
    return f" ({number(abs(own / reference - 1) * 100, 2)} % {'more' if own > reference else 'fewer'} bytes{where})"


def _compared_bytes(values: Mapping[str, Any], key: str) -> float:
    """Beside the indices, of which plain variants have as many; in all (up to a factor) where bits are allocated."""
    return float(values["bpw"] if key in CALIBRATED else values["codebook_bytes"] + values["decoder_bytes"])


def _reference(key: str) -> str:
    return CALIBRATED[0] if key.startswith("calibrated") else REFERENCE


def _kl(seen: Mapping[str, Any]) -> str:
    error = seen["kl_stderr"]
    return (
        number(None) if seen["kl"] is None else with_error(seen["kl"], math.inf if error is None else error)
    )


def _kl_apart(values: Mapping[str, Any], other: Mapping[str, Any]) -> Difference:
    """Window by window: all were measured on the same ones."""
    return paired(values["window_kl"], other["window_kl"])


def draw(results: Results, figure: Figure) -> None:
    figure.set_size_inches(9, 4.8)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    keys = list(results)[::-1]
    names = [_label(results, key) for key in keys]
    left.barh(names, [results[key]["nmse"] for key in keys], color=COLOURS[0], height=0.6)
    left.set_title("nmse of the coded matrices", fontsize=9)
    places = range(len(keys))
    for offset, when, colour in ((0.18, "before", COLOURS[1]), (-0.18, "after", COLOURS[2])):
        known = [results[key][when]["kl"] for key in keys]
        lengths = [math.nan if value is None else value for value in known]
        errors = [_margin(results[key][when]) for key in keys]
        shown = "as coded" if when == "before" else "distilled"
        right.barh(
            [p + offset for p in places],
            lengths,
            xerr=errors,
            error_kw={"ecolor": INK, "capsize": 2, "lw": 1},
            height=0.36,
            color=colour,
            label=shown,
        )
    right.set_yticks([])
    right.set_title("KL to the dense model", fontsize=9)
    left.set_xlabel("nmse", fontsize=8)
    right.set_xlabel(f"nats per token; lines: {CONFIDENCE:.0%} intervals", fontsize=8)
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)


def _margin(seen: Mapping[str, Any]) -> float:
    """Half the interval of the KL; 0 where there is one window."""
    error = seen["kl_stderr"]
    return 0.0 if error is None else Difference(seen["kl"], error, seen["windows"] - 1).margin


def _label(results: Results, key: str) -> str:
    name = results[key]["shown"] + _more_bytes(results, key)
    name = f"calibrated: {name}" if key.startswith("calibrated") else name
    return name.replace(", ", ",\n", 1) if len(name) > 30 else name


def findings(results: Results) -> list[str]:
    """Whether decoders lower the error at equal bytes; what distillation makes of them; the calibrated pair."""
    rest = [key for key in _keys(results, False) if results[key]["equal"] and key != REFERENCE]
    if not rest:
        return ["Did not hold here: no decoder fits into the bytes of the codebooks."]
    base = results[REFERENCE]
    best = min(rest, key=lambda key: results[key]["nmse"])
    gain = 1 - results[best]["nmse"] / base["nmse"]
    sentences = [
        (
            f"At equal stored bytes the claim {'held' if gain > _LEAST else 'did not hold'}: the best decoder "
            f"({results[best]['shown']}) has an nmse of {number(results[best]['nmse'], 4)}, spending the bytes "
            f"on codewords alone {number(base['nmse'], 4)}: {_percent(gain)}, from one training of each. Training "
            f"lowers the error of its sample by {_learned(results, rest)}; the rest is what fewer codewords cost."
        ),
        *(_best_words(results, rest, when) for when in ("before", "after")),
    ]
    return [*sentences, *_about_shared(results), *_about_calibrated(results)]


def _learned(results: Results, keys: list[str]) -> str:
    """By how much training lowers the nmse of the sample with decoders, least to most."""
    shares = [100 * (1 - results[key]["trained_nmse"] / results[key]["start_nmse"]) for key in keys]
    return f"{number(min(shares), 2)} to {number(max(shares), 2)} %"


def _best_words(results: Results, rest: list[str], when: str) -> str:
    """The lowest divergence with a decoder beside that without."""
    words = "As coded" if when == "before" else "After distillation"
    finite = [key for key in rest if _finite(results, key, when)]
    if not finite or not _finite(results, REFERENCE, when):
        return f"{words} the KL is not finite with decoders, or without; nothing is compared."
    best = min(finite, key=lambda key: results[key][when]["kl"])
    own, base = results[best][when], results[REFERENCE][when]
    return (
        f"{words} the lowest KL with a decoder, of {len(finite)} ways tried, is that of {results[best]['shown']}, "
        f"{_kl(own)}; without {_kl(base)}: "
        f"{_kl_apart(own, base).told()}. Perplexity {number(own['perplexity'], 4)} and "
        f"{number(base['perplexity'], 4)}."
    )


def _finite(results: Results, key: str, *whens: str) -> bool:
    return key in results and all(results[key][when]["kl"] is not None for when in whens)


def _percent(gain: float) -> str:
    return f"{number(abs(100 * gain), 2)} % {'lower' if gain > 0 else 'higher'}"


def _about_shared(results: Results) -> list[str]:
    """One codebook for all matrices, with decoders and without."""
    if not all(_finite(results, key, "before", "after") for key in ("none-model", "mlp-matrix")):
        return []
    none, mlp = results["none-model"], results["mlp-matrix"]
    told = "; ".join(
        f"{words} {_kl(mlp[when])} against {_kl(none[when])}, {_kl_apart(mlp[when], none[when]).told()}"
        for when, words in (("before", "KL as coded"), ("after", "distilled"))
    )
    return [
        f"With one codebook for all matrices, a decoder for each ({mlp['decoder_bytes']} bytes more than without) has "
        f"an nmse of {number(mlp['nmse'], 4)} against {number(none['nmse'], 4)} without; {told}."
    ]


def _about_calibrated(results: Results) -> list[str]:
    if not all(_finite(results, key, "before", "after") for key in CALIBRATED):
        return []
    none, mlp = (results[key] for key in CALIBRATED)
    told = "; ".join(
        f"{words} {_kl(mlp[when])} with and {_kl(none[when])} without, "
        f"{_kl_apart(mlp[when], none[when]).told()} (perplexity {number(mlp[when]['perplexity'], 4)} and "
        f"{number(none[when]['perplexity'], 4)})"
        for when, words in (("before", "as coded KL"), ("after", "distilled"))
    )
    more = number(abs(mlp["bpw"] / none["bpw"] - 1) * 100, 2)
    return [
        f"Calibrated, where the indices get fewer bits to pay for the decoders' {mlp['decoder_bytes']} bytes "
        f"({more} % {'more' if mlp['bpw'] > none['bpw'] else 'fewer'} bytes in all with them): {told}."
    ]
