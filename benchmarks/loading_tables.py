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
            f"{run['kl']:.4f} ± {run['kl_stderr']:.4f}",
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


def compiled_generation() -> str:
    """Speed with a static cache and torch.compile."""
    found = load_results("compiled_generation")
    rows = [
        [mode, way, f"{run['tokens_per_second']:.1f}", f"{run['first_seconds']:.0f}"]
        for mode, ways in found["runs"].items()
        for way, run in ways.items()
    ]
    note = (
        f"SmolLM2-135M, bfloat16, {found['machine']['threads']} threads; {found['new_tokens']} new tokens after a "
        f"short prompt by transformers' `generate`; the first generation includes compiling, or reading the compiled "
        f"code from torch's cache (compiled before). `{found['command']}`"
    )
    return f"{markdown_table(['', 'generation', 'tokens/s', 'first generation, s'], rows)}\n\n{note}"
