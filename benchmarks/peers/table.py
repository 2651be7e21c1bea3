"""The tables of docs/peers.md, from the committed results; benchmarks/tables.py puts them there."""

from __future__ import annotations

from typing import Any


def rows(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): one for the dense model, one for each setting that ran."""
    head = ["setting", "bpw", "perplexity", "KL, nats", "seconds", "CPU seconds", "peak MiB"]
    dense = found["dense"]
    lines = [["dense (bf16)", "16", f"{dense['perplexity']:.2f}", "0", "", "", ""]]
    for entry in ran(found):
        lines.append(
            [
                entry["title"],
                f"{entry['bpw']:.2f}",
                number(entry["perplexity"]),
                f"{entry['kl_nats']:.3f}",
                f"{entry['seconds']:.0f}",
                f"{entry['cpu_seconds']:.0f}",
                f"{entry['peak_mib']:.0f}",
            ]
        )
    return head, lines


def fallbacks(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): what a setting's name says, what is stored, and in which formats."""
    lines = []
    for entry in ran(found):
        if entry["peer"] == "pocketllm":
            continue
        formats = sorted(entry["formats"].items(), key=lambda item: -item[1]["weights"])
        parts = [
            f"{name}: {kind['weights'] / entry['weights']:.0%} of the weights at "
            f"{kind['stored_bits'] / kind['weights']:.2f}"
            for name, kind in formats
        ]
        more = f"+{entry['bpw'] - entry['named_bits']:.2f}"
        lines.append(
            [entry["title"], f"{entry['named_bits']:g}", f"{entry['bpw']:.2f}", more, "; ".join(parts)]
        )
    return ["setting", "nominal bits", "stored bpw", "difference", "stored as"], lines


def paired(found: dict[str, Any], titles: dict[str, str]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): the medians of the peer and of ours, then ours over the peer's.

    Args:
        titles: of all settings, by name.
    """
    lines = [
        [titles[name], f"{m['seconds']:.0f}", f"{m['cpu_seconds']:.0f}", f"{m['peak_mib']:.0f}"]
        for name, m in found["medians"].items()
    ]
    over = [f"{found['ratios'][key]:.2f}" for key in ("seconds", "cpu_seconds", "peak_mib")]
    return ["setting", "seconds", "CPU seconds", "peak MiB"], [*lines, ["PocketLLM / AutoRound", *over]]


def ran(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings that did not fail, in the order of settings.py."""
    return [entry for entry in found["settings"].values() if "failure" not in entry]


def number(value: float) -> str:
    """A perplexity, to read."""
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"
