"""What is made of the results of the study `overhead`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from pocketllm.studies.probe import DENSE
from pocketllm.studies.study import Results, Table
from pocketllm.studies.style import COLOURS, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODES = {"dense": "decoded at load", "packed": "packed"}
_MEASURED = ("load", "first", "long", "token")


def _rounds(results: Results, device: str) -> list[Mapping[str, Any]]:
    return [values for key, values in results.items() if key.startswith(f"{device}-")]


def _middle(rounds: Sequence[Mapping[str, Any]], job: str, key: str) -> float:
    return float(median(values["runs"][job][key] for values in rounds))


def _ratio(results: Results, device: str, job: str, what: str) -> float:
    """Of a job to the dense checkpoint: median over the rounds of the ratio in each.

    what: of `_MEASURED`, then of processor time on the CPU, of time on the GPU; or a whole key.
    """
    clock = "seconds" if device == "cuda" else "cpu_seconds"
    key = f"{what}_{clock}" if what in _MEASURED else what
    runs = [values["runs"] for values in _rounds(results, device)]
    return float(median(run[job][key] / run[DENSE][key] for run in runs))


def _devices(results: Results) -> list[str]:
    return [device for device in ("cpu", "cuda") if _rounds(results, device)]


def _forms_of(results: Results) -> list[str]:
    return [key.removeprefix("form-") for key in results if key.startswith("form-")]


def tables(results: Results) -> list[Table]:
    return [_flops_table(results), *(_measured_table(results, device) for device in _devices(results))]


def _flops_table(results: Results) -> Table:
    rows = []
    for name in _forms_of(results):
        values = results[f"form-{name}"]
        flops = values["flops"]
        parts = [number(flops[part] / 1e6) for part in ("networks", "scales", "rotation")]
        tokens = number(values["decode_flops"] / flops["one token"])
        megabytes = [number(values[key] / 1e6, 4) for key in ("bytes_on_disk", "dense_bytes")]
        rows.append([name, *parts, number(flops["one token"] / 1e6), tokens, *megabytes])
    header = ["form", "networks", "scales", "rotation", "one token", "decoding in tokens", "MB", "MB in bf16"]
    note = (
        "Millions of floating point operations to decode every matrix once, and to multiply one token with "
        "them; decoding in tokens: the one over the other. MB are 10^6 bytes on disk. "
        "Formula: `pocketllm.studies.overhead.decode_flops`."
    )
    return Table("Operations", header, rows, note)


def _measured_table(results: Results, device: str) -> Table:
    rounds, rows = _rounds(results, device), []
    values = rounds[0]
    for job in values["runs"]:
        seconds = [number(_middle(rounds, job, f"{what}_seconds")) for what in _MEASURED]
        ratios = [f"{number(_ratio(results, device, job, what))}x" for what in _MEASURED]
        shown = [f"{second} ({ratio})" for second, ratio in zip(seconds, ratios, strict=True)]
        memory = [number(_middle(rounds, job, key) / 2**20) for key in ("loaded_bytes", "peak_bytes")]
        rows.append([job, *shown, number(1 / _middle(rounds, job, "token_seconds")), *memory])
    header = [
        *("", "load, s", "first token, s", f"after {values['long']} tokens, s", "each token, s", "tokens/s"),
        *("MiB loaded", "MiB at most"),
    ]
    by = "" if device == "cuda" else "processor time, which other work on the machine changes little, "
    note = (
        f"Medians of {len(rounds)}, each in a process of its own, in turn; in brackets {by}over that of the "
        f"dense checkpoint in the same round. First token: after a prompt of {values['short']} tokens, the first "
        "call after loading; then the first token after a long prompt; then each token that follows, batch 1. "
        "Memory: most that was held until the model was loaded and until the end, beyond the process before it."
    )
    where = f"GPU ({values['gpu']})" if device == "cuda" else "CPU"
    return Table(f"Measured on the {where}", header, rows, note)


def draw(results: Results, figure: Figure) -> None:
    devices = _devices(results)
    figure.set_size_inches(9, 3.6 * len(devices))
    grid = figure.subplots(len(devices), 4, squeeze=False)
    for row, device in zip(grid, devices, strict=True):
        rounds = _rounds(results, device)
        jobs = list(rounds[0]["runs"])[::-1]
        shown = (
            ("load", "load"),
            (f"prompt of {rounds[0]['long']} tokens", "long"),
            ("each token", "token"),
            ("peak memory", "peak_bytes"),
        )
        for axes, (title, what) in zip(row, shown, strict=True):
            _bars(axes, [_ratio(results, device, job, what) for job in jobs], jobs)
            axes.set_title(f"{title}{' (GPU)' if device == 'cuda' else ''}", fontsize=9)
            axes.set_xlabel("times dense", fontsize=8)
        for axes in row[1:]:
            axes.set_yticklabels([])


def _bars(axes: Any, numbers: Sequence[float], jobs: Sequence[str]) -> None:
    colours = [COLOURS[0] if j == DENSE else COLOURS[1] if "packed" in j else COLOURS[2] for j in jobs]
    axes.barh(range(len(jobs)), numbers, color=colours)
    axes.set_yticks(range(len(jobs)), jobs, fontsize=8)
    axes.set_xlim(0, 1.35 * max(numbers))
    axes.tick_params(labelsize=8)
    for place, value in enumerate(numbers):
        axes.text(value, place, f" {number(value)}", va="center", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def findings(results: Results) -> list[str]:
    words = [_summary(results)]
    for device in _devices(results):
        words += [_finding(results, device, name) for name in _forms_of(results)]
    cost = {name: results[f"form-{name}"] for name in _forms_of(results)}
    tokens = {name: v["decode_flops"] / v["flops"]["one token"] for name, v in cost.items()}
    listed = ", ".join(f"{name} {number(value)}" for name, value in tokens.items())
    words.append(
        "By count of operations, decoding every matrix once costs as much as this many tokens of a forward "
        f"pass: {listed}. In the published form (row) the networks run for every subvector; in the look-up "
        "form they run once for every codeword."
    )
    return words


def _summary(results: Results) -> str:
    """What holds for all forms on the CPU."""

    def span(mode: str, what: str) -> str:
        found = [_ratio(results, "cpu", f"{name}, {mode}", what) for name in _forms_of(results)]
        return " to ".join(dict.fromkeys(number(value, 2) for value in (min(found), max(found))))

    once, packed = MODES.values()
    return (
        f"Beside dense weights, decoding once at load costs {span(once, 'load')} times the load, and then "
        f"{span(once, 'token')} times the work for a token, from layers that are the same as dense ones: what differs "
        f"is the measurement. Kept packed, the model needs "
        f"{span(packed, 'peak_bytes')} times the memory and {span(packed, 'token')} times the work for a token; "
        f"for a prompt of {_rounds(results, 'cpu')[0]['long']} tokens {span(packed, 'long')} times."
    )


def _finding(results: Results, device: str, name: str) -> str:
    rounds, (once, packed) = _rounds(results, device), MODES.values()

    def ratio(mode: str, what: str) -> str:
        return number(_ratio(results, device, f"{name}, {mode}", what), 2)

    loads = [number(_middle(rounds, job, "load_seconds")) for job in (f"{name}, {once}", DENSE)]
    return (
        f"{'GPU' if device == 'cuda' else 'CPU'}, {name}: loading and decoding takes {loads[0]} s (dense weights "
        f"{loads[1]} s), then a token costs {ratio(once, 'token')} times what it costs with dense weights; packed, "
        f"a token costs {ratio(packed, 'token')} times, a prompt of {rounds[0]['long']} tokens "
        f"{ratio(packed, 'long')} times, and the peak of memory is {ratio(packed, 'peak_bytes')} times the dense "
        "one."
    )
