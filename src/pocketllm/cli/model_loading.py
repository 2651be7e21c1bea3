"""Load the model that a command names, compressed or dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pocketllm.errors import ConfigError, SourceError


def dtype_of(name: str, device: str = "cpu") -> Any:
    """The torch type of a `--dtype`; auto is float32 on a CPU, otherwise bfloat16.

    Raises:
        ConfigError: an unknown name.
    """
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
    """A compressed or dense model, its tokenizer, and facts: whether it is compressed, its bytes on disk.

    Args:
        model: as the user named it. mode, dtype, device: as `--mode`, `--dtype` and `--device`.
        adapter: attached to a compressed model; its bytes are counted.

    Raises:
        SourceError: not found, or without a tokenizer or a language model head. Others as `pocketllm.load`.
    """
    if adapter is not None:
        return _load_with(adapter, model, mode, dtype, device, trust_remote_code)
    import pocketllm
    from pocketllm.format import folder_bytes, is_compressed
    from pocketllm.source import load_dense, open_dense, resolve
    from pocketllm.source.folder import no_tokenizer, read_tokenizer
    from pocketllm.source.model_class import output_head

    folder = resolve(model)
    where = {"": device}
    compressed = is_compressed(folder)
    if compressed:
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
    facts = {"compressed": compressed, "bytes_on_disk": folder_bytes(folder)}
    return loaded.eval(), tokenizer, facts


def _load_with(
    adapter: Path, model: str, mode: str, dtype: str, device: str, trust_remote_code: bool
) -> tuple[Any, Any, dict[str, Any]]:
    from pocketllm.format import folder_bytes
    from pocketllm.recover import attach_adapter, check_adapter
    from pocketllm.source import folder_of

    base = folder_of(model)
    check_adapter(adapter, base)
    loaded, tokenizer, facts = load_any(str(base), mode, dtype, device, trust_remote_code)
    attach_adapter(loaded, base, adapter)
    nbytes = facts["bytes_on_disk"] + folder_bytes(adapter)
    return loaded, tokenizer, {**facts, "bytes_on_disk": nbytes, "adapter": str(adapter)}
