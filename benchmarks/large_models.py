"""Models with the dimensions of real large ones: exact sizes of the whole, and one block coded, loaded and run.

Only configurations are needed; they are written down here. The whole model is planned over a sparse checkpoint: a
safetensors file with all tensors and no data, which takes no room on disk. One block with random weights and a small
vocabulary is compressed, its bytes are those of its plan, and packed and dense loading agree with a dense block that
holds the decoded weights.

python benchmarks/large_models.py            # all, into results/large_models.json
python benchmarks/large_models.py --whole    # the exact sizes only, which takes a minute
python benchmarks/large_models.py phi-4      # some; the others keep their results
"""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import struct
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, quiet, save

BPW = 3.0
_FORM = "hashed trellis"  # of `_settings`
SHARD_BYTES = 4 << 30
_ROUNDING = 2e-3  # of the largest logit, in float32
_BLOCK_VOCABULARY = 512
_BLOCK_EXPERTS = 4  # of hundreds, at their real size


@dataclasses.dataclass(frozen=True)
class Large:
    """A model: name of its configuration class, and the settings that differ from the class's defaults."""

    config: str
    settings: dict[str, Any]
    block: dict[str, Any] = dataclasses.field(default_factory=dict)


def _sizes(
    hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        **more,
    }


_LLAMA_3_POSITIONS = {
    "max_position_embeddings": 131072,
    "rope_parameters": {
        **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    },
}
MODELS = {
    "llama-3.1-8b": Large("LlamaConfig", _sizes(4096, 14336, 32, 32, 8, 128256, **_LLAMA_3_POSITIONS)),
    "qwen3-8b": Large("Qwen3Config", _sizes(4096, 12288, 36, 32, 8, 151936, head_dim=128)),
    "qwen3-30b-a3b": Large(
        "Qwen3MoeConfig",
        _sizes(2048, 6144, 48, 32, 4, 151936, head_dim=128)
        | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        {"num_experts": _BLOCK_EXPERTS, "num_experts_per_tok": 2},
    ),
    "gemma-3-12b": Large("Gemma3TextConfig", _sizes(3840, 15360, 48, 16, 8, 262208, head_dim=256)),
    "phi-4": Large("Phi3Config", _sizes(5120, 17920, 40, 40, 10, 100352)),
    "deepseek-v3": Large(
        "DeepseekV3Config",
        {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        {"n_routed_experts": _BLOCK_EXPERTS, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
        | {"first_k_dense_replace": 0},
    ),
    "gpt-oss-120b": Large(
        "GptOssConfig",
        _sizes(2880, 2880, 36, 64, 8, 201088, head_dim=64)
        | {"num_local_experts": 128, "num_experts_per_tok": 4},
        {"num_local_experts": _BLOCK_EXPERTS, "num_experts_per_tok": 2},
    ),
}


def sparse_checkpoint(config: Any, folder: Path) -> int:
    """Write the shards of a checkpoint that has every tensor of a model in bf16 and no data; its size in bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tied = set(model.all_tied_weights_keys or {})
    shards: list[dict[str, Any]] = [{}]
    total = offset = 0
    for name, value in model.state_dict().items():
        if name in tied:
            continue
        nbytes = value.numel() * value.dtype.itemsize
        if offset and offset + nbytes > SHARD_BYTES:
            shards.append({})
            offset = 0
        dtype = {"torch.bfloat16": "BF16", "torch.float32": "F32"}[str(value.dtype)]
        shards[-1][name] = {
            "dtype": dtype,
            "shape": list(value.shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset, total = offset + nbytes, total + nbytes
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    names = {}
    for number, header in enumerate(shards):
        file = folder / f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        _write_sparse(file, header)
        names |= dict.fromkeys(header, file.name)
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write_sparse(file: Path, header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    size = max(entry["data_offsets"][1] for entry in header.values())
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + size)


def _settings() -> Any:
    """The default form (indices on a hashed trellis) at 3 bits, without calibration."""
    import pocketllm

    return dataclasses.replace(pocketllm.preset("calibrated-8x"), target_bpw=BPW, calibration=None)


def whole(large: Large) -> dict[str, Any]:
    """The exact size of the compressed model, from its plan."""
    import transformers

    import pocketllm

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        dense = sparse_checkpoint(getattr(transformers, large.config)(**large.settings), Path(place))
        report = pocketllm.dry_run(place, _settings())
    return {
        "dense_bytes": dense,
        "bytes_on_disk": report.bytes_on_disk,
        "bpw_matrices": report.bpw_matrices,
        "matrices": len(report.matrices),
        "left_dense": len(report.skipped),
        "plan_seconds": round(time.monotonic() - started, 1),
    }


def block(name: str) -> dict[str, Any]:
    """One block of the real dimensions with random weights: bytes, time and memory of compressing it, and loading."""
    with tempfile.TemporaryDirectory() as folder:
        made, compressed, loaded = (_in_own_process(step, name, folder) for step in _STEPS)
    return {
        "form": _FORM,
        "weights": compressed["weights"],
        "dense_bytes": made["dense_bytes"],
        "bytes_are_planned": compressed["bytes_are_planned"],
        "off": loaded["off"],
        "agrees": all(value <= _ROUNDING for value in loaded["off"].values()),
        "seconds": compressed["seconds"],
        "processor_seconds": compressed["processor_seconds"],
        "peak_memory_bytes": compressed["peak_memory_bytes"],
    }


def _in_own_process(step: str, name: str, folder: str) -> dict[str, Any]:
    """What a step finds, with its time and peak memory."""
    command = [sys.executable, __file__, "--step", step, name, folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _make(large: Large, folder: Path) -> dict[str, Any]:
    """Write the dense block."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    small = {"num_hidden_layers": 1, "vocab_size": _BLOCK_VOCABULARY}
    config = getattr(transformers, large.config)(**{**large.settings, **large.block, **small})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "dense")
    return {"dense_bytes": sum(file.stat().st_size for file in (folder / "dense").glob("*.safetensors"))}


def _compress(large: Large, folder: Path) -> dict[str, Any]:
    """Compress it."""
    import pocketllm

    settings = _settings()
    planned = pocketllm.dry_run(folder / "dense", settings)
    report = pocketllm.compress(folder / "dense", settings, folder / "small")
    return {
        "weights": sum(math.prod(m.shape) for m in report.matrices),
        "bytes_are_planned": report.bytes_on_disk == planned.bytes_on_disk,
    }


def _compare(large: Large, folder: Path) -> dict[str, Any]:
    """Load it in both modes, and compare the logits with those of the dense block with the decoded weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from pocketllm.runtime.layers import packed_matrices

    def load(mode: str) -> Any:
        found = AutoConfig.from_pretrained(folder / "small")
        found.quantization_config["mode"] = mode
        return AutoModelForCausalLM.from_pretrained(
            folder / "small", config=found, dtype=torch.float32
        ).eval()

    tokens, off = torch.arange(3, 35)[None], {}
    with torch.inference_mode():
        packed = load("packed")
        reference = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval()
        for name, matrix in packed_matrices(packed).items():
            reference.get_parameter(name).copy_(matrix())
        wanted = reference(tokens, use_cache=False).logits
        del reference
        for mode in ("packed", "dense"):
            model = packed if mode == "packed" else load(mode)
            got = model(tokens, use_cache=False).logits
            off[mode] = float((got - wanted).abs().max() / wanted.abs().max())
            model = packed = None
    return {"off": off}


_STEPS: dict[str, Callable[[Large, Path], dict[str, Any]]] = {
    "make": _make,
    "compress": _compress,
    "compare": _compare,
}


def _run_step(step: str, name: str, folder: str) -> None:
    """Run a step in this process, and print what it finds."""
    started = time.monotonic()
    found = _STEPS[step](MODELS[name], Path(folder))
    used = resource.getrusage(resource.RUSAGE_SELF)
    facts = {
        "seconds": round(time.monotonic() - started, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_memory_bytes": used.ru_maxrss * 1024,
    }
    print(json.dumps({**found, **facts}))


def main() -> None:
    quiet()
    if sys.argv[1:2] == ["--step"]:
        _run_step(*sys.argv[2:5])
        return
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; default: all")
    parser.add_argument("--whole", action="store_true", help="the exact sizes only")
    given, path = parser.parse_args(), RESULTS / "large_models.json"
    if unknown := sorted(set(given.models) - set(MODELS)):
        parser.error(f"{unknown[0]}: no such model; known: {', '.join(MODELS)}")
    found: dict[str, Any] = json.loads(path.read_text())["models"] if path.is_file() else {}
    for name in given.models or MODELS:
        measured = {"whole": whole(MODELS[name])} | ({} if given.whole else {"block": block(name)})
        found[name] = found.get(name, {}) | measured
        print(name, found[name], flush=True)
        models = {key: found[key] for key in MODELS if key in found}
        save("large_models", "python benchmarks/large_models.py", {"bpw": BPW, "models": models})


if __name__ == "__main__":
    main()
