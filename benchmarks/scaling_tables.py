"""Tables of docs/scaling.md, for tables.py."""

from __future__ import annotations

import scaling
from pages import load_results, markdown_table


def scaling_runs() -> str:
    """Processor seconds of the busiest rank, measured and predicted, with 1, 2 and 4 processes."""
    found, checked = load_results("scaling_runs"), scaling.check()
    single = found["runs"]["1"]["busiest_seconds"]
    rows = []
    for name in (*single, "all"):
        first = sum(single.values()) if name == "all" else single[name]
        pairs = [checked[size][name] for size in ("2", "4")]
        cells = [f"{pair['measured']:.2f} ({pair['predicted']:.2f})" for pair in pairs]
        rows.append([name, f"{first:.2f}", *cells])
    sent = [checked[size]["bytes exchanged"] for size in ("2", "4")]
    peak = {size: max(r["peak_memory_bytes"] for r in run["ranks"]) for size, run in found["runs"].items()}
    exchanged = [f"{pair['measured'] / 1e6:.0f} ({pair['predicted'] / 1e6:.0f})" for pair in sent]
    rows.append(["MB exchanged by a rank", "0", *exchanged])
    rows.append(["peak memory, MB", *(f"{value / 1e6:.0f}" for value in peak.values())])
    head = ["seconds: measured (predicted)", "1 process", "2 processes", "4 processes"]
    shape = found["model"]
    note = (
        f"{shape['num_hidden_layers']} blocks of width {shape['hidden_size']}, {found['settings']['tokens']} tokens; "
        f"{found['machine']['processor']}, {found['machine']['cores']} cores. `{found['command']}`"
    )
    return f"{markdown_table(head, rows)}\n\n{note}"


def stage_time() -> str:
    """Processor seconds of a compression by stage, and within encoding by function."""
    found = load_results("stage_time")
    stages, functions = found["cpu_seconds_by_stage"], found["cpu_seconds_of_encode"]
    total = sum(stages.values())
    rest = stages["encode"] - sum(functions.values())
    within = sorted(functions.items(), key=lambda item: -item[1])
    shown = [
        ("start, check, write", sum(stages[name] for name in ("start", "check", "write"))),
        ("measure", stages["measure"]),
        ("encode", stages["encode"]),
        *((f"– {name}", seconds) for name, seconds in within),
        ("– other threads of these, targets of the search, row scales", rest),
    ]
    rows = [[name, f"{seconds:.0f}", f"{seconds / total:.0%}"] for name, seconds in shown]
    note = (
        f"SmolLM2-135M at {found['bpw']} bits per weight of the blocks, embedding left dense; parts of encoding: time "
        f"of the thread that ran them. {found['machine']['processor']}, {found['machine']['threads']} threads, shared "
        f"with other work. `{found['command']}`"
    )
    return f"{markdown_table(['stage', 'processor seconds', 'share'], rows)}\n\n{note}"


def scaling_predictions() -> str:
    """Hours, memory, disk and traffic of large models on 1 to 64 GPUs."""
    found, rows = load_results("scaling"), []
    for name, modes in found["models"].items():
        for mode, entries in modes.items():
            parts = entries[0]["disk_bytes"]  # activations are deleted while the Hessians are written
            kept = parts["hessians of outputs"] + parts["units and result"]
            disk = max(parts["activations"], kept)
            most = max(entry["traffic_bytes"] for entry in entries)
            rows.append(
                [
                    *(name, mode, *(f"{entry['hours']:.2g}" for entry in entries)),
                    *(f"{entries[0]['memory_bytes'] / 1e9:.0f}", f"{disk / 1e9:.0f}", f"{most / 1e9:.0f}"),
                ]
            )
    ranks = [str(entry["ranks"]) for entry in entries]
    head = ["model", "blocks", *ranks, "memory of a rank, GB", "disk, GB", "most traffic of a rank, GB"]
    return f"{markdown_table(head, rows)}\n\nHours by number of GPUs; predicted. `{found['command']}`"


def compact_hessians() -> str:
    """Loss of matrices encoded with compact forms of G, over that with G as it is."""
    found = load_results("compact_hessians")
    every = [values for blocks in found["loss_over_that_with_G"].values() for values in blocks.values()]
    rows = [
        [form, f"{mean:.3f}", *(f"{end(values[form] for values in every):.3f}" for end in (min, max))]
        for form, mean in found["mean"].items()
    ]
    head = ["instead of G", "loss, mean", "least", "most"]
    note = f"Blocks {' and '.join(map(str, found['blocks']))} of SmolLM2-135M, 2 bits. `{found['command']}`"
    return f"{markdown_table(head, rows)}\n\n{note}"


def large_plan() -> str:
    """Time and memory of plans."""
    found = load_results("large_plan")
    rows = [
        [
            *(name, f"{entry['dense_bytes'] / 1e9:.0f}", str(entry["matrices"])),
            *(f"{entry['seconds']:.0f}", f"{entry['processor_seconds']:.0f}"),
            f"{entry['peak_memory_bytes'] / 1e6:.0f}",
        ]
        for name, entry in found["models"].items()
    ]
    head = ["model", "dense, GB", "matrices", "seconds", "processor seconds", "peak memory, MB"]
    return f"{markdown_table(head, rows)}\n\n`{found['command']}`"
