"""Ours, through its command line alone, as a user runs it; the embedding stays dense as with the peers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from adapter import Job, Matrix, run

POCKETLLM = Path(sys.executable).with_name("pocketllm")


def quantize(job: Job) -> dict[str, Any]:
    """`pocketllm compress`; it draws its own samples from the whole calibration text."""
    command = [
        *["compress", str(job.model), "-o", str(job.packed / "model"), "--bpw", str(job.options["bpw"])],
        *["--keep-embeddings", "--calibration", job.options["calibration"], "--seed", str(job.seed)],
    ]
    done = subprocess.run([POCKETLLM, *command, "--json"], check=True, stdout=subprocess.PIPE, text=True)
    (job.work / "report.json").write_text(done.stdout)
    report = json.loads(done.stdout)
    blocks = [m for m in report["matrices"] if "embed" not in m["name"] and "lm_head" not in m["name"]]
    sizes = {key: report[key] for key in ("bytes_on_disk", "ratio_files_bf16", "ratio_files_fp32")}
    proxy_error = sum(m["proxy_error"] for m in blocks) / len(blocks)
    config = report["config"]
    config["calibration"]["texts"] = [Path(text).name for text in config["calibration"]["texts"]]
    return {"config": config, **sizes, "proxy_error_blocks": proxy_error}


def dequantize(job: Job) -> dict[str, Matrix]:
    """`pocketllm export`; a matrix's bits are those of the report, with its share of codebook and decoder.

    Raises:
        ValueError: the bits of the matrices do not add up to the bytes that the report counts by part.
    """
    from safetensors.torch import load_file

    exported = job.work / "exported"
    command = ["export", str(job.packed / "model"), "--to", str(exported), "--dtype", "bfloat16", "--quiet"]
    subprocess.run([POCKETLLM, *command], check=True)
    report = json.loads((job.work / "report.json").read_text())
    coded = {entry["name"].removesuffix(".weight"): entry for entry in report["matrices"]}
    found = {}
    for name, weight in load_file(exported / "model.safetensors").items():
        entry = coded.get(name.removesuffix(".weight"))
        if entry is None:
            found[name] = Matrix(weight, 16 * weight.numel(), "dense bf16")
        else:
            kind = f"d={entry['vector_len']}, K={entry['codebook_size']}"
            found[name] = Matrix(weight, round(entry["bpw"] * weight.numel()), kind)
    parts = ("indices", "row_scales", "codebooks", "decoders")
    counted = sum(matrix.stored_bits for matrix in found.values() if matrix.format != "dense bf16")
    wanted = 8 * sum(report["bytes_by_part"][part] for part in parts)
    if abs(counted - wanted) > 1e-3 * wanted:
        raise ValueError(f"the matrices' bits add up to {counted}, the report counts {wanted}")
    return found


if __name__ == "__main__":
    run(quantize, dequantize)
