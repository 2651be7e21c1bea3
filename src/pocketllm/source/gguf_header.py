"""What is read of a GGUF file before transformers reads it: shapes of tensors, settings, positions, quantization."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketllm.errors import SourceError, cannot_read, reason_of
from pocketllm.source.gguf_metadata import Metadata
from pocketllm.source.gguf_positions import RotaryScaling

_KEPT_DTYPES = {"F32": "float32", "F16": "float16"}  # everything else is kept in bfloat16
_TOKENIZER = ("model", "pre", "add_space_prefix", "add_bos_token", "tokens", "token_type")
_NOT_PARAMETERS = ("rope_freqs.", "rope_factors_")
"""Beginnings of the names of tensors that belong to the configuration."""


@dataclass(frozen=True)
class Quantization:
    """What a GGUF file says about itself.

    name: of the quantization, such as Q4_K_M. tensors: number of tensors by their type.
    """

    file: str
    name: str
    tensors: dict[str, int]


@dataclass(frozen=True)
class Header:
    """What is read of a GGUF file before transformers reads it.

    shapes: of its tensors, last dimension first. tokenizer: fields of its tokenizer; None for one that is not there.
    """

    file: Path
    architecture: str
    quantization: Quantization
    dtype: str
    shapes: dict[str, tuple[int, ...]]
    metadata: Metadata
    positions: RotaryScaling
    tokenizer: dict[str, Any]

    def complete(self, config: Any) -> None:
        """Set in transformers' configuration what it does not read.

        Raises:
            SourceError: settings or positions that cannot be translated.
        """
        if "token_embd.weight" in self.shapes:  # transformers counts the tokens of the tokenizer instead
            config.vocab_size = self.shapes["token_embd.weight"][-1]
            config.tie_word_embeddings = "output.weight" not in self.shapes
        if "position_embd.weight" in self.shapes:
            config.n_positions = self.shapes["position_embd.weight"][-1]
        self.metadata.put_into(config)
        self.positions.put_into(config, self.file)

    def need_all_used(self, model: Any) -> None:
        """Raises SourceError if the file holds more values than the model: transformers skips unknown tensors."""
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        places = sum(value.numel() for name, value in model.state_dict().items() if name not in tied)
        blocks = model.config.num_hidden_layers
        stored = sum(
            math.prod(shape)
            for name, shape in self.shapes.items()
            if not name.startswith(_NOT_PARAMETERS) and not self.metadata.is_of_further_block(name, blocks)
        )
        if stored > places:
            raise SourceError(
                f"{self.file}: holds {stored:,} values, and {type(model).__name__} has parameters for {places:,}: "
                f"transformers would ignore the others, such as a bias that the type {self.architecture!r} does not "
                "have; compress the original checkpoint (safetensors) instead"
            )

    @classmethod
    def of(cls, file: Path) -> Header:
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
            {key: _field(reader, f"tokenizer.ggml.{key}") for key in _TOKENIZER},
        )


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
