"""GPTQModel: GPTQ, scalar, symmetric, a scale per group; its defaults but for bits and group size.

It wants two workers on the CPU and gives itself one on a machine of two cores, so the variable says two.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from adapt_autoround import unpack_gptq
from adapter import Job, Matrix, run
from safetensors.torch import load_file

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")


def quantize(job: Job) -> dict[str, Any]:
    """Quantize and pack as GPTQModel saves it."""
    from gptqmodel import GPTQModel, QuantizeConfig

    samples = [
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
        for ids in json.loads(job.tokens.read_text())
    ]
    torch.manual_seed(job.seed)
    settings = {"bits": job.options["bits"], "group_size": job.options["group_size"]}
    peer = GPTQModel.load(str(job.model), QuantizeConfig(**settings), device="cpu")
    peer.quantize(samples, batch_size=8)
    peer.save(str(job.packed))
    saved = json.loads((job.packed / "quantize_config.json").read_text())
    saved["meta"].pop("offload_to_disk_path", None)  # of this run
    return {**settings, "batch_size": 8, "saved": saved}


def dequantize(job: Job) -> dict[str, Matrix]:
    """W = scale * (q - zero), each input in the group that the packed file names."""
    config = json.loads((job.packed / "quantize_config.json").read_text())
    found = {}
    for path in job.packed.rglob("*.safetensors"):
        stored = load_file(path)
        for key in [key for key in stored if key.endswith(".qweight")]:
            name = key.removesuffix(".qweight")
            parts = [stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")]
            groups = stored[f"{name}.g_idx"]
            found[f"{name}.weight"] = Matrix(
                unpack_gptq(*parts, config["bits"], groups.long()),
                8 * sum(part.nbytes for part in (*parts, groups)),
                f"W{config['bits']} g{config['group_size']}",
            )
    return found


if __name__ == "__main__":
    run(quantize, dequantize)
