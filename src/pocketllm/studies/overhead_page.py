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
_MEASURED = ("load_seconds", "first_token_seconds", "long_seconds", "tokens_per_second")


def _rounds(results: Results, device: str) -> list[Mapping[str, Any]]:
    return [values for key, values in results.items() if key.startswith(f"{device}-")]


def _middle(rounds: Sequence[Mapping[str, Any]], job: str, key: str) -> float:
    return float(median(values["runs"][job][key] for values in rounds))


def _ratio(rounds: Sequence[Mapping[str, Any]], job: str, key: str) -> float:
    """Of a job to the dense checkpoint: median over the rounds of the ratio in each."""
    return float(median(values["runs"][job][key] / values["runs"][DENSE][key] for values in rounds))


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
        measured = [number(_middle(rounds, job, key)) for key in _MEASURED]
        memory = [number(_middle(rounds, job, key) / 2**20) for key in ("loaded_bytes", "peak_bytes")]
        share = f"{number(_ratio(rounds, job, 'tokens_per_second'))}x"
        rows.append([job, *measured, share, *memory])
    header = [
        *("", "load, s", "first token, s", f"{values['long']} tokens, s", "tokens/s", "of dense"),
        *("MiB loaded", "MiB at most"),
    ]
    note = (
        f"Medians of {len(rounds)}, each in a process of its own, in turn. First token: of a prompt of "
        f"{values['short']} tokens, the first after loading; then the first token of a long prompt. "
        "tokens/s: single tokens after that, batch 1. Memory: most that was held until the model was loaded "
        "and until the end, beyond the process before it."
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
            ("load, seconds", "load_seconds", 1.0),
            (f"{rounds[0]['long']} tokens, seconds", "long_seconds", 1.0),
            ("tokens a second", "tokens_per_second", 1.0),
            ("peak memory, MiB", "peak_bytes", 2.0**20),
        )
        for axes, (title, key, unit) in zip(row, shown, strict=True):
            _bars(axes, [_middle(rounds, job, key) / unit for job in jobs], jobs)
            axes.set_title(f"{title}{' (GPU)' if device == 'cuda' else ''}", fontsize=9)
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
    rounds = _rounds(results, "cpu")

    def span(mode: str, key: str) -> str:
        found = [_ratio(rounds, f"{name}, {mode}", key) for name in _forms_of(results)]
        return " to ".join(dict.fromkeys(number(value, 2) for value in (min(found), max(found))))

    return (
        f"Decoded once at load the model generates at {span('decoded at load', 'tokens_per_second')} times the "
        f"dense speed, and the price is a load that takes {span('decoded at load', 'load_seconds')} times as "
        f"long. Kept packed, it needs {span('packed', 'peak_bytes')} times the memory, takes "
        f"{span('packed', 'long_seconds')} times as long for a prompt of {rounds[0]['long']} tokens, and "
        f"generates at {span('packed', 'tokens_per_second')} times the speed."
    )


def _finding(results: Results, device: str, name: str) -> str:
    rounds = _rounds(results, device)

    def ratio(mode: str, key: str) -> float:
        return _ratio(rounds, f"{name}, {mode}", key)

    speed = {mode: ratio(mode, "tokens_per_second") for mode in MODES.values()}
    loads = [_middle(rounds, job, "load_seconds") for job in (f"{name}, decoded at load", DENSE)]
    return (
        f"{'GPU' if device == 'cuda' else 'CPU'}, {name}: loading and decoding takes {number(loads[0])} s (dense "
        f"weights {number(loads[1])} s), then tokens come at {number(speed['decoded at load'], 2)} times the dense "
        f"speed; packed, they come at {number(speed['packed'], 2)} times, a prompt of {rounds[0]['long']} tokens "
        f"takes {number(ratio('packed', 'long_seconds'), 2)} times as long, and the peak of memory is "
        f"{number(ratio('packed', 'peak_bytes'), 2)} times the dense one."
    )
