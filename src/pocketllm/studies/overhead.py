"""What decoding costs: floating point operations by formula; time and memory by measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from pocketllm.config import CodecConfig, CompressConfig, preset
from pocketllm.studies import probe
from pocketllm.studies.probe import DENSE
from pocketllm.studies.study import Progress, Results, Setup, Step, Study, Table
from pocketllm.studies.style import COLOURS, number
from pocketllm.studies.whole import calibration_texts, coded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pocketllm.model.layout import Layout

_MODES = {"dense": "decoded at load", "packed": "packed"}
_ROUNDS = 3
_MEASURED = ("load_seconds", "first_token_seconds", "long_seconds", "tokens_per_second")


def decode_flops(layout: Layout) -> dict[str, float]:
    """Floating point operations of decoding every matrix of a model once, by part.

    With d numbers in a subvector, hidden width h, L blocks, R x C weights in a matrix, S subvectors:

        network(d, h, L) = L (4 d h + h) + (L - 1) d      products, GELU as one, residual sums
                         = L (2 d^2 + d) + (L - 1) d      with affine blocks (h = 0)
        look-up form: K network, once for each pair of codebook and decoder; then no more than a copy
        row form:     S (network + (L - 1) 5 d)           five operations a number for the norm
        scales:       R C
        rotation of vectors of length n = 2^a m, m odd:   (a + 2 m [m > 1] + 1) a number, each side

    The multiplication of one token with the decoded matrices takes 2 R C.
    """
    parts = {"networks": 0.0, "scales": 0.0, "rotation": 0.0, "one token": 0.0}
    tables: set[tuple[int, int]] = set()
    for entry in layout.matrices.values():
        codec, book = layout.decoders[entry.decoder].codec, layout.codebooks[entry.codebook]
        weights, d = entry.rows * entry.columns, book.vector_len
        if codec.decoder == "row":
            norm = 0 if codec.norm == "none" else max(0, codec.depth - 1) * 5 * d
            parts["networks"] += entry.rows * -(-entry.columns // d) * (_network_flops(codec) + norm)
        elif (entry.codebook, entry.decoder) not in tables:
            tables.add((entry.codebook, entry.decoder))
            parts["networks"] += book.size * _network_flops(codec)
        parts["scales"] += weights if codec.row_scale else 0
        for seed, size in zip(entry.rotation, (entry.rows, entry.columns), strict=True):
            if seed is not None:
                parts["rotation"] += weights * _rotation_flops(size)
        parts["one token"] += 2 * weights
    return parts


def _network_flops(codec: CodecConfig) -> int:
    """See `decode_flops`."""
    d, h, depth = codec.vector_len, codec.hidden, codec.depth
    block = 4 * d * h + h if h else 2 * d * d + d
    return depth * block + max(0, depth - 1) * d


def _rotation_flops(size: int) -> int:
    """A number of a vector of that length; see `decode_flops`."""
    power = size & -size
    odd = size // power
    return power.bit_length() - 1 + (2 * odd if odd > 1 else 0) + 1


def forms(setup: Setup) -> dict[str, CompressConfig]:
    """Stored forms that decode differently. How well they fit has no part in it, so they are fitted quickly."""
    size = 256 if setup.quick else 4096
    codec = CodecConfig(epochs=0, kmeans_iterations=4, sample_per_codeword=64)
    lookup = CompressConfig(
        codec=codec, vector_len=4, codebook_size=size, codebook_scope="kind", seed=setup.seed
    )
    found = {"lookup": lookup, "row": replace(lookup, codec=replace(codec, decoder="row"))}
    if setup.quick:
        return found
    calibrated = preset("calibrated-10x")
    assert calibrated.calibration is not None
    little = replace(calibrated.calibration, tokens=2048, sensitivity_tokens=512, texts=calibration_texts())
    found["calibrated"] = replace(calibrated, calibration=little, seed=setup.seed)
    return found


def _steps(setup: Setup) -> list[Step]:
    import torch

    steps = [Step(f"form-{name}", partial(_form, setup, name)) for name in forms(setup)]
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        rounds = range(1 if setup.quick else _ROUNDS)
        steps += [Step(f"{device}-{number}", partial(_round, setup, device)) for number in rounds]
    return steps


def _form(setup: Setup, name: str, progress: Progress) -> dict[str, Any]:
    """Code the model in a form; bytes and operations."""
    from pocketllm.model.checkpoint import read_layout, read_report

    folder = coded(setup, name, forms(setup)[name], progress)
    report = read_report(folder)
    flops = decode_flops(read_layout(folder))
    return {
        "flops": flops,
        "decode_flops": sum(flops[part] for part in ("networks", "scales", "rotation")),
        "bytes_on_disk": report["bytes_on_disk"],
        "dense_bytes": report["dense_model_bytes_bf16"],
        "bpw": report["bpw_matrices"],
    }


def _round(setup: Setup, device: str, progress: Progress) -> dict[str, Any]:
    """Every form and mode, each in a process of its own, one after another on the same machine."""
    import torch

    from pocketllm.model.source import resolve

    short, long = (8, 64) if setup.quick else (16, 512)
    long = min(long, _positions(setup) - 1)
    jobs = {DENSE: (resolve(setup.model), DENSE)}
    for name, config in forms(setup).items():
        folder = coded(setup, name, config)
        jobs |= {f"{name}, {shown}": (folder, mode) for mode, shown in _MODES.items()}
    runs: dict[str, dict[str, float]] = {}
    for job, (folder, mode) in jobs.items():
        asked = probe.Probe(
            str(folder), mode, device, torch.get_num_threads(), short, long, 16, 4.0 if setup.quick else 10.0
        )
        runs[job] = probe.run(asked)
        progress(len(runs) / len(jobs))
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"runs": runs, "short": short, "long": long, "gpu": gpu}


def _positions(setup: Setup) -> int:
    return int(getattr(setup.source().model.config, "max_position_embeddings", None) or 1 << 20)


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


def _tables(results: Results) -> list[Table]:
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


def _draw(results: Results, figure: Figure) -> None:
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


def _findings(results: Results) -> list[str]:
    words = []
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


def _finding(results: Results, device: str, name: str) -> str:
    rounds = _rounds(results, device)

    def ratio(mode: str, key: str) -> float:
        return _ratio(rounds, f"{name}, {mode}", key)

    speed = {mode: ratio(mode, "tokens_per_second") for mode in _MODES.values()}
    loads = [_middle(rounds, job, "load_seconds") for job in (f"{name}, decoded at load", DENSE)]
    return (
        f"{'GPU' if device == 'cuda' else 'CPU'}, {name}: loading and decoding takes {number(loads[0])} s (dense "
        f"weights {number(loads[1])} s), then tokens come at {number(speed['decoded at load'], 2)} times the dense "
        f"speed; packed, they come at {number(speed['packed'], 2)} times, a prompt of {rounds[0]['long']} tokens "
        f"takes {number(ratio('packed', 'long_seconds'), 2)} times as long, and the peak of memory is "
        f"{number(ratio('packed', 'peak_bytes'), 2)} times the dense one."
    )


STUDY = Study(
    name="overhead",
    title="what decoding costs at load and at run time",
    claim=(
        "The paper counts the decoder's bytes (768 weights a matrix at d = 8) and leaves its cost at run time "
        "an open question."
    ),
    method=(
        "The model is coded in forms that decode differently: `row` (published: RLN inside the decoder, so "
        "that every subvector goes through it), `lookup` (no norm inside: a table of K rows), and "
        "`calibrated` (look-up of overlapping indices, both sides rotated back). Each is run in two ways: "
        "decoded once at load into ordinary layers, or kept packed and decoded layer by layer in every "
        "forward pass; beside the dense checkpoint, in bf16."
    ),
    steps=_steps,
    tables=_tables,
    draw=_draw,
    findings=_findings,
)
