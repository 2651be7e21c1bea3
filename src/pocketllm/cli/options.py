"""What the commands share: common options, settings of the process, loading a model that was named."""

from __future__ import annotations

import os
import warnings
from logging import getLogger
from pathlib import Path
from typing import Annotated, Any

import typer

from pocketllm.errors import ConfigError, SourceError

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; everything else on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random choice.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 takes all cores.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model folder contains.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto (float32 on a CPU).")]
Adapter = Annotated[
    Path | None, typer.Option(help="An adapter that was trained on the compressed model; its bytes count.")
]
Ppl = Annotated[Path | None, typer.Option(help="UTF-8 text file to measure perplexity on.")]
Context = Annotated[int, typer.Option(help="Tokens per window, with --ppl.")]
Windows = Annotated[int, typer.Option(help="First windows used, with --ppl; 0 takes all.")]
Mode = Annotated[
    str, typer.Option(help="dense (decode at load, full speed) or packed (decode layer by layer).")
]


def settle(device: str = "cpu", threads: int = 0) -> None:
    """Quiet transformers, set threads, check the device."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # torch and faiss bring an OpenMP runtime each; idle threads of one must not spin while the other works.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("accelerate.big_modeling").setLevel("ERROR")  # tells of every model on the disk
    if threads:
        torch.set_num_threads(threads)
        import faiss

        faiss.omp_set_num_threads(threads)
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device: got {device!r}, wanted cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; use --device cpu")


def dtype_of(name: str, device: str = "cpu") -> Any:
    import torch

    if name == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError(f"--dtype: got {name!r}, wanted one of auto, {', '.join(known)}")
    return known[name]


def load_any(
    model: str, mode: str, dtype: str, device: str, trust_remote_code: bool, adapter: Path | None = None
) -> tuple[Any, Any, dict[str, Any]]:
    """A compressed or a dense model, with what is known of its size; adapter: to run a compressed one with.

    Raises:
        SourceError: not found, or without a tokenizer; and whatever `pocketllm.load` raises.
    """
    if adapter is not None:
        return _load_with(adapter, model, mode, dtype, device, trust_remote_code)
    import pocketllm
    from pocketllm.format import checkpoint
    from pocketllm.source.dense_checkpoint import open_dense, resolve
    from pocketllm.source.folder import load_dense, no_tokenizer, read_tokenizer
    from pocketllm.source.model_class import output_head

    folder = resolve(model)
    where = {"": device}
    is_compressed = checkpoint.is_compressed(folder)
    if is_compressed:
        loaded, tokenizer = pocketllm.load(
            folder,
            mode=mode,
            dtype=dtype_of(dtype, device),
            device_map=where,
            trust_remote_code=trust_remote_code,
        )
    else:
        open_dense(folder, trust_remote_code)  # its errors are clearer
        loaded = load_dense(folder, dtype_of(dtype, device), trust_remote_code, device_map=where)
        tokenizer = read_tokenizer(folder, trust_remote_code)
    if output_head(loaded) is None and not loaded.can_generate():
        raise SourceError(
            f"{folder}: {type(loaded).__name__} has no language model head; wanted a causal model"
        )
    if tokenizer is None:
        raise no_tokenizer(folder)
    facts = {"compressed": is_compressed, "bytes_on_disk": checkpoint.folder_bytes(folder)}
    return loaded.eval(), tokenizer, facts


def _load_with(
    adapter: Path, model: str, mode: str, dtype: str, device: str, trust_remote_code: bool
) -> tuple[Any, Any, dict[str, Any]]:
    from pocketllm.format import checkpoint
    from pocketllm.recover.adapter import attach_adapter, check_adapter

    check_adapter(adapter, Path(model))
    loaded, tokenizer, facts = load_any(model, mode, dtype, device, trust_remote_code)
    attach_adapter(loaded, Path(model), adapter)
    nbytes = facts["bytes_on_disk"] + checkpoint.folder_bytes(adapter)
    return loaded, tokenizer, {**facts, "bytes_on_disk": nbytes, "adapter": str(adapter)}
