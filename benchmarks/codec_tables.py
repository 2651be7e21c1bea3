"""Tables about the codec alone: its error against k-means, its speed, and its form of trellis."""

from __future__ import annotations

from pages import load_results, markdown_table
from peers.table import number


def codec_floor() -> str:
    """nmse of the codecs against k-means."""
    found = load_results("codec_floor")
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
            + markdown_table(head, [*rows, use])
        )
    return "\n\n".join([*parts, f"`{found['command']}`"])


def codec_speed() -> str:
    """Packing and unpacking by width; the nearest codeword for all block weights."""
    found = load_results("codec_speed")
    nearest = found["nearest"]
    packing = markdown_table(
        ["bits of an index", "packing, million indices/s", "unpacking, million indices/s"],
        [
            [
                str(entry["width"]),
                f"{entry['pack_million_per_second']:.0f}",
                f"{entry['unpack_million_per_second']:.0f}",
            ]
            for entry in found["packing"]
        ],
    )
    return (
        f"{packing}\n\nNearest of {nearest['codebook_size']:,} codewords, d = {nearest['vector_len']}, for all "
        f"{nearest['weights']:,} block weights of SmolLM2-135M: {nearest['seconds']:.0f} seconds "
        f"({nearest['gflop_per_second']:.0f} GFLOP/s). {found['machine']['processor']}, "
        f"{found['machine']['threads']} threads. `{found['command']}`"
    )


def hashed() -> str:
    """The hashed trellis against the full table."""
    found = load_results("hashed")
    rows = []
    for name, entry in found["settings"].items():
        seconds = entry["encode_processor_seconds"]
        rows.append(
            [
                name.replace("table,", "full table,"),
                f"{entry['bpw_blocks']:.2f}",
                f"{entry['bytes_on_disk'] / 1e6:.2f}",
                number(entry["perplexity"]),
                f"{entry['kl']:.3f} ± {entry['kl_stderr']:.3f}",
                f"{entry['proxy_error_blocks']:.4f}",
                "" if seconds is None else f"{seconds:.0f}",
            ]
        )
    head = [
        "form",
        "bpw of blocks",
        "MB on disk",
        "perplexity",
        "KL, nats",
        "proxy error",
        "CPU seconds to encode",
    ]
    note = (
        f"SmolLM2-135M, embedding dense; {found['text']}, context {found['context']}, first {found['windows']} "
        "windows, evaluated in bfloat16; before recovery, one run each. "
        f"`{found['command']}`"
    )
    return f"{markdown_table(head, rows)}\n\n{note}"


def hessian_forms() -> str:
    """Other Hessians for error feedback."""
    found = load_results("hessian_forms")
    rows = [
        [name, f"{one['perplexity']:.2f}", f"{one['kl']:.3f} ± {one['kl_stderr']:.3f}"]
        for name, one in found["variants"].items()
    ]
    dense = next(iter(found["variants"].values()))["dense_perplexity"]
    note = (
        f"SmolLM2-135M at {found['bpw']} bits per weight of the blocks (dense perplexity {dense:.2f}); WikiText-2 "
        f"validation text, context {found['context']}, first {found['windows']} windows; one run each. "
        f"`{found['command']}`"
    )
    return f"{markdown_table(['Hessians', 'perplexity', 'KL, nats'], rows)}\n\n{note}"
