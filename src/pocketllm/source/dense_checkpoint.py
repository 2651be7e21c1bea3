"""Read a dense Hugging Face checkpoint tensor by tensor, under the names the model class uses.

Memory does not grow with the model: parameters are assembled one at a time from their stored parts (`assembly.py`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketllm.errors import ConfigError, SourceError, WeightError
from pocketllm.files import is_utf8, sha256_file
from pocketllm.source.assembly import (
    STORED_DTYPES,
    Assembly,
    Part,
    assemble,
    lend_parts,
    settle_shared,
    settle_tied,
)
from pocketllm.source.folder import dequantizer, meta_model
from pocketllm.source.gguf_model import SUFFIX, dense_folder, find_gguf, read_note
from pocketllm.source.hub import download, downloaded, split_hub_id
from pocketllm.source.model_class import build
from pocketllm.source.model_files import weight_files
from pocketllm.source.value_checks import check_values
from pocketllm.torch_state import in_default_torch_state

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_CHECKED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class DenseCheckpoint:
    """An opened dense model.

    folder: of its files. model: the model class on the meta device (shapes, no weights). assembly: what its
    parameters are built from. tied: parameter name -> the parameter it is tied to. is_untied: the configuration
    ties parameters that are stored with different values, so that none are tied. is_quantized: stored in a
    quantized form that transformers dequantizes. trust_remote_code: as given by the user.
    """

    folder: Path
    model: Any
    assembly: Assembly
    tied: dict[str, str]
    is_untied: bool = False
    is_quantized: bool = False
    trust_remote_code: bool = False

    @property
    def parts(self) -> dict[str, list[Part]]:
        """Parameter name -> the stored tensors it is built from."""
        return self.assembly.parts

    @property
    def unused(self) -> list[str]:
        """Stored names that the model does not use."""
        return self.assembly.unused

    @cached_property
    def gguf(self) -> dict[str, Any] | None:
        """The quantization of the GGUF file that the model was read from: file, name, tensors by type; None without."""
        return read_note(self.folder)

    @property
    def files(self) -> set[Path]:
        """The weight files; what is read of them maps them into memory."""
        return {part.file for parts in self.parts.values() for part in parts}

    def names(self) -> list[str]:
        """Stored parameter names in the model's order."""
        return list(self.parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter as the model holds it."""
        return tuple(self.model.get_parameter_or_buffer(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a parameter: the stored one, or that of the model where it is dequantized.

        Raises:
            WeightError: not a type that can be read. Integers and booleans are read where the model holds such.
        """
        own = self.model.get_parameter_or_buffer(name).dtype
        stored = [str(part.get_dtype()) for part in self.assembly.slices(name)]
        if all(dtype in FLOAT_DTYPES for dtype in stored):
            return STORED_DTYPES[stored[0]]
        is_read = all(dtype in STORED_DTYPES for dtype in stored)
        if is_read and self.is_quantized and self.assembly.is_converted(name):
            return torch.bfloat16 if own == torch.float32 else own
        if is_read and not own.is_floating_point and not STORED_DTYPES[stored[0]].is_floating_point:
            return STORED_DTYPES[stored[0]]
        raise WeightError(
            f"{name}: stored as {stored[0]} in {self.parts[name][0].file.name}, wanted one of "
            f"{', '.join(FLOAT_DTYPES)}; compress the unquantized checkpoint instead"
        )

    def read(self, name: str) -> Tensor:
        """One parameter, stored dtype, as the model holds it.

        Raises:
            WeightError: unsupported dtype, NaN, Inf or absurdly large values, or a shape the model does not
                have.
            SourceError: transformers cannot build it from what is stored.
        """
        dtype = self.dtype(name)
        tensors = self.assembly.tensors(name)
        for part, tensor in zip(self.parts[name], tensors, strict=True):
            if tensor.dtype in _CHECKED:
                check_values(f"{part.key} in {part.file.name}", tensor)
        value = tensors[0]
        if self.assembly.is_converted(name):
            made = self.assembly.converted(name, tensors)
            value = made[name] if name in made else made[self.assembly.lead[name]]
            if self.is_quantized:
                value = value.detach().to(dtype)
                check_values(name, value)
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

    def skeleton(self) -> Any:
        """The model class with its buffers computed and its parameters on the meta device, in eval mode."""
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            model = build(self.model.config, self.trust_remote_code, dtype=torch.float32)
        return model.eval()

    def fingerprint(self) -> str:
        """Identity of the model: SHA-256 over config.json and all of the weight files.

        They are read in full, because a fine-tuned model may differ only in the middle of a file.
        """
        digest = hashlib.sha256()
        for file in (self.folder / "config.json", *sorted(self.files)):
            facts = file.stat()
            content = _digest(file, facts.st_size, facts.st_mtime_ns)
            digest.update(f"{file.name}:{content}\n".encode())
        return digest.hexdigest()


@lru_cache(maxsize=1024)
def _digest(file: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, read once per process unless its size or modification time changes."""
    return sha256_file(file)


def resolve(
    name: str, progress: Callable[[str], None] = lambda message: None, revision: str | None = None
) -> Path:
    """Folder of a model: a local folder, a GGUF file, `builtin:NAME` or a Hub id (`owner/name[@revision]`).

    Args:
        progress: called with a description of the current step of a download or conversion.
        revision: branch, tag or commit of a Hub id, if it is not part of the name.

    Raises:
        SourceError: nothing is found there.
        ConfigError: a revision of something else than a Hub id.
    """
    from pocketllm.source import builtin

    if revision is not None:
        return download(_at_revision(name, revision))
    if name.startswith(builtin.BUILTIN_PREFIX):
        return builtin.fetch(name, progress)
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser, takes ~NOBODY as it is
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # a name that the system does not take
        raise SourceError(f"{name}: no such folder ({error})") from error
    gguf = find_gguf(path) if is_there else None
    if gguf is not None:
        return dense_folder(gguf, progress)
    if is_folder:
        if not is_utf8(str(path)):
            raise SourceError(
                f"{str(path)!a}: the name is not UTF-8, which no tokenizer can open; rename the folder, or run in a "
                "UTF-8 locale"
            )
        return path
    if is_there:
        raise SourceError(
            f"{name}: a file; wanted a model folder with config.json and *.safetensors, or a file *.gguf"
        )
    if path.suffix.lower() == SUFFIX:
        raise SourceError(f"{name}: no such file; check the path of the GGUF file")
    if split_hub_id(name) is None:
        raise SourceError(
            f"{name}: no such folder; wanted a model folder, a Hub id (owner/name) or builtin:…"
        )
    return download(name)


def _at_revision(name: str, revision: str) -> str:
    """A Hub id with its revision."""
    if "@" in name or split_hub_id(name) is None or os.path.exists(name):
        raise ConfigError(
            f"revision: got {revision!r} for {name}, wanted a Hub id (owner/name) without a revision of its own; "
            "local folders have none"
        )
    return f"{name}@{revision}"


def resolve_local(name: str) -> Path | None:
    """Folder of a model as in `resolve`, if it is already on this machine; nothing is downloaded."""
    from pocketllm.source import builtin

    if name.startswith(builtin.BUILTIN_PREFIX):
        return builtin.cached(name)
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser, takes ~NOBODY as it is
    gguf = find_gguf(path) if path.exists() else None
    if gguf is not None:
        return dense_folder(gguf)
    return path if path.is_dir() else downloaded(name)


@in_default_torch_state
def open_dense(folder: Path, trust_remote_code: bool = False) -> DenseCheckpoint:
    """Open a dense checkpoint without reading weights, except those that are stored more than once.

    Raises:
        SourceError: config or safetensors missing, pickles only, quantized in an unsupported format, or a parameter
            of the model that no file holds.
    """
    files = weight_files(folder)
    quantizer = dequantizer(folder, trust_remote_code)
    model = meta_model(folder, trust_remote_code)
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    opened = DenseCheckpoint(
        folder=folder,
        model=model,
        assembly=assemble(files, model, quantizer),
        tied={},
        is_quantized=quantizer is not None,
        trust_remote_code=trust_remote_code,
    )
    aliases = settle_shared(opened.assembly, opened.read, folder)
    tied = settle_tied(opened.assembly, ties, opened.read)
    if tied is None:
        opened.model = meta_model(folder, trust_remote_code, ties=False)
        opened.assembly = assemble(files, opened.model, quantizer)
        lend_parts(opened.assembly, ties)
        aliases = settle_shared(opened.assembly, opened.read, folder)
        opened.is_untied = True
    opened.tied = tied or {}
    parts, meta = opened.parts, opened.model.state_dict()
    missing = [name for name in meta if name not in parts and name not in {**opened.tied, **aliases}]
    if missing:
        raise SourceError(
            f"{folder}: no file contains {missing[0]} ({len(missing)} parameters missing); the checkpoint is "
            "incomplete, fetch it again (if a head shares the embedding, config.json must say "
            "tie_word_embeddings: true)"
        )
    opened.assembly.parts = {name: parts[name] for name in meta if name in parts}
    return opened
