"""The stored tensors that each parameter of a model is built from.

transformers renames, merges and splits tensors while it loads (a Mixtral checkpoint stores every expert
separately, the model holds one 3-D parameter), dequantizes some formats, and ties parameters. Its own
conversions are applied here, one parameter at a time; their results determine which parameters a checkpoint
lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketllm.errors import SourceError, reason_of
from pocketllm.source.folder import open_safetensors
from pocketllm.source.model_class import shared_modules

STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Part:
    """A stored tensor. pattern: of the conversion that takes it; None if it is stored as the model holds it."""

    file: Path
    key: str
    pattern: str | None


@dataclass
class Assembly:
    """The parts of every stored parameter.

    parts: parameter name -> the tensors it is built from. lead: for a parameter that a conversion produces
    together with others, the one that names the conversion. converters: by pattern. unused: stored names that no
    parameter is built from. handles: of open files.
    """

    model: Any
    parts: dict[str, list[Part]]
    lead: dict[str, str]
    converters: dict[str, Any]
    unused: list[str]
    handles: dict[Path, Any] = field(default_factory=dict)

    def slices(self, name: str) -> list[Any]:
        """Dtypes and shapes of the parts of a parameter, without reading values."""
        return [self._open(part.file).get_slice(part.key) for part in self.parts[name]]

    def tensors(self, name: str) -> list[Tensor]:
        """The parts of a parameter as they are stored."""
        return [self._open(part.file).get_tensor(part.key) for part in self.parts[name]]

    def is_converted(self, name: str) -> bool:
        """Whether a parameter is made by a conversion."""
        return self.parts[name][0].pattern is not None

    def converted(self, name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
        """The result of a parameter's conversion: this parameter, and others produced with it.

        Raises:
            SourceError: transformers cannot convert them.
        """
        parts, lead = self.parts[name], self.lead.get(name, name)
        converter = deepcopy(self.converters[str(parts[0].pattern)])
        for part, tensor in zip(parts, tensors, strict=True):
            converter.add_tensor(lead, part.key, part.pattern, tensor)
        try:
            made = converter.convert(lead, model=self.model, config=self.model.config)
        except Exception as error:  # whatever a conversion makes of tensors it did not expect
            raise SourceError(
                f"{name}: transformers cannot build it from {parts[0].key} in {parts[0].file.name} "
                f"({reason_of(error)}); fetch the checkpoint again"
            ) from error
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    def _open(self, file: Path) -> Any:
        if file not in self.handles:
            self.handles[file] = open_safetensors(file)
        return self.handles[file]


def assemble(files: list[Path], model: Any, quantizer: Any = None) -> Assembly:
    """Find the parts of every parameter of a model (on the meta device) in safetensors files.

    Args:
        quantizer: transformers' quantizer of a checkpoint that is to be dequantized.

    Raises:
        SourceError: a file cannot be read, or tensors that transformers cannot convert.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    meta, prefix = model.state_dict(), model.base_model_prefix
    mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    found = Assembly(model, {}, {}, by_pattern, [])
    for file in files:
        for key in sorted(found._open(file).keys(), key=_natural):
            name, pattern = rename_source_key(key, renamings, converters, prefix, meta)
            if name not in meta and key in meta:
                name, pattern = rename_source_key(key, [], [], prefix, meta)
            if name in meta:
                found.parts.setdefault(name, []).append(Part(file, key, pattern))
            else:
                found.unused.append(key)
    for parts in found.parts.values():
        parts.sort(key=lambda part: _natural(part.key))
    for name in list(found.parts):
        _add_made_together(found, name, meta)
    found.unused.sort()
    return found


def _add_made_together(found: Assembly, name: str, meta: Mapping[str, Any]) -> None:
    """Assign the same parts to all parameters that one conversion produces."""
    parts = found.parts[name]
    if parts[0].pattern is None or len(found.converters[parts[0].pattern].target_patterns) < 2:
        return
    shapes = [(s.get_shape(), STORED_DTYPES[s.get_dtype()]) for s in found.slices(name)]
    empty = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes]
    for made in found.converted(name, empty):
        if made != name and made in meta and made not in found.parts:
            found.parts[made], found.lead[made] = parts, name


def settle_tied(
    found: Assembly, tied: Mapping[str, str], read: Callable[[str], Tensor]
) -> dict[str, str] | None:
    """Resolve tied parameters by what is stored, and assign the parts to one name of each group.

    Args:
        tied: parameter -> the parameter that the configuration ties it to. read: reads a parameter that has parts.

    Returns:
        What is tied: parameter -> the parameter it is tied to. None if parameters that should be tied are stored
            with different values, which makes the configuration wrong.
    """
    groups: dict[str, list[str]] = {}
    for target, source in tied.items():
        groups.setdefault(source, [source]).append(target)
    for names in groups.values():
        stored = [name for name in names if name in found.parts]
        if any(not torch.equal(read(stored[0]), read(other)) for other in stored[1:]):
            return None
    for source, names in groups.items():
        stored = [name for name in names if name in found.parts]
        if stored:  # under whichever name
            found.lead.setdefault(source, found.lead.get(stored[0], stored[0]))
            found.parts[source] = found.parts[stored[0]]
        for name in names[1:]:
            found.parts.pop(name, None)
    return {target: source for target, source in tied.items() if source in found.parts}


def settle_shared(found: Assembly, read: Callable[[str], Tensor], folder: Path) -> dict[str, str]:
    """Give the parameters of modules that the model holds under several paths their first names.

    Args:
        read: as in `settle_tied`. folder: of the checkpoint, for the message.

    Returns:
        Every further name -> the first, which has the parts.

    Raises:
        SourceError: stored under both names, with different values.
    """
    shared = shared_modules(found.model)
    paths = {name: name.rpartition(".")[0] for name in found.model.state_dict()}
    same = {n: f"{shared[path]}.{n.rpartition('.')[2]}" for n, path in paths.items() if path in shared}
    stored = [name for name in same if name in found.parts]
    if settle_tied(found, same, read) is None:
        raise SourceError(
            f"{folder}: stores {stored[0]} and {same[stored[0]]} with different values, but in "
            f"{type(found.model).__name__} they are one parameter; the checkpoint is of another version of the model"
        )
    return same


def lend_parts(found: Assembly, tied: Mapping[str, str]) -> None:
    """Give parameters that are no longer tied and not stored the parts of those they were tied to."""
    pairs = [pair for target, source in tied.items() for pair in ((target, source), (source, target))]
    for name, other in pairs:
        if name not in found.parts and other in found.parts:
            found.parts[name] = found.parts[other]
            found.lead[name] = found.lead.get(other, other)


def _natural(key: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]
