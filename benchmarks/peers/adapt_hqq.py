"""HQQ: half-quadratic quantization, without calibration; a scale and a zero point per group, both 16-bit."""

from __future__ import annotations

from typing import Any

import torch
from adapter import Job, Matrix, run


def quantize(job: Job) -> dict[str, Any]:
    """Quantize and pack as HQQ saves it."""
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel
    from transformers import AutoModelForCausalLM

    torch.manual_seed(job.seed)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float16)
    settings = dict(job.options)
    config = BaseQuantizeConfig(
        nbits=settings["bits"], group_size=settings["group_size"], axis=settings["axis"]
    )
    AutoHQQHFModel.quantize_model(model, config, compute_dtype=torch.float16, device="cpu")
    AutoHQQHFModel.save_quantized(model, str(job.packed))
    return {**settings, "compute_dtype": "float16"}


def dequantize(job: Job) -> dict[str, Matrix]:
    """By HQQ's own layer; bits are those of the packed integers, scales and zero points."""
    from hqq.core.quantize import HQQLinear

    stored = torch.load(job.packed / "qmodel.pt", map_location="cpu", weights_only=True)
    found = {}
    for name, state in stored.items():
        if "W_q" not in state:
            continue
        bits = sum(8 * state[part].nbytes for part in ("W_q", "scale", "zero"))
        kind = f"{job.options['bits']}-bit in {str(state['W_q'].dtype).removeprefix('torch.')}"
        layer = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu")
        layer.load_state_dict(state)  # empties it
        found[f"{name}.weight"] = Matrix(layer.dequantize().float(), bits, kind)
    return found


if __name__ == "__main__":
    run(quantize, dequantize)
