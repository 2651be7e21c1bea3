"""Load a compressed model: files are verified before, layers after."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from pocketllm.errors import ConfigError, LoadError, PocketError, reason_of
from pocketllm.files import read_object
from pocketllm.runtime.load_checks import known_as_verified, verifying_folder
from pocketllm.runtime.model_methods import use_one_product
from pocketllm.runtime.transformers_plugin import MODES, PocketQuantizer
from pocketllm.source.dense_checkpoint import resolve
from pocketllm.source.folder import read_tokenizer
from pocketllm.source.model_class import model_class
from pocketllm.torch_state import in_default_torch_state


class _Shared(dict[str, Any]):
    """An object of a configuration that copies share: transformers copies it several times, and it is large."""

    def __deepcopy__(self, memo: Any) -> _Shared:
        return _Shared(self)


def _read_config(folder: Path, mode: str, trust_remote_code: bool) -> Any:
    """The model's configuration, which asks for a mode.

    Raises:
        LoadError: transformers cannot read it.
    """
    stored = read_object(folder / "config.json")["quantization_config"]
    with _as_load_error(folder):
        # transformers copies and prints what it reads, which would take a while
        how = {"return_dict": True, "quantization_config": {}, "trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(folder, **how)
    config.quantization_config = _Shared(stored, mode=mode)
    return config


def _from_pretrained(folder: Path, config: Any, how: Mapping[str, Any]) -> Any:
    """The model of a verified folder, as transformers loads it.

    Raises:
        LoadError: transformers cannot, or without this package's plug-in; and what the plug-in raises.
    """
    with _as_load_error(folder), known_as_verified(folder):
        model = model_class(config).from_pretrained(folder, config=config, use_safetensors=True, **how)
    if not isinstance(getattr(model, "hf_quantizer", None), PocketQuantizer):
        raise LoadError(
            f"{folder}: transformers loaded it without pocketllm, so its weights are random; load it in a new process"
        )
    return model


@contextmanager
def _as_load_error(folder: Path) -> Iterator[None]:
    """What transformers raises, as an error that names the folder."""
    try:
        yield
    except (PocketError, ImportError, MemoryError):
        raise
    except Exception as error:  # transformers raises whatever it comes upon
        hint = "; pass --trust-remote-code if you trust it" if "custom code" in str(error) else ""
        raise LoadError(
            f"{folder}: transformers cannot load this model ({reason_of(error)}){hint}"
        ) from error


@contextmanager
def _quick_collections() -> Iterator[None]:
    """Garbage collections do not visit what was there before: each would take as long as loading a small model."""
    if gc.get_freeze_count():  # somebody else's
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@in_default_torch_state
def load(
    path: str | Path,
    *,
    revision: str | None = None,
    mode: str = "auto",
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a compressed model, with its files verified before and its layers after loading.

    Args:
        path: folder or Hub id of a compressed model; a Hub id may name its revision (`owner/name@revision`).
        revision: branch, tag or commit of a Hub id.
        mode: `packed` (weights stay packed, layers multiply straight from them), `dense` (decoded at load), or `auto`:
            packed if every layer has a kernel, else dense, with a line in the log that says why.
        dtype: to compute in; `auto` is the checkpoint's.
        device_map: as in transformers.
        trust_remote_code: let transformers run code that the folder contains.

    Returns:
        (model, tokenizer); the model in eval mode, its weights not trainable. The tokenizer is None if the
        folder has none.

    Raises:
        FormatError: damaged, altered, or not a compressed model.
        LoadError: the layers did not load compressed, or a tensor of the model is in no file.
        SourceError: the tokenizer cannot be read, or nothing is found at `path`.
        ConfigError: unknown mode, or a revision of a folder.

    Example:
        >>> model, tokenizer = pocketllm.load("smol-8x")
    """
    if mode not in MODES:
        raise ConfigError(f"mode: got {mode!r}, wanted one of {', '.join(MODES)}")
    folder = resolve(str(path), revision=revision)
    how = {"dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
    with _quick_collections(), verifying_folder(folder):
        config = _read_config(folder, mode, trust_remote_code)
        tokenizer = read_tokenizer(folder, trust_remote_code, config)
        model = _from_pretrained(folder, config, how)
        use_one_product(model)
        return model.requires_grad_(False), tokenizer
