"""Tables of size against quality: presets, and calibrated compression at several targets."""

from __future__ import annotations

from typing import Any

from common import GEMMA, SMOLLM2, Subject
from pages import load_results, markdown_table, optional_results
from peers.table import number


def presets() -> str:
    """Size and perplexity of every preset beside the dense model."""
    found, gemma = load_results("presets"), optional_results(GEMMA.results("presets"))
    rows = [["dense (bf16)", "16", "", *_sizes(found["dense"]), f"{found['dense']['perplexity']:.2f}", ""]]
    for name, entry in found["presets"].items():
        kept = f"{entry['bpw_matrices']:.2f}", f"{entry['nmse_blocks']:.4f}", *_sizes(entry)
        rows.append([f"`{name}`", *kept, number(entry["perplexity"]), f"{entry['seconds']:.0f}"])
    head = [
        "preset",
        "bpw",
        "nmse (blocks)",
        "MB on disk",
        "files smaller, bf16 / fp32",
        "perplexity",
        "seconds",
    ]
    note = (
        f"SmolLM2-135M; {found['text']}, context {found['context']}, first {found['windows']} windows, "
        f"evaluated in {found['dtype']}; MB are 10^6 bytes of all files; {found['machine']['processor']}, "
        f"{found['machine']['threads']} threads. `{found['command']}`"
    )
    if gemma is not None:
        entries = {"dense (bf16)": gemma["dense"]} | {f"`{k}`": v for k, v in gemma["presets"].items()}
        head, rows = _beside(head, rows, entries, _GEMMA_HEAD[:3])
        note += f". {_gemma_note(gemma)}"
    return f"{markdown_table(head, rows)}\n\n{note}"


def _sizes(entry: dict[str, Any]) -> tuple[str, str]:
    ratios = "1 / 2"  # the dense model
    if "ratio_files_bf16" in entry:
        ratios = f"{entry['ratio_files_bf16']:.2f} / {entry['ratio_files_fp32']:.2f}"
    return f"{entry['bytes_on_disk'] / 1e6:.1f}", ratios


_GEMMA_HEAD = ["Gemma: MB", "Gemma: files smaller, bf16", "Gemma: perplexity", "Gemma: KL, nats"]


def _beside(
    head: list[str], rows: list[list[str]], entries: dict[str, dict[str, Any]], columns: list[str]
) -> tuple[list[str], list[list[str]]]:
    """The table with the columns of the second model added; empty where a row was not measured on it."""
    wider = []
    for row in rows:
        entry = entries.get(row[0])
        cells = [""] * len(columns)
        if entry is not None:
            mb, ratio = _sizes(entry)
            kl = f"{entry['kl']:.3f}" if "kl" in entry else ""
            cells = [mb, ratio.partition(" ")[0], number(entry["perplexity"]), kl][: len(columns)]
        wider.append([*row, *cells])
    return [*head, *columns], wider


def _gemma_note(found: dict[str, Any]) -> str:
    return (
        f"Gemma: {GEMMA.title} (`{found['model']}`, its dense weights are those of a GGUF file in Q4_K_M), the same "
        f"text, first {found['windows']} windows, {found['dtype']}. `{found['command']}`"
    )


_CALIBRATED_HEAD = [
    "setting",
    "bpw of blocks",
    "MB on disk",
    "files smaller, bf16 / fp32",
    "perplexity",
    "proxy error",
    "seconds",
    "peak GB",
]


def _calibrated_row(name: str, entry: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{entry['bpw_blocks']:.2f}",
        *_sizes(entry),
        number(entry["perplexity"]),
        f"{entry['proxy_error_blocks']:.4f}",
        f"{entry['seconds']:.0f}",
        f"{entry['peak_memory_bytes'] / 1e9:.1f}",
    ]


def calibrated() -> str:
    """Calibrated compression at several targets."""
    found, gemma = load_results("calibrated"), optional_results(GEMMA.results("calibrated"))
    rows = [["dense (bf16)", "16", "272.6", "1 / 2", f"{found['dense_perplexity']:.2f}", "", "", ""]]
    rows += [_calibrated_row(f"blocks at {e['named_bits']}", _beside_peers(e)) for e in ours()]
    rows += [_calibrated_row(n, e) for n, e in found["settings"].items() if n.startswith("everything")]
    note = (
        "SmolLM2-135M; 'blocks': embedding and head left in bf16; 'everything': compressed as well. "
        f"{found['text']}, context {found['context']}, first {found['windows']} windows, evaluated in "
        f"{found['dtype']}; calibrated on {found['calibration']}; {found['machine']['processor']}, "
        f"{found['machine']['cores']} cores, shared with other work, so seconds cannot be compared between "
        f"rows. `{found['command']}`; blocks: "
        "`python benchmarks/peers/run.py`"
    )
    head = _CALIBRATED_HEAD
    if gemma is not None:
        dense = {"bytes_on_disk": _dense_bytes(gemma), "perplexity": gemma["dense_perplexity"], "kl": 0.0}
        blocks = {f"blocks at {e['named_bits']}": _beside_peers(e) for e in ours(GEMMA)}
        head, rows = _beside(head, rows, {"dense (bf16)": dense, **blocks, **gemma["settings"]}, _GEMMA_HEAD)
        note += f". {_gemma_note(gemma)}"
    return f"{markdown_table(head, rows)}\n\n{note}"


def _dense_bytes(found: dict[str, Any]) -> float:
    """Bytes of the dense model in bf16, from a model that is so many times smaller."""
    entry = next(iter(found["settings"].values()))
    return float(entry["bytes_on_disk"] * entry["ratio_files_bf16"])


def ours(subject: Subject = SMOLLM2) -> list[dict[str, Any]]:
    """Our settings among the peers'."""
    found = optional_results(subject.results("peers")) or {"settings": {}}
    return [e for e in found["settings"].values() if e["peer"] == "pocketllm" and "failure" not in e]


def _beside_peers(entry: dict[str, Any]) -> dict[str, Any]:
    """A setting that ran beside the peers, as `_calibrated_row` wants it."""
    peak = entry["peak_mib"] * 2**20
    more = {"bpw_blocks": entry["bpw"], "peak_memory_bytes": peak, "kl": entry["kl_nats"]}
    return {**entry, **entry["as_run"], **more}


def ablations() -> str:
    """One choice changed at a time, at 2.05 and 3.05 bits per weight of the blocks."""
    found = load_results("calibrated")["settings"]
    rows = []
    for bits in (2.05, 3.05):
        default = [_beside_peers(e) for e in ours() if e["named_bits"] == bits]
        rows += [_calibrated_row(f"{bits}, default", entry) for entry in default]
        rows += [_calibrated_row(n, e) for n, e in found.items() if n.startswith(f"{bits}, ")]
    shown = len(_CALIBRATED_HEAD) - 2  # not seconds and memory: these ran beside other work
    note = "`python benchmarks/calibrated.py`; the default: `python benchmarks/peers/run.py`"
    return f"{markdown_table(_CALIBRATED_HEAD[:shown], [row[:shown] for row in rows])}\n\n{note}"
