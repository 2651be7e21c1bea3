"""llama.cpp: its own converter, importance matrix and quantizer, built from its Python package's sources.

Embedding (which is the head, too) stays bf16: `--token-embedding-type bf16`. A row whose length is not a
multiple of 256 cannot take the K- and I-formats; the quantizer then takes a larger one, matrix by matrix, and
the bits are counted by what stands in the file.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter import Job, Matrix, block_matrices, run

if TYPE_CHECKING:
    import torch

# Names of a llama block's matrices in GGUF, and in transformers.
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def quantize(job: Job) -> dict[str, Any]:
    """Convert, compute the importance matrix, quantize: three programs of llama.cpp, each timed."""
    tools = Path(job.options["build"]) / "bin"
    convert = Path(job.options["source"]) / "convert_hf_to_gguf.py"
    plain, importance = job.work / "bf16.gguf", job.work / "imatrix.gguf"
    threads = str(os.cpu_count())
    stages = {
        "convert": [sys.executable, convert, job.model, "--outtype", "bf16", "--outfile", plain],
        "imatrix": [
            *[tools / "llama-imatrix", "-m", plain, "-f", job.text, "-o", importance],
            *["-c", str(job.options["length"]), "-t", threads],
        ],
        "quantize": [
            *[tools / "llama-quantize", "--imatrix", importance, "--token-embedding-type", "bf16"],
            *[plain, job.packed / "model.gguf", job.options["type"], threads],
        ],
    }
    seconds = {}
    for name, command in stages.items():
        started = time.perf_counter()
        subprocess.run(command, check=True)
        seconds[name] = time.perf_counter() - started
    return {"type": job.options["type"], "context": job.options["length"], "seconds_by_stage": seconds}


def dequantize(job: Job) -> dict[str, Matrix]:
    """By llama.cpp's Python package.

    Raises:
        ValueError: the unquantized GGUF file, read back the same way, is not the model.
    """
    import torch

    original = block_matrices(job.model)
    for name, matrix in read_gguf(job, job.work / "bf16.gguf").items():
        if not torch.equal(matrix.weight.to(original[name].dtype), original[name]):
            raise ValueError(f"{name}: the bf16 GGUF file does not give back the model's weights")
    return read_gguf(job, job.packed / "model.gguf")


def read_gguf(job: Job, path: Path) -> dict[str, Matrix]:
    """The block matrices of a GGUF file under their names in transformers, q and k in order again."""
    sys.path.insert(0, str(Path(job.options["source"]) / "gguf-py"))
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize as decode

    reader = GGUFReader(path)
    heads = {}
    if "llama.attention.head_count" in reader.fields:  # other architectures keep the order of q and k
        heads = {
            "attn_q": int(reader.fields["llama.attention.head_count"].contents()),
            "attn_k": int(reader.fields["llama.attention.head_count_kv"].contents()),
        }
    found = {}
    for tensor in reader.tensors:
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if match is None or match[2] not in NAMES:
            continue
        weight = torch.from_numpy(decode(tensor.data, tensor.tensor_type))
        if match[2] in heads:
            weight = unpermute(weight, heads[match[2]])
        name = f"model.layers.{match[1]}.{NAMES[match[2]]}.weight"
        found[name] = Matrix(weight, 8 * int(tensor.n_bytes), tensor.tensor_type.name)
    return found


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """[out, in]: llama.cpp interleaves the two halves that rotary positions pair; transformers does not."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


if __name__ == "__main__":
    run(quantize, dequantize)
