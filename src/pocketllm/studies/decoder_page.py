"""What is made of the results of the study `decoder`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pocketllm.studies.study import Results, Table
from pocketllm.studies.style import COLOURS, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCE = "none-kind"


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
                values["shown"] + ("" if values["equal"] else " (fewer bytes)"),
                str(values["codewords"]),
                f"{values['codebook_bytes']} + {values['decoder_bytes']}",
                number(values["bpw"], 5),
                number(values["nmse"], 4),
                number(values["trained_nmse"], 4),
                number(before["kl"]),
                number(before["perplexity"], 4),
                number(after["kl"]),
                number(after["perplexity"], 4),
            ]
        )
    header = [
        *("decoder", "K", "bytes of codebooks + decoders", "bpw", "nmse", "nmse of the sample, trained"),
        *("KL", "perplexity", "KL, distilled", "perplexity, distilled"),
    ]
    first = results[keys[0]]
    before, distilled, config = first["before"], first["distilled"], first["config"]
    note = (
        f"{config['blocks']} blocks coded. nmse: of the stored matrices; beside it that of the sample at the end "
        "of training, which is kept only if no matrix got worse by it. KL to the dense model in nats per token; "
        f"{before['windows']} windows of {before['context']} tokens, dense perplexity "
        f"{number(before['reference_perplexity'], 4)}. Distilled for {distilled['steps']} steps of "
        f"{config['batch']} x {config['context']} tokens."
    )
    return Table(title, header, rows, note)


def draw(results: Results, figure: Figure) -> None:
    figure.set_size_inches(9, 4.8)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    keys = list(results)[::-1]
    names = [_label(key, results[key]) for key in keys]
    left.barh(names, [results[key]["nmse"] for key in keys], color=COLOURS[0], height=0.6)
    left.set_title("nmse of the coded matrices", fontsize=9)
    places = range(len(keys))
    for offset, when, colour in ((0.18, "before", COLOURS[1]), (-0.18, "after", COLOURS[2])):
        lengths = [results[key][when]["kl"] for key in keys]
        shown = "as coded" if when == "before" else "distilled"
        right.barh([p + offset for p in places], lengths, height=0.36, color=colour, label=shown)
    right.set_yticks([])
    right.set_title("KL to the dense model, nats per token", fontsize=9)
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)


def _label(key: str, values: Mapping[str, Any]) -> str:
    name = values["shown"] + ("" if values["equal"] else " (fewer bytes)")
    name = f"calibrated: {name}" if key.startswith("calibrated") else name
    return name.replace(", ", ",\n", 1) if len(name) > 30 else name


def findings(results: Results) -> list[str]:
    plain = [key for key in _keys(results, False) if results[key]["equal"]]
    rest = [key for key in plain if key != REFERENCE]
    base = results[REFERENCE]
    best = min(rest, key=lambda key: results[key]["nmse"])
    tuned = min(rest, key=lambda key: results[key]["after"]["kl"])
    gain = 1 - results[best]["nmse"] / base["nmse"]
    held = gain > 0.01
    sentences = [
        (
            f"At equal stored bytes the claim {'held' if held else 'did not hold'}: the best decoder "
            f"({results[best]['shown']}) has an nmse of {number(results[best]['nmse'], 4)}, spending the bytes "
            f"on codewords alone {number(base['nmse'], 4)}: {_percent(gain)}."
        ),
        (
            f"After distillation the best with a decoder is {results[tuned]['shown']}: KL "
            f"{number(results[tuned]['after']['kl'])} against {number(base['after']['kl'])} without "
            f"({_percent(1 - results[tuned]['after']['kl'] / base['after']['kl'])}); as coded they had "
            f"{number(results[tuned]['before']['kl'])} and {number(base['before']['kl'])}."
        ),
    ]
    sentences += _about_shared(results)
    sentences += _about_calibrated(results)
    return sentences


def _percent(gain: float) -> str:
    return f"{number(abs(100 * gain), 2)} % {'lower' if gain > 0 else 'higher'}"


def _about_shared(results: Results) -> list[str]:
    """One codebook for all matrices, with decoders and without."""
    if "none-model" not in results:
        return []
    none = results["none-model"]
    words = []
    for key in ("affine-model", "mlp-matrix"):
        if key in results:
            values = results[key]
            words.append(
                f"{values['shown']} ({values['decoder_bytes']} bytes more) {number(values['nmse'], 4)}, KL "
                f"{number(values['before']['kl'])} and distilled {number(values['after']['kl'])}"
            )
    return [
        f"With one codebook for all matrices and no decoder the nmse is {number(none['nmse'], 4)} and the KL "
        f"{number(none['before']['kl'])}, distilled {number(none['after']['kl'])}; " + "; ".join(words) + "."
    ]


def _about_calibrated(results: Results) -> list[str]:
    keys = ("calibrated-none", "calibrated-mlp")
    if not set(keys) <= set(results):
        return []
    none, mlp = (results[key] for key in keys)
    gain = 1 - mlp["after"]["kl"] / none["after"]["kl"]
    return [
        f"Calibrated, the decoders change nothing before they are tuned (KL {number(none['before']['kl'])} "
        f"without, {number(mlp['before']['kl'])} with); distilled, {number(none['after']['kl'])} without and "
        f"{number(mlp['after']['kl'])} with {mlp['decoder_bytes']} bytes of them: {_percent(gain)}."
    ]
