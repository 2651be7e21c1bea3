"""Tables of the peers, for tables.py."""

from __future__ import annotations

from typing import Any

from common import GEMMA
from pages import load_results, markdown_table, optional_results
from peers import table


def peers() -> str:
    """Peer quantizers and ours on one model."""
    found, gemma = load_results("peers"), optional_results(GEMMA.results("peers"))
    note = (
        f"SmolLM2-135M; {found['text']}, context {found['context']}, first {found['windows']} windows, "
        f"evaluated in {found['dtype']}; {found['machine']['processor']}, {found['machine']['cores']} "
        f"cores. `{found['command']}`"
    )
    head, rows = table.rows(found)
    if gemma is not None:
        other = {row[0]: row[1:4] for row in table.rows(gemma)[1]}
        head = [*head, "Gemma: bpw", "Gemma: perplexity", "Gemma: KL, nats"]
        rows = [[*row, *other.get(row[0], [""] * 3)] for row in rows]
        note += (
            f". Gemma: {GEMMA.title} (`{gemma['model']}`), the same text, first {gemma['windows']} windows. "
            f"`{gemma['command']}`"
        )
    return f"{markdown_table(head, rows)}\n\n{note}"


_HEADLINE = (
    "AutoRound W3 g64",
    "GPTQModel W3 g64",
    "llama.cpp Q3_K_M, imatrix",
    "AutoRound W2 g32",
    "llama.cpp IQ2_XXS, imatrix",
)


def headline() -> str:
    """A few peers and ours, before and after recovery, by falling bits."""
    found, recovered = load_results("peers"), load_results("recovery")
    rows = []
    for entry in found["settings"].values():
        ours = entry["peer"] == "pocketllm"
        if "failure" in entry or not (ours or entry["title"] in _HEADLINE):
            continue
        title = f"**{entry['title']}**" if ours else entry["title"]
        rows.append((entry["bpw"], title, entry["perplexity"], entry["kl_nats"], entry["name"]))
    for base in recovered["bases"].values():
        run = base["runs"].get("distill")
        if run is not None:
            title = f"**PocketLLM, {base['bpw_blocks']:.2f}, distilled**"
            rows.append((base["bpw_blocks"], title, run["perplexity"], run["kl"], ""))
    rows.sort(key=lambda row: (-row[0], -row[2]))
    gemma = load_results(GEMMA.results("peers"))
    shown = [
        [title, f"{bpw:.2f}", f"{ppl:.2f}", f"{kl:.3f}", *_of_gemma(gemma["settings"].get(name))]
        for bpw, title, ppl, kl, name in rows
    ]
    dense = ["dense (bf16)", "16", f"{recovered['dense_perplexity']:.2f}", "0"]
    dense += ["16", f"{gemma['dense']['perplexity']:.2f}", "0"]
    note = (
        f"SmolLM2-135M; {found['text']}, context {found['context']}, first {found['windows']} windows, evaluated in "
        "bf16. bpw: every stored bit of the blocks' linear layers, per weight; embedding and head are dense in every "
        f"row. Gemma: {GEMMA.title}, first {gemma['windows']} windows; dense weights of a Q4_K_M file, which favours "
        f"llama.cpp; empty: not measured. `{found['command']}`, "
        f"`{recovered['command']}`"
    )
    head = ["setting", "bpw", "perplexity", "KL to dense, nats"]
    head += ["Gemma: bpw", "Gemma: perplexity", "Gemma: KL"]
    return f"{markdown_table(head, [dense, *shown])}\n\n{note}"


def _of_gemma(entry: dict[str, Any] | None) -> list[str]:
    """Bits, perplexity and divergence of a setting on Gemma; empty where it was not measured."""
    if entry is None:
        return ["", "", ""]
    return [f"{entry['bpw']:.2f}", f"{entry['perplexity']:.2f}", f"{entry['kl_nats']:.3f}"]


def peer_bits() -> str:
    """What the peers' names say, and what they store."""
    gemma = optional_results(GEMMA.results("peers"))
    head, rows = table.fallbacks(load_results("peers"))
    if gemma is not None:
        rows += [[f"{GEMMA.title}: {row[0]}", *row[1:]] for row in table.fallbacks(gemma)[1]]
    return markdown_table(head, rows)


def peers_paired() -> str:
    """Time and memory of a peer and ours, run one after the other."""
    found = load_results("peers_paired")
    titles = {name: entry["title"] for name, entry in load_results("peers")["settings"].items()}
    machine = found["machine"]
    note = (
        f"{machine['processor']}, {machine['threads']} threads; "
        f"{found['repeats']} paired run{'s, medians' if found['repeats'] > 1 else ''}. `{found['command']}`"
    )
    return f"{markdown_table(*table.paired(found, titles))}\n\n{note}"
