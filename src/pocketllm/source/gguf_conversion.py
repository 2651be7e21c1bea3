"""Convert a GGUF file to a dense model folder, through transformers' own reading.

transformers dequantizes every tensor. The folder holds the values in bf16 (float16 or float32 if most weights of the
file are), the tokenizer, and a note of the file's quantization.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

from pocketllm.errors import SourceError, reason_of
from pocketllm.files import copy_into, read_object, write_json
from pocketllm.source import gguf_tokenizer
from pocketllm.source.folder import copy_file_mode, read_tokenizer
from pocketllm.source.gguf_header import Header
from pocketllm.source.gguf_tokenizer import TOKENIZER_ADVICE
from pocketllm.source.model_files import WEIGHTS_NAME, check_counts
from pocketllm.source.value_checks import check_values

NOTE_NAME = "pocketllm_gguf.json"
CONVERSION = 2  # raised when files convert to another folder, so that cached ones are made again


def convert(file: Path, folder: Path, tokenizer_files: list[Path], noted: bool = True) -> None:
    """Write the model in a GGUF file as a folder with safetensors and tokenizer.

    Args:
        tokenizer_files: from beside the file; with a vocabulary, they replace the tokenizer in the file, else (such as
            a chat template alone) they complete it. noted: write the note.

    Raises:
        SourceError: as `dense_folder`.
        WeightError: values that are not finite.
    """
    header = Header.of(file)
    folder.mkdir()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".alone-") as place:
        alone = Path(place) / file.name  # so that transformers finds nothing but the file itself
        try:
            alone.symlink_to(file.absolute())
        except OSError:  # a system without links
            _copy(file, alone)
        with redirect_stderr(StringIO()):  # a bar that no setting of transformers turns off
            _write_model(alone, header, folder)
            rebuilt = not any(path.name.startswith(_VOCABULARY) for path in tokenizer_files)
            if rebuilt:
                _write_tokenizer(alone, header, folder)
            for path in tokenizer_files:
                _copy(path, folder / path.name)
    try:
        tokenizer = read_tokenizer(folder, False)
    except SourceError as error:
        beside = " and ".join(path.name for path in tokenizer_files)
        advice = f"fetch {beside} next to the file again" if beside else TOKENIZER_ADVICE
        reason = _reason(error.__cause__ or error, file, folder)
        raise SourceError(f"{file}: its tokenizer cannot be read ({reason}); {advice}") from error
    if not rebuilt:
        gguf_tokenizer.check_beside(tokenizer, header, [path.name for path in tokenizer_files])
    if noted:
        write_json(folder / NOTE_NAME, asdict(header.quantization))


def _copy(path: Path, target: Path) -> None:
    with target.open("wb") as out:
        copy_into(path, out)


def needed_bytes(file: Path) -> int:
    """Disk that `convert` needs, about.

    Raises:
        SourceError: the file cannot be read.
    """
    header = Header.of(file)
    weights = sum(math.prod(shape) for shape in header.shapes.values())
    return weights * (4 if header.dtype == "float32" else 2) + _SMALL_FILES_BYTES


_SMALL_FILES_BYTES = 64_000_000
"""A large tokenizer, and what else is written."""
_VOCABULARY = ("tokenizer.", "vocab.")
"""Beginnings of the names of files that hold a tokenizer's vocabulary."""


def _reason(error: BaseException, file: Path, place: Path) -> str:
    """The reason of an error, with the GGUF file in place of a temporary path or its folder."""
    return reason_of(error).replace(str(place), str(file)).replace(str(place.parent), str(file.parent))


def _write_model(alone: Path, header: Header, folder: Path) -> None:
    """Read the weights in float32, and write them in the dtype of the header with their configuration."""
    import torch
    from safetensors.torch import save_file

    model = _read_model(alone, header)
    dtype = getattr(torch, header.dtype)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    _write_configs(model, dtype, folder)
    del model
    for name in state:
        state[name] = state[name].to(dtype).contiguous()
        check_values(f"{header.file}: {name}", state[name])
    save_file(state, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    copy_file_mode(folder, "config.json")


def _read_model(alone: Path, header: Header) -> Any:
    """The model in float32, as transformers reads it with the settings of the header.

    Raises:
        SourceError: a type or settings that transformers does not read, or tensors that are not those of the model.
    """
    import torch
    import transformers

    header.metadata.need_readable()
    how: dict[str, Any] = {"gguf_file": alone.name}
    with _reading(alone, header):
        config = transformers.AutoConfig.from_pretrained(alone.parent, **how)
    if config.model_type == "mistral":  # by the name of the file; to gguf, and in what it computes, a Llama
        config.sliding_window = None
        config = transformers.LlamaConfig(**{**config.to_dict(), "model_type": "llama"})
    check_counts(config.to_dict(), list(header.shapes.values()), header.file, SourceError)
    header.complete(config)
    if hasattr(transformers, "GgufConfig"):
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    how |= {"config": config, "dtype": torch.float32}
    with _reading(alone, header):  # other shapes are ignored, so that they are named below
        found: Any = transformers.AutoModelForCausalLM.from_pretrained(
            alone.parent, output_loading_info=True, ignore_mismatched_sizes=True, **how
        )
    model, facts = found
    for name, stored, wanted in sorted(facts["mismatched_keys"]):
        reason = f"{name} has the shape {list(stored)}, wanted {list(wanted)}"
        raise _unreadable(header, reason)
    if facts["missing_keys"]:
        raise SourceError(
            f"{header.file}: no tensor for {min(facts['missing_keys'])} ({len(facts['missing_keys'])} parameters "
            "missing); the file is incomplete, fetch it again"
        )
    header.need_all_used(model)
    return model


@contextmanager
def _reading(alone: Path, header: Header) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers raises whatever it comes upon
        raise _unreadable(header, _reason(error, header.file, alone)) from error


def _unreadable(header: Header, reason: str) -> SourceError:
    return SourceError(
        f"{header.file}: a GGUF file of the type {header.architecture!r} cannot be read by transformers ({reason}); "
        "compress the original checkpoint (safetensors) instead"
    )


def _write_configs(model: Any, dtype: Any, folder: Path) -> None:
    model.config.dtype, model.config.architectures = dtype, [type(model).__name__]
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    config = read_object(path)
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _write_tokenizer(alone: Path, header: Header, folder: Path) -> None:
    try:
        gguf_tokenizer.write(alone, header, folder)
    except SourceError:
        raise
    except Exception as error:  # as in `_reading`
        raise SourceError(
            f"{header.file}: its tokenizer cannot be rebuilt ({_reason(error, header.file, alone)}); "
            f"{TOKENIZER_ADVICE}"
        ) from error
