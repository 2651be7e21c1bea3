"""The cost of decoding: floating point operations by formula, time and memory by measurement."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from pocketllm.config import CodecConfig, CompressConfig
from pocketllm.format import Layout, read_layout, read_report
from pocketllm.source import need_tokenizer, resolve
from pocketllm.studies.definition import Measurement, Progress, Setup, Step
from pocketllm.studies.measure import probe
from pocketllm.studies.measure.compressed_models import calibrated, compressed, fitting, inputs
from pocketllm.studies.measure.probe import DENSE

_ROUNDS = 2
MODES = {"dense": "decoded at load", "packed": "packed"}
"""How a compressed model is run, and in words."""


def decode_flops(layout: Layout) -> dict[str, float]:
    """Floating point operations of decoding every matrix of a model once, by part.

    With d numbers in a subvector, hidden width h, L blocks, R x C weights in a matrix, S subvectors:

        network(d, h, L) = L (4 d h + h) + (L - 1) d      products, GELU as one, residual sums
                         = L (2 d^2 + d) + (L - 1) d      with affine blocks (h = 0)
        look-up form: K network, once for each pair of codebook and decoder; then no more than a copy
        row form:     S (network + (L - 1) 5 d)           five operations a number for the norm
        scales:       R C
        rotation of vectors of length n = 2^a m, m odd:   (a + 2 m [m > 1] + 1) a number, each side

    The multiplication of one token with the decoded matrices takes 2 R C.
    """
    parts = {"networks": 0.0, "scales": 0.0, "rotation": 0.0, "one token": 0.0}
    tables: set[tuple[int, int]] = set()
    for entry in layout.matrices.values():
        codec, book = layout.decoders[entry.decoder].codec, layout.codebooks[entry.codebook]
        weights, d = entry.rows * entry.columns, book.vector_len
        if codec.decoder == "row":
            norm = 0 if codec.norm == "none" else max(0, codec.depth - 1) * 5 * d
            parts["networks"] += entry.rows * -(-entry.columns // d) * (_network_flops(codec) + norm)
        elif (entry.codebook, entry.decoder) not in tables:
            tables.add((entry.codebook, entry.decoder))
            parts["networks"] += book.size * _network_flops(codec)
        parts["scales"] += weights if codec.row_scale else 0
        for seed, size in zip(entry.rotation, (entry.rows, entry.columns), strict=True):
            if seed is not None:
                parts["rotation"] += weights * _rotation_flops(size)
        parts["one token"] += 2 * weights
    return parts


def _network_flops(codec: CodecConfig) -> int:
    """See `decode_flops`."""
    d, h, depth = codec.vector_len, codec.hidden, codec.depth
    block = 4 * d * h + h if h else 2 * d * d + d
    return depth * block + max(0, depth - 1) * d


def _rotation_flops(size: int) -> int:
    """A number of a vector of that length; see `decode_flops`."""
    power = size & -size
    odd = size // power
    return power.bit_length() - 1 + (2 * odd if odd > 1 else 0) + 1


def forms(setup: Setup) -> dict[str, CompressConfig]:
    """Stored forms that decode differently. The quality of the fit does not matter, so they are fitted quickly."""
    size = 256 if setup.quick else 4096
    codec = CodecConfig(epochs=0, kmeans_iterations=4, sample_per_codeword=64)
    lookup = CompressConfig(
        codec=codec, vector_len=4, codebook_size=size, codebook_scope="kind", seed=setup.seed
    )
    found = {"lookup": lookup, "row": replace(lookup, codec=replace(codec, decoder="row"))}
    if setup.quick:
        return found
    little = calibrated("calibrated-10x", tokens=2048, sensitivity_tokens=512)
    found["calibrated"] = replace(little, seed=setup.seed)
    return found


def steps(setup: Setup) -> list[Step]:
    need_tokenizer(resolve(setup.model))
    steps = [Step(f"form-{name}", partial(_form, setup, name)) for name in forms(setup)]
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        rounds = range(1 if setup.quick else _ROUNDS)
        steps += [Step(f"{device}-{number}", partial(_round, setup, device)) for number in rounds]
    return steps


def _form(setup: Setup, name: str, progress: Progress) -> dict[str, Any]:
    """Encode the model in a form; returns bytes and operations."""
    folder = compressed(setup, name, forms(setup)[name], progress)
    report = read_report(folder)
    flops = decode_flops(read_layout(folder))
    return {
        "flops": flops,
        "decode_flops": sum(flops[part] for part in ("networks", "scales", "rotation")),
        "bytes_on_disk": report["bytes_on_disk"],
        "dense_bytes": report["dense_model_bytes_bf16"],
        "bpw": report["bpw_matrices"],
    }


def _round(setup: Setup, device: str, progress: Progress) -> dict[str, Any]:
    """Every form and mode, each in its own process, one after another on the same machine."""
    short, long = (8, 64) if setup.quick else (16, 512)
    long = fitting(setup, long + 1) - 1
    jobs = {DENSE: (resolve(setup.model), DENSE)}
    for name, config in forms(setup).items():
        folder = compressed(setup, name, config)
        jobs |= {f"{name}, {shown}": (folder, mode) for mode, shown in MODES.items()}
    runs: dict[str, dict[str, float]] = {}
    for job, (folder, mode) in jobs.items():
        asked = probe.Probe(
            str(folder), mode, device, torch.get_num_threads(), short, long, 8, 2.0 if setup.quick else 5.0
        )
        runs[job] = probe.run(asked)
        progress(len(runs) / len(jobs))
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"runs": runs, "short": short, "long": long, "gpu": gpu}


MEASUREMENT = Measurement(steps, inputs=lambda setup: {} if setup.quick else inputs())
