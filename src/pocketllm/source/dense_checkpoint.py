"""Read a dense Hugging Face checkpoint tensor by tensor, under the names the model class uses.

transformers renames and merges tensors while loading (a Mixtral checkpoint stores every expert separately, the
model has one 3-D parameter); the same conversions are applied here to one parameter at a time, so memory does not
grow with the model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketllm.errors import SourceError, WeightError, reason_of
from pocketllm.files import sha256_file
from pocketllm.source.folder import meta_model, open_safetensors, weight_files

FLOAT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*"]
_LARGEST = 1e15  # squares and their sums stay finite in float32


@dataclass(frozen=True)
class _Part:
    file: Path
    key: str
    pattern: str | None


@dataclass
class DenseCheckpoint:
    """An opened dense model.

    folder: where its files lie. model: the model class on the meta device (shapes, no weights).
    parts: parameter name -> the stored tensors it is made of. unused: stored names the model has no use for.
    tied: parameter name -> the parameter it is tied to. trust_remote_code: as the user said.
    """

    folder: Path
    model: Any
    parts: dict[str, list[_Part]]
    converters: dict[str, Any]
    unused: list[str]
    tied: dict[str, str]
    trust_remote_code: bool = False
    _handles: dict[Path, Any] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Stored parameter names in the model's order."""
        return list(self.parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter as the model holds it."""
        return tuple(self.model.get_parameter_or_buffer(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a parameter.

        Raises:
            WeightError: not a float type that can be read.
        """
        part = self.parts[name][0]
        stored = str(self._open(part.file).get_slice(part.key).get_dtype())
        if stored not in FLOAT_DTYPES:
            raise WeightError(
                f"{name}: stored as {stored} in {part.file.name}, wanted one of {', '.join(FLOAT_DTYPES)}; "
                "compress the unquantized checkpoint instead"
            )
        return FLOAT_DTYPES[stored]

    def read(self, name: str) -> Tensor:
        """One parameter, stored dtype, as the model holds it.

        Raises:
            WeightError: unsupported dtype, NaN, Inf or absurdly large values, or a shape the model does not
                have.
        """
        self.dtype(name)
        parts = self.parts[name]
        tensors = [self._open(part.file).get_tensor(part.key) for part in parts]
        for part, tensor in zip(parts, tensors, strict=True):
            _check_values(f"{part.key} in {part.file.name}", tensor)
        value = self._convert(name, tensors) if parts[0].pattern is not None else tensors[0]
        if tuple(value.shape) != self.shape(name):
            raise WeightError(
                f"{name}: stored with shape {tuple(value.shape)}, wanted {self.shape(name)} as in the model; "
                "config.json and the weights do not match"
            )
        return value

    def check_dtypes(self) -> None:
        """Check the dtype of every parameter, without reading values.

        Raises:
            WeightError: as `dtype`.
        """
        for name in self.parts:
            self.dtype(name)

    def check(self, progress: Callable[[float, str], None] = lambda share, name: None) -> None:
        """Read every parameter once, so that errors are found before the long work begins.

        Raises:
            WeightError: as `read`.
        """
        self.check_dtypes()
        for number, name in enumerate(self.parts):
            progress(number / len(self.parts), name)
            self.read(name)
        progress(1.0, f"{len(self.parts)} tensors")

    def _convert(self, name: str, tensors: list[Tensor]) -> Tensor:
        parts = self.parts[name]
        assert parts[0].pattern is not None
        converter = deepcopy(self.converters[parts[0].pattern])
        for part, tensor in zip(parts, tensors, strict=True):
            converter.add_tensor(name, part.key, part.pattern, tensor)
        converted = converter.convert(name, model=self.model, config=self.model.config)
        value = converted[name]
        return value[0] if isinstance(value, list) else value

    def _open(self, file: Path) -> Any:
        if file not in self._handles:
            self._handles[file] = open_safetensors(file)
        return self._handles[file]

    def skeleton(self) -> Any:
        """The model class with its buffers computed and its parameters on the meta device, in eval mode."""
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                self.model.config, trust_remote_code=self.trust_remote_code, dtype=torch.float32
            )
        return model.eval()

    def fingerprint(self) -> str:
        """Identity of the model: SHA-256 over config.json and all of the weight files.

        They are read in full, because a fine-tuned model may differ only in the middle of a file.
        """
        digest = hashlib.sha256()
        weights = {part.file for parts in self.parts.values() for part in parts}
        for file in (self.folder / "config.json", *sorted(weights)):
            facts = file.stat()
            content = _digest(file, facts.st_size, facts.st_mtime_ns)
            digest.update(f"{file.name}:{content}\n".encode())
        return digest.hexdigest()


@lru_cache(maxsize=1024)
def _digest(file: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, read once per process unless its size or modification time changes."""
    return sha256_file(file)


def resolve(name: str, progress: Any = None) -> Path:
    """Folder of a model given as a local folder, `builtin:NAME` or a Hub id.

    Raises:
        SourceError: nothing is found there.
    """
    from pocketllm.source import builtin

    if name.startswith(builtin.BUILTIN_PREFIX):
        return builtin.fetch(name, progress or (lambda message: None))
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser, takes ~NOBODY as it is
    if path.is_dir():
        return path
    if path.exists():
        raise SourceError(f"{name}: a file; wanted a model folder with config.json and *.safetensors")
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local:
        raise SourceError(
            f"{name}: no such folder; wanted a model folder, a Hub id (owner/name) or builtin:…"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    local = f"no such folder in {path.parent}" if path.parent.is_dir() else "no local folder"

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS, ignore_patterns="*/*"))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        raise SourceError(
            f"{name}: {local}, and the Hub lookup failed ({reason_of(error)}); "
            "check the name, your login and the connection"
        ) from error
    except Exception as error:
        if "httpx" in type(error).__module__ or "requests" in type(error).__module__:
            raise SourceError(
                f"{name}: {local}, and the Hub cannot be reached ({error}); give a local folder"
            ) from error
        raise


def resolve_local(name: str) -> Path | None:
    """Folder of a model as in `resolve`, if it is already on this machine; nothing is downloaded."""
    from pocketllm.source import builtin

    if name.startswith(builtin.BUILTIN_PREFIX):
        return builtin.cached(name)
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser, takes ~NOBODY as it is
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS, local_files_only=True))
    except (OSError, HFValidationError, ValueError):
        return None


def open_dense(folder: Path, trust_remote_code: bool = False) -> DenseCheckpoint:
    """Open a dense checkpoint without reading weights.

    Raises:
        SourceError: config or safetensors missing, pickles only, already quantized, or a parameter of the
            model that no file holds.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    files = weight_files(folder)
    model = meta_model(folder, trust_remote_code)
    meta = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found: dict[str, list[_Part]] = {}
    unused, handles = [], {}
    for file in files:
        handles[file] = open_safetensors(file)
        for key in sorted(handles[file].keys(), key=_natural):
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, meta)
            if name not in meta and key in meta:
                name, pattern = key, None
            if name in meta:
                found.setdefault(name, []).append(_Part(file, key, pattern))
            else:
                unused.append(key)
    for parts in found.values():
        parts.sort(key=lambda part: _natural(part.key))
    tied = {
        name: source
        for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items()
        if source in found
    }
    missing = [name for name in meta if name not in found and name not in tied]
    if missing:
        raise SourceError(
            f"{folder}: no file contains {missing[0]} ({len(missing)} parameters missing); "
            "the checkpoint is incomplete, fetch it again"
        )
    stored = {name: found[name] for name in meta if name in found and name not in tied}
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    return DenseCheckpoint(
        folder, model, stored, by_pattern, sorted(unused), tied, trust_remote_code, handles
    )


def _check_values(where: str, tensor: Tensor) -> None:
    low, high = torch.aminmax(tensor) if tensor.numel() else (torch.zeros(1), torch.zeros(1))
    finite = bool(torch.isfinite(low) and torch.isfinite(high))
    if finite and (tensor.ndim < 2 or max(-float(low), float(high)) <= _LARGEST):
        return
    bad = tensor.abs() > _LARGEST if finite else ~torch.isfinite(tensor)
    what = f"beyond {_LARGEST:g}" if finite else "NaN or Inf"
    raise WeightError(
        f"{where}: {int(bad.sum())} of {tensor.numel()} values are {what}; "
        "the checkpoint is damaged, fetch it again"
    )


def _natural(key: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]
