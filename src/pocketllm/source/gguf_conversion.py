"""Convert a GGUF file to a dense model folder, through transformers' own reading.

transformers dequantizes every tensor. The folder holds the values in bf16 (float16 or float32 if most weights of the
file are), the tokenizer, and a note of the file's quantization.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections import Counter
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from pocketllm.errors import SourceError, cannot_read, reason_of
from pocketllm.files import read_object, write_json
from pocketllm.source.folder import copy_file_mode, read_tokenizer
from pocketllm.source.gguf_metadata import Metadata
from pocketllm.source.gguf_positions import RotaryScaling
from pocketllm.source.model_files import WEIGHTS_NAME, check_counts
from pocketllm.source.value_checks import check_values

NOTE_NAME = "pocketllm_gguf.json"
_KEPT_DTYPES = {"F32": "float32", "F16": "float16"}  # everything else is kept in bfloat16


@dataclass(frozen=True)
class Quantization:
    """What a GGUF file says about itself.

    name: of the quantization, such as Q4_K_M. tensors: number of tensors by their type.
    """

    file: str
    name: str
    tensors: dict[str, int]


def convert(file: Path, folder: Path, tokenizer_files: list[Path], noted: bool = True) -> None:
    """Write the model in a GGUF file as a folder with safetensors and tokenizer.

    Args:
        tokenizer_files: from beside the file; with a vocabulary, they replace the tokenizer in the file, else (such as
            a chat template alone) they complete it. noted: write the note.

    Raises:
        SourceError: as `dense_folder`.
        WeightError: values that are not finite.
    """
    header = _Header.of(file)
    folder.mkdir()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".alone-") as place:
        alone = Path(place) / file.name  # so that transformers finds nothing but the file itself
        try:
            alone.symlink_to(file.absolute())
        except OSError:  # a system without links
            shutil.copyfile(file, alone)
        with redirect_stderr(StringIO()):  # a bar that no setting of transformers turns off
            _write_model(alone, header, folder)
            if not any(path.name.startswith(_VOCABULARY) for path in tokenizer_files):
                _write_tokenizer(alone, header, folder)
            for path in tokenizer_files:
                shutil.copyfile(path, folder / path.name)
    try:
        read_tokenizer(folder, False)
    except SourceError as error:
        beside = " and ".join(path.name for path in tokenizer_files)
        advice = f"fetch {beside} next to the file again" if beside else _TOKENIZER_ADVICE
        reason = _reason(error.__cause__ or error, file, folder)
        raise SourceError(f"{file}: its tokenizer cannot be read ({reason}); {advice}") from error
    if noted:
        write_json(folder / NOTE_NAME, asdict(header.quantization))


def needed_bytes(file: Path) -> int:
    """Disk that `convert` needs, about.

    Raises:
        SourceError: the file cannot be read.
    """
    header = _Header.of(file)
    weights = sum(math.prod(shape) for shape in header.shapes.values())
    return weights * (4 if header.dtype == "float32" else 2) + _SMALL_FILES_BYTES


_SMALL_FILES_BYTES = 64_000_000
"""A large tokenizer, and what else is written."""
_TOKENIZER_ADVICE = "put the model's tokenizer.json and tokenizer_config.json next to the file"
_VOCABULARY = ("tokenizer.", "vocab.")
"""Beginnings of the names of files that hold a tokenizer's vocabulary."""
_NOT_PARAMETERS = ("rope_freqs.", "rope_factors_")
"""Beginnings of the names of tensors that belong to the configuration."""


@dataclass(frozen=True)
class _Header:
    """What is read of a GGUF file before transformers reads it. shapes: of its tensors, last dimension first."""

    file: Path
    architecture: str
    quantization: Quantization
    dtype: str
    shapes: dict[str, tuple[int, ...]]
    metadata: Metadata
    positions: RotaryScaling

    def complete(self, config: Any) -> None:
        """Set in transformers' configuration what it does not read.

        Raises:
            SourceError: settings or positions that cannot be translated.
        """
        if "token_embd.weight" in self.shapes:  # transformers counts the tokens of the tokenizer instead
            config.vocab_size = self.shapes["token_embd.weight"][-1]
        self.metadata.put_into(config)
        self.positions.put_into(config, self.file)

    def need_all_used(self, model: Any) -> None:
        """Raises SourceError if the file holds more values than the model: transformers skips unknown tensors."""
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        places = sum(value.numel() for name, value in model.state_dict().items() if name not in tied)
        apart = ("output.weight",) if tied else ()  # a copy of the embedding, which some files store
        stored = sum(
            math.prod(shape)
            for name, shape in self.shapes.items()
            if name not in apart and not name.startswith(_NOT_PARAMETERS)
        )
        if stored > places:
            raise SourceError(
                f"{self.file}: holds {stored:,} values, and {type(model).__name__} has parameters for {places:,}: "
                f"transformers would ignore the others, such as a bias that the type {self.architecture!r} does not "
                "have; compress the original checkpoint (safetensors) instead"
            )

    @classmethod
    def of(cls, file: Path) -> _Header:
        """Raises SourceError if it is damaged, has positions that are not possible, or is one of several shards."""
        from gguf import GGUFReader

        try:
            reader = GGUFReader(file)
            architecture = str(_field(reader, "general.architecture"))
        except OSError as error:
            raise cannot_read(file, error) from error
        except Exception as error:  # it slices whatever it finds, and asks afterwards
            raise SourceError(
                f"{file}: not a readable GGUF file ({reason_of(error)}); truncated or damaged, fetch it again"
            ) from error
        shards = _field(reader, "split.count")
        if shards and int(shards) > 1:
            raise SourceError(
                f"{file}: one of {shards} shards; merge them into one file first (llama-gguf-split --merge)"
            )
        _need_apart(reader, file)
        weights: Counter[str] = Counter()
        for tensor in reader.tensors:
            weights[tensor.tensor_type.name] += tensor.n_elements
        most = max(weights, key=lambda name: weights[name], default="F32")
        return cls(
            file,
            architecture,
            Quantization(
                file.name, _type_name(reader, most), dict(Counter(t.tensor_type.name for t in reader.tensors))
            ),
            _KEPT_DTYPES.get(most, "bfloat16"),
            {tensor.name: tuple(int(size) for size in tensor.shape) for tensor in reader.tensors},
            Metadata.of(reader, architecture, file),
            RotaryScaling.of(reader, architecture, file),
        )


def _reason(error: BaseException, file: Path, place: Path) -> str:
    """The reason of an error, with the GGUF file in place of a temporary path or its folder."""
    return reason_of(error).replace(str(place), str(file)).replace(str(place.parent), str(file.parent))


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _need_apart(reader: Any, file: Path) -> None:
    """Raises SourceError if two tensors share bytes, or a tensor shares some with the header."""
    name, end = "the header", reader.data_offset
    for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
        if tensor.data_offset < end:
            raise SourceError(
                f"{file}: {tensor.name} overlaps {name} (starts at byte {tensor.data_offset}, wanted {end} or later); "
                "damaged, fetch it again"
            )
        name, end = tensor.name, tensor.data_offset + tensor.n_bytes


def _type_name(reader: Any, most: str) -> str:
    """The name of the file's type, such as Q4_K_M; that of most weights if the file does not say it."""
    from gguf import LlamaFileType

    try:
        return (
            LlamaFileType(int(_field(reader, "general.file_type")))
            .name.removeprefix("MOSTLY_")
            .removeprefix("ALL_")
        )
    except (TypeError, ValueError):
        return most


def _write_model(alone: Path, header: _Header, folder: Path) -> None:
    """Read the weights in float32, and write them in the dtype of the header with their configuration."""
    import torch
    import transformers
    from safetensors.torch import save_file

    where = f"{header.file}: a GGUF file of the type {header.architecture!r}"
    hint = "compress the original checkpoint (safetensors) instead"
    how: dict[str, Any] = {"gguf_file": alone.name}
    try:
        config = transformers.AutoConfig.from_pretrained(alone.parent, **how)
    except Exception as error:  # transformers raises whatever it comes upon
        raise SourceError(
            f"{where} cannot be read by transformers ({_reason(error, header.file, alone)}); {hint}"
        ) from error
    check_counts(config.to_dict(), list(header.shapes.values()), header.file, SourceError)
    header.complete(config)
    if hasattr(transformers, "GgufConfig"):
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        found: Any = transformers.AutoModelForCausalLM.from_pretrained(
            alone.parent, config=config, dtype=torch.float32, output_loading_info=True, **how
        )
        model, facts = found
    except Exception as error:
        raise SourceError(
            f"{where} cannot be read by transformers ({_reason(error, header.file, alone)}); {hint}"
        ) from error
    if facts["missing_keys"]:
        raise SourceError(
            f"{header.file}: no tensor for {min(facts['missing_keys'])} ({len(facts['missing_keys'])} parameters "
            "missing); the file is incomplete, fetch it again"
        )
    header.need_all_used(model)
    dtype = getattr(torch, header.dtype)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    _write_configs(model, dtype, folder)
    del model, found
    for name in state:
        state[name] = state[name].to(dtype).contiguous()
        check_values(f"{header.file}: {name}", state[name])
    save_file(state, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    copy_file_mode(folder, "config.json")


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


def _write_tokenizer(alone: Path, header: _Header, folder: Path) -> None:
    from transformers import AutoTokenizer

    try:
        made = AutoTokenizer.from_pretrained(alone.parent, gguf_file=alone.name)
        made.decode(made("a")["input_ids"])
    except Exception as error:  # as in `_write_model`
        raise SourceError(
            f"{header.file}: its tokenizer cannot be rebuilt ({_reason(error, header.file, alone)}); "
            f"{_TOKENIZER_ADVICE}"
        ) from error
    made.save_pretrained(folder)
