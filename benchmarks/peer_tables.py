"""Tables of the peers, for tables.py."""

from __future__ import annotations

from pages import load_results, markdown_table
from peers import table


def peers() -> str:
    """Peer quantizers and ours on one model."""
    found = load_results("peers")
    note = (
        f"SmolLM2-135M; {found['text']}, context {found['context']}, first {found['windows']} windows, "
        f"evaluated in {found['dtype']}; {found['machine']['processor']}, {found['machine']['cores']} "
        f"cores. `{found['command']}`"
    )
    return f"{markdown_table(*table.rows(found))}\n\n{note}"


def peer_bits() -> str:
    """What the peers' names say, and what they store."""
    return markdown_table(*table.fallbacks(load_results("peers")))


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
