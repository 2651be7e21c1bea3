"""What a wheel must do without a compiler: compress a tiny model, run it packed and decoded, run its commands."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import pocketllm

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 96}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


def main() -> None:
    """Exits with an error at the first thing that fails."""
    assert "site-packages" in pocketllm.__file__, pocketllm.__file__
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        dense = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, **HEADS))
        dense.save_pretrained(folder / "dense")
        command = [str(Path(sys.executable).with_name("pocketllm"))]
        doctor = json.loads(_output([*command, "doctor", "--json"]))
        assert doctor["compiler"] is None, doctor["compiler"]
        assert doctor["kernels"]["packed"]["works"], doctor["kernels"]["packed"]["reason"]
        config = pocketllm.CompressConfig(vector_len=4, codebook_size=32, codebook_scope="kind")
        report = pocketllm.compress(folder / "dense", config, folder / "small")
        json.loads(_output([*command, "info", str(folder / "small"), "--json"]))
        ids = torch.arange(3, 20)[None]
        logits = [pocketllm.load(folder / "small", mode=mode)[0](ids).logits for mode in ("packed", "dense")]
        assert torch.allclose(*logits, atol=1e-4), (logits[0] - logits[1]).abs().max()
        versions = ", ".join(f"{name} {version}" for name, version in doctor["versions"].items())
        print(f"{versions}: works without a compiler, {report.bytes_on_disk} bytes")


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
