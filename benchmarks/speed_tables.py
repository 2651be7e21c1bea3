"""Tables of speed and memory: loading modes, and the server."""

from __future__ import annotations

import statistics
from typing import Any

from pages import load_results, markdown_table


def runtime() -> str:
    """Speed and memory of the loading modes, and of llama.cpp."""
    found = load_results("runtime")
    dense = {run["threads"]: run for run in found["runs"] if run["mode"] == "checkpoint"}
    forms = found["compressed"]
    rows = []
    for run in found["runs"]:
        other = dense[run["threads"]]

        def beside(key: str, digits: int, unit: float = 1, run: Any = run, other: Any = other) -> str:
            return f"{run[key] / unit:.{digits}f} ({run[key] / other[key]:.2f}x)"

        rows.append(
            [
                str(run["threads"]),
                _runtime_name(run, forms),
                f"{run['load_seconds']:.1f}",
                beside("prompt_tokens_per_second", 0),
                beside("tokens_per_second", 1),
                beside("peak_memory_bytes", 0, 1e6),
            ]
        )
    head = ["threads", "", "load, seconds", "prompt tokens/s", "tokens/s", "peak memory, MB"]
    note = (
        "SmolLM2-135M, bfloat16; rows name the bits per weight of blocks and the size on disk; a prompt of 512 tokens; "
        f"64 tokens generated after a prompt of one; in brackets relative to the uncompressed model; memory minus that "
        f"of a process that only imports the libraries; medians of {found['rounds']} processes, run in turn on a "
        f"machine shared with other work. `{found['command']}`"
    )
    return f"{markdown_table(head, rows)}\n\n{note}"


def _runtime_name(run: dict[str, Any], forms: dict[str, Any]) -> str:
    """What a run is called in the table."""
    if run["mode"] == "checkpoint":
        return "not compressed"
    if run["mode"] == "llama.cpp":
        return f"llama.cpp, {run['dtype']}, {run['weights_bytes'] / 1e6:.0f} MB"
    form = forms[run["model"]]
    how = {"packed": "packed", "dense": "decoded at load"}[run["mode"]]
    return f"{form['bpw_blocks']:.2f} bits, {form['bytes_on_disk'] / 1e6:.0f} MB, {how}"


def serving(name: str = "serving") -> str:
    """Throughput of the server by number of requests. name: of the results."""
    found = load_results(name)
    names = {"packed": "packed", "dense": "dense, decoded at load", "checkpoint": "not compressed"}
    numbers = list(found["runs"][0]["tokens_per_second"])
    rows = [
        [
            names[run["mode"]],
            *(_median_and_best(run["tokens_per_second"][n]) for n in numbers),
            f"{run['peak_memory_bytes'] / 1e6:.0f}",
        ]
        for run in found["runs"]
    ]
    head = ["", *(f"{n} request{'s' * (n != '1')}, tokens/s" for n in numbers), "peak memory, MB"]
    form = found["compressed"]
    note = (
        f"SmolLM2-135M at {form['bpw_blocks']:.2f} bits per weight of blocks ({form['bytes_on_disk'] / 1e6:.0f} MB on "
        f"disk), bfloat16, {found['machine']['threads']} threads; {found['new_tokens']} new tokens after a prompt of "
        f"about 25 tokens for each request, all sent at once; new tokens of all requests per second, median and (best) "
        f"of {found['rounds']} rounds, run in turn at a load of {found['load']:.0f}. "
        f"Memory: peak of the processes, including libraries and a key-value cache of "
        f"{found['kv_cache_gb'] * 1000:.0f} MB. `{found['command']}`"
    )
    return f"{markdown_table(head, rows)}\n\n{note}"


def _median_and_best(speeds: list[float]) -> str:
    return f"{statistics.median(speeds):.0f} ({max(speeds):.0f})"
