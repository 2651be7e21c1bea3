"""The trained codec against k-means at equal K, d and scope, per kind of projection.

    python benchmarks/codec_floor.py

k-means is faiss's (25 rounds, 256 points per centroid, its defaults) on row-scaled subvectors of all
matrices of a kind. The codecs are fitted as `compress` does. All are scored alike: nmse over every weight
of the kind, in the weights' own units, codebook in float32 for k-means and float16 for the codecs.
Writes results/codec_floor.json.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from common import quiet, save

import pocketllm

MODEL = "builtin:smollm2-135m"
SIZES = ((4, 4096),)  # (d, K)
FORMS = {
    "lookup, k-means start": {"decoder": "lookup", "init": "kmeans"},
    "row (published form), k-means start": {"decoder": "row", "init": "kmeans"},
    "row (published form), normal start": {"decoder": "row", "init": "normal"},
}


def kmeans_nmse(d: int, size: int) -> dict[str, float]:
    """nmse per kind of faiss k-means on row-scaled subvectors, row scale in float32."""
    import faiss
    import numpy as np
    import torch

    from pocketllm.codec.codebook import nearest
    from pocketllm.codec.normalization import divide_rows, row_rms
    from pocketllm.codec.subvectors import cut, join
    from pocketllm.plan.bit_allocation import make_plan
    from pocketllm.source.dense_checkpoint import open_dense, resolve

    source = open_dense(resolve(MODEL))
    kinds: dict[str, list[Any]] = defaultdict(list)
    config = pocketllm.CompressConfig(vector_len=d, codebook_size=size, codebook_scope="kind")
    for matrix in make_plan(source, config).matrices:
        kinds[matrix.kind].append(source.read(matrix.name).float())
    result = {}
    for kind, weights in kinds.items():
        units = [divide_rows(w, row_rms(w)) for w in weights]
        points = torch.cat([cut(u, d).reshape(-1, d) for u in units])
        quantizer = faiss.Kmeans(d, size, niter=25, seed=0)
        quantizer.train(np.ascontiguousarray(points.numpy()))
        table = torch.from_numpy(np.array(quantizer.centroids))
        error = energy = 0.0
        for weight, unit in zip(weights, units, strict=True):
            parts = cut(unit, d)
            decoded = join(table[nearest(parts.reshape(-1, d), table)].reshape(parts.shape), unit.shape[1])
            error += float((weight - decoded * row_rms(weight)[:, None]).double().square().sum())
            energy += float(weight.double().square().sum())
        result[kind] = error / energy
    return result


def codec_nmse(d: int, size: int, changes: dict[str, Any]) -> tuple[dict[str, float], float, float]:
    """(nmse per kind, least utilization, seconds) of our codec."""
    config = pocketllm.CompressConfig(
        codec=pocketllm.CodecConfig(**changes), vector_len=d, codebook_size=size, codebook_scope="kind"
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        report = pocketllm.compress(MODEL, config, Path(scratch) / "out")
        energy = _energies([m.name for m in report.matrices])
    pooled: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for matrix in report.matrices:
        pooled[matrix.kind][0] += matrix.nmse * energy[matrix.name]
        pooled[matrix.kind][1] += energy[matrix.name]
    least = min(m.codebook_utilization for m in report.matrices)
    return {k: e / n for k, (e, n) in pooled.items()}, least, time.monotonic() - started


def _energies(names: list[str]) -> dict[str, float]:
    from pocketllm.source.dense_checkpoint import open_dense, resolve

    source = open_dense(resolve(MODEL))
    return {name: float(source.read(name).double().square().sum()) for name in names}


def main() -> None:
    """Measure every size and form."""
    quiet()
    results = []
    for d, size in SIZES:
        floor = kmeans_nmse(d, size)
        entry: dict[str, Any] = {"vector_len": d, "codebook_size": size, "kmeans": floor, "codecs": {}}
        for title, changes in FORMS.items():
            nmse, least, seconds = codec_nmse(d, size, changes)
            ratio = {kind: nmse[kind] / floor[kind] for kind in floor}
            entry["codecs"][title] = {
                "settings": dataclasses.asdict(pocketllm.CodecConfig(**{**changes, "vector_len": d})),
                "nmse": nmse,
                "ratio_to_kmeans": ratio,
                "least_utilization": least,
                "seconds": seconds,
            }
            print(d, size, title, {k: round(v, 4) for k, v in ratio.items()}, least, flush=True)
        results.append(entry)
        save("codec_floor", "python benchmarks/codec_floor.py", {"model": MODEL, "sizes": results})


if __name__ == "__main__":
    main()
