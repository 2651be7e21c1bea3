"""Tables of docs/loading.md: stages of loading, types of activations, compiled generation."""

from __future__ import annotations

from pages import load_results, markdown_table


def load_time() -> str:
    """Stages of loading, packed and dense."""
    found = load_results("load_time")
    packed, dense = found["runs"]["packed"], found["runs"]["checkpoint"]
    rows = [
        [title, stage["name"], f"{1000 * stage['seconds']:.0f}", f"{stage['bytes'] / 1e6:.0f}"]
        for title, run in (("packed", packed), ("not compressed", dense))
        for stage in run["stages"]
        if stage["name"] != "nothing"
    ]
    for title, run in (("packed", packed), ("not compressed", dense)):
        rows.append([title, "**load**", f"**{1000 * run['seconds']:.0f}**", ""])
        first, peak = 1000 * run["first_token_seconds"], run["peak_bytes"] / 1e6
        rows.append([title, "**load and first token**", f"**{first:.0f}**", f"**{peak:.0f}** (peak)"])
    share = packed["peak_bytes"] / found["weight_file_bytes"]
    note = (
        f"SmolLM2-135M, {found['machine']['threads']} threads; memory is what is resident at the end of a stage, "
        f"beyond the process before loading, and includes pages of mapped files; the peak of the packed model is "
        f"{share:.2f} times its weight file of {found['weight_file_bytes'] / 1e6:.0f} MB. Medians of {found['rounds']} "
        f"processes, in turn. `{found['command']}`"
    )
    return f"{markdown_table(['', 'stage', 'ms', 'memory, MB'], rows)}\n\n{note}"


def activation_types() -> str:
    """KL of rounding activations."""
    found = load_results("activation_types")
    rows = [
        [
            name,
            f"{round(run['kl'], 4) + 0.0:.4f} ± {run['kl_stderr']:.4f}",
            f"{run['perplexity']:.3f}",
            f"{run['top1_agreement']:.1%}",
        ]
        for name, run in found["runs"].items()
    ]
    reference = next(iter(found["runs"].values()))["reference_perplexity"]
    note = (
        f"SmolLM2-135M at {found['bpw_blocks']:.2f} bits per weight of blocks, against the same model decoded in "
        f"float32 (perplexity {reference:.3f}); {found['text']}, context {found['context']}, first "
        f"{found['windows']} windows. `{found['command']}`"
    )
    head = ["weights, activations", "KL, nats", "perplexity", "top-1 agreement"]
    return f"{markdown_table(head, rows)}\n\n{note}"


def compiled() -> str:
    """Growing and static caches, and a compiled forward pass."""
    found = load_results("compiled")
    titles = {
        "dynamic": "growing cache",
        "static": "static cache",
        "compiled": "static cache, compiled",
        "compiled again": "static cache, compiled by an earlier process",
    }
    rows = [
        [
            {"packed": "packed", "checkpoint": "not compressed"}[run["model"]],
            titles[run["way"]],
            f"{run['tokens_per_second']:.1f}",
            f"{max(0.0, run['first_seconds']):.1f}",
            f"{run['peak_bytes'] / 1e6:.0f}",
        ]
        for name in ("packed", "checkpoint")
        for run in found["runs"]
        if run["model"] == name
    ]
    note = (
        f"SmolLM2-135M, bfloat16, {found['threads']} threads, `generate` of {found['new_tokens']} tokens after a "
        "prompt of 8, in a process of its own: the better of two calls, after a first one that takes longer by the "
        f"time in the fourth column. `{found['command']}`"
    )
    head = ["", "", "tokens/s", "first call, extra seconds", "peak memory, MB"]
    return f"{markdown_table(head, rows)}\n\n{note}"
