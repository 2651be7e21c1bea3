"""Scaled rotary positions in a GGUF file, which transformers does not read for most types.

Llama 3.1 and later store the factors that frequencies are divided by, as the tensor `rope_freqs.weight`; others name a
method (`rope.scaling.*`). Both are translated into transformers' settings.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketllm.errors import SourceError

_FACTORS = "rope_freqs.weight"
_LONG_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
_LLAMA = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_NAMES = {"factor": "factor", "original_context_length": "original_max_position_embeddings"}
_TRANSLATED = ("linear", "yarn")
_SCALED_PART = {"gemma3_text": "full_attention"}
"""Model type -> the only layers whose positions are scaled (linearly), for types with settings by kind of layer."""
_PRECISION = 1e-3  # of a factor


def need_positive(number: Any, where: str) -> None:
    """Raises SourceError unless it is a positive, finite number. where: the file and the key or tensor."""
    if not (isinstance(number, int | float) and math.isfinite(number) and number > 0):
        raise SourceError(
            f"{where} is {number!r}, wanted a positive number; the file is damaged, fetch it again"
        )


@dataclass(frozen=True)
class RotaryScaling:
    """What a GGUF file says about scaled positions.

    factors: by which each frequency is divided; empty if none are stored. method: `linear`, `yarn`, ...; empty if
    there is none. values: of the method, by the names of GGUF. is_other: factors are stored in another form.
    """

    factors: tuple[float, ...]
    method: str
    values: dict[str, Any]
    is_other: bool

    @classmethod
    def of(cls, reader: Any, architecture: str, file: Path) -> RotaryScaling:
        """Read it with a `GGUFReader`.

        Raises:
            SourceError: factors that are not positive and finite.
        """
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        factors = tensors[_FACTORS].data.reshape(-1).tolist() if _FACTORS in tensors else ()
        prefix = f"{architecture}.rope.scaling."
        values = {
            name.removeprefix(prefix): field.contents()
            for name, field in reader.fields.items()
            if name.startswith(prefix)
        }
        is_other = any(name in tensors for name in _LONG_FACTORS)
        method = str(values.pop("type", "linear" if "factor" in values else "none"))  # as in llama.cpp
        numbers = {_FACTORS: factors, f"{prefix}factor": [values["factor"]] if "factor" in values else []}
        for name, found in numbers.items():
            for number in found:
                need_positive(number, f"{file}: {name}")
        return cls(tuple(factors), "" if method == "none" else method, values, is_other)

    def put_into(self, config: Any, file: Path) -> None:
        """Set it in transformers' configuration of the model, unless transformers has done so.

        Raises:
            SourceError: a scaling that cannot be translated.
        """
        every = getattr(config, "rope_parameters", None) or {}
        part = _SCALED_PART.get(getattr(config, "model_type", ""))
        own = every if part is None else every.get(part, {})
        if own.get("rope_type", "default") != "default":
            return
        found = self._translated()
        if self.is_other or found is None or (found and "rope_theta" not in own):
            raise self._refusal(file)
        if part is not None and found and found["rope_type"] != "linear":
            raise self._refusal(file)
        if found:
            config.rope_parameters = {**own, **found} if part is None else {**every, part: {**own, **found}}
        if self._is_by_factor and not self._agrees(config):
            raise self._refusal(file)

    @property
    def _is_by_factor(self) -> bool:
        return any(abs(factor - 1) > _PRECISION for factor in self.factors)

    def _translated(self) -> dict[str, Any] | None:
        """Settings of transformers, none if nothing is scaled; None if there are no such settings."""
        values = {_NAMES[name]: value for name, value in self.values.items() if name in _NAMES}
        unknown = {name: value for name, value in self.values.items() if name not in (*_NAMES, "finetuned")}
        if not self.method and any(value not in (0, 1) for value in unknown.values()):
            return None
        if self._is_by_factor:
            return None if self.method else {"rope_type": "llama3", "factor": max(self.factors), **_LLAMA}
        if not self.method:
            return {}
        if self.method not in _TRANSLATED or unknown or "factor" not in values:
            return None
        return {"rope_type": self.method, **values}

    def _agrees(self, config: Any) -> bool:
        """Whether a configuration scales frequencies by the factors."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        unscaled = deepcopy(config)
        unscaled.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": 1.0}
        plain, scaled = (
            ROPE_INIT_FUNCTIONS[c.rope_parameters["rope_type"]](c)[0] for c in (unscaled, config)
        )
        found = (plain / scaled).tolist()
        pairs = zip(found, self.factors, strict=False)
        close = all(abs(one - other) <= _PRECISION * other for one, other in pairs)
        return len(found) == len(self.factors) and close

    def _refusal(self, file: Path) -> SourceError:
        how = f"the method {self.method!r}" if self.method else "factors for each frequency"
        return SourceError(
            f"{file}: scales rotary positions by {how}, in a form that transformers does not read from GGUF files; "
            "compress the original checkpoint (safetensors) instead"
        )
