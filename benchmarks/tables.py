"""Write the tables of README.md and docs/*.md from the committed results.

python benchmarks/tables.py            # write
python benchmarks/tables.py --check    # fail if a table does not match the results
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import table as peers_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/results.md", "docs/loading.md", "docs/peers.md")


def _load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def presets() -> str:
    """Size and perplexity of every preset beside the dense model."""
    found = _load("presets")
    rows = [["dense (bf16)", "16", "", f"{found['dense']['bytes_on_disk'] / 1e6:.1f}", "1 / 2", "", ""]]
    rows[0][5] = f"{found['dense']['perplexity']:.2f}"
    for name, entry in found["presets"].items():
        rows.append(
            [
                f"`{name}`",
                f"{entry['bpw_matrices']:.2f}",
                f"{entry['nmse_blocks']:.4f}",
                f"{entry['bytes_on_disk'] / 1e6:.1f}",
                f"{entry['ratio_files_bf16']:.2f} / {entry['ratio_files_fp32']:.2f}",
                _perplexity(entry["perplexity"]),
                f"{entry['seconds']:.0f}",
            ]
        )
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
    return f"{_table(head, rows)}\n\n{note}"


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def codec_floor() -> str:
    """nmse of the codecs against k-means."""
    found = _load("codec_floor")
    parts = []
    for entry in found["sizes"]:
        head = ["kind", "k-means nmse", *entry["codecs"]]
        rows = [
            [
                f"`{kind}`",
                f"{nmse:.4f}",
                *(
                    f"{c['nmse'][kind]:.4f} ({c['ratio_to_kmeans'][kind]:.3f}x)"
                    for c in entry["codecs"].values()
                ),
            ]
            for kind, nmse in entry["kmeans"].items()
        ]
        use = ["least utilization", ""] + [f"{c['least_utilization']:.2%}" for c in entry["codecs"].values()]
        parts.append(
            f"d = {entry['vector_len']}, K = {entry['codebook_size']}, one codebook per kind:\n\n"
            + _table(head, [*rows, use])
        )
    return "\n\n".join([*parts, f"`{found['command']}`"])


def loading() -> str:
    """Time and memory of the loading modes."""
    found = _load("loading")
    rows = []
    base = found["medians"]["nothing"]["base_mib"]
    reference = found["medians"]["bf16 checkpoint"]
    for mode, entry in found["medians"].items():
        if mode == "nothing":
            continue
        rows.append(
            [
                mode,
                f"{entry['load_seconds']:.1f}",
                f"{entry['peak_after_load_mib'] - base:.0f}",
                f"{entry['peak_mib'] - base:.0f}",
                f"{entry['seconds_2_windows'] / reference['seconds_2_windows']:.2f}x",
                f"{entry['tokens_per_second'] / reference['tokens_per_second']:.2f}x",
            ]
        )
    head = ["", "load, seconds", "peak after load, MiB", "peak, MiB", "time a window", "generation speed"]
    note = (
        f"SmolLM2-135M, default preset, {found['dtype']}; MiB above a process that loaded nothing "
        f"({base:.0f} MiB); times against the dense bf16 checkpoint in the same run; medians. "
        f"`{found['command']}`"
    )
    return f"{_table(head, rows)}\n\n{note}"


def peers() -> str:
    """Peer quantizers and ours on one model."""
    found = _load("peers")
    note = (
        f"SmolLM2-135M; {found['text']}, context {found['context']}, first {found['windows']} windows, "
        f"evaluated in {found['dtype']}; {found['machine']['processor']}, {found['machine']['threads']} "
        f"threads. `{found['command']}`"
    )
    return f"{_table(*peers_table.rows(found))}\n\n{note}"


def peer_bits() -> str:
    """What the peers' names say, and what they store."""
    return _table(*peers_table.fallbacks(_load("peers")))


TABLES: dict[str, Callable[[], str]] = {
    "presets": presets,
    "codec_floor": codec_floor,
    "loading": loading,
    "peers": peers,
    "peer_bits": peer_bits,
}


def filled(page: str) -> str:
    """The page with every `<!-- NAME:begin -->` ... `<!-- NAME:end -->` filled in."""
    for name, make in TABLES.items():
        pattern = re.compile(f"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        if pattern.search(page):
            body = make()
            page = pattern.sub(lambda m, body=body: f"{m[1]}{body}\n{m[2]}", page)
    return page


def main() -> int:
    """Write, or with --check compare."""
    stale = []
    for name in PAGES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(after, encoding="utf-8")
    if "--check" in sys.argv and stale:
        print(f"tables differ from the results in {', '.join(stale)}; run python benchmarks/tables.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
