"""AutoRound: rounding learned by signed gradient descent, scalar, symmetric, a scale per group.

`torch.compile`, its default, is off: on two cores a block took 40 s with it and about 10 s without.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from adapter import Job, Matrix, run
from safetensors.torch import load_file


def quantize(job: Job) -> dict[str, Any]:
    """Tune and pack, both by AutoRound, in its own format."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    samples = [{"input_ids": torch.tensor([ids])} for ids in json.loads(job.tokens.read_text())]
    settings = {
        "scheme": f"W{job.options['bits']}A16",
        "group_size": job.options["group_size"],
        "iters": job.options["iters"],
        "nsamples": len(samples),
        "seqlen": samples[0]["input_ids"].shape[1],
        "batch_size": 8,
        "seed": job.seed,
        "device_map": "cpu",
        "enable_torch_compile": False,
    }
    peer = AutoRound(
        str(job.model),
        tokenizer=AutoTokenizer.from_pretrained(job.model),
        dataset=samples,
        **settings,
    )
    peer.quantize_and_save(str(job.packed), format="auto_round")
    return settings


def dequantize(job: Job) -> dict[str, Matrix]:
    """W = scale * (q - zero) from the packed file."""
    (path,) = job.packed.rglob("*.safetensors")
    config = json.loads((path.parent / "quantization_config.json").read_text())
    if config["packing_format"] != "auto_round:auto_gptq":
        raise ValueError(f"{path}: packed as {config['packing_format']}, wanted auto_round:auto_gptq")
    stored = load_file(path)
    found = {}
    for key in [key for key in stored if key.endswith(".qweight")]:
        name = key.removesuffix(".qweight")
        qweight, qzeros, scales = (stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
        found[f"{name}.weight"] = Matrix(
            unpack_gptq(qweight, qzeros, scales, config["bits"], _groups(qweight, config)),
            8 * (qweight.nbytes + qzeros.nbytes + scales.nbytes),
            f"W{config['bits']} g{config['group_size']}",
        )
    return found


def unpack_gptq(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, bits: int, group: torch.Tensor
) -> torch.Tensor:
    """[out, in] float32 weight of GPTQ's packing, whose zero points are stored one too low.

    Args:
        qweight: [in * bits / 32, out] int32. qzeros: [groups, out * bits / 32] int32. scales: [groups, out].
        group: [in] int64, that each input belongs to.
    """
    codes = _integers(qweight.T.contiguous(), bits).T.float()
    zeros = _integers(qzeros, bits).float() + 1
    return ((codes - zeros[group]) * scales.float()[group]).T


def _groups(qweight: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """[in] int64: groups of neighbours."""
    return torch.arange(qweight.shape[0] * 32 // config["bits"]) // config["group_size"]


def _integers(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, words] int32 -> [rows, words * 32 / bits]: each row one little-endian stream of bits."""
    stream = (words[..., None] >> torch.arange(32)) & 1
    stream = stream.reshape(words.shape[0], -1, bits)
    return (stream << torch.arange(bits)).sum(-1)


if __name__ == "__main__":
    run(quantize, dequantize)
