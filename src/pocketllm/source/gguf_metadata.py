"""Sizes and settings in the metadata of a GGUF file, compared with the configuration that transformers makes of them.

transformers reads those keys that it knows for an architecture, and takes its defaults in place of the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketllm.errors import SourceError
from pocketllm.source.gguf_positions import need_positive

_EPSILON_NAMES = ("norm_eps", "norm_epsilon", "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps")
_EPSILON_KEYS = ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon")
"""A file may have both; which one counts depends on its type."""
_COMPARED = {
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("ffn_hidden_size", "intermediate_size"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "expert_count": ("num_experts", "num_local_experts"),
}
"""Key -> attributes of a configuration, the first that there is; a difference is refused: other settings follow."""
_SET = {
    **dict.fromkeys(_EPSILON_KEYS, _EPSILON_NAMES),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_used_count": ("num_experts_per_tok", "top_k_experts"),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}
"""As above; the configuration takes the value of the file."""
_BASES = {"rope.freq_base": "full_attention", "rope.freq_base_swa": "sliding_attention"}
"""Key -> the kind of layer that it is for, in a configuration with several."""
_PATTERNS = {
    "attention.sliding_window_pattern": "sliding_attention",
    "attention.recurrent_layers": "linear_attention",
}
"""Key -> the kind of layer that its list marks; a difference is refused."""
_READ = {
    *(*_COMPARED, *_SET, *_BASES, *_PATTERNS),
    *("attention.key_length", "attention.value_length", "attention.sliding_window", "rope.dimension_count"),
    *("rope.dimension_sections", "shortconv.l_cache", "ssm.conv_kernel", "ssm.inner_size", "ssm.state_size"),
    *("ssm.time_step_rank", "ssm.group_count", "full_attention_interval", "nextn_predict_layers"),
    *("context_length", "vocab_size", "tensor_data_layout", "use_parallel_residual", "pooling_type"),
}
"""Keys that are read here or by transformers, and keys that do not change the model: llama.cpp recognizes parallel
residuals by the tensors, as transformers does, and pooling follows the model."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("logit_scale", "embedding_scale", "residual_scale", "expert_weights_scale"), (0, 1)),
    "attention.causal": (True,),
}
"""Values of other keys that change nothing; for keys that are not listed, 0 (or False)."""
_GATES = {"minimax_m2": 2}
"""Model type -> number of the function that weights its experts (2: sigmoid); others have 1 (softmax)."""
_UNREADABLE = {
    "gemma4": "the sizes and scales of its layers",
    "gpt-oss": "its experts",
    "gpt_oss": "its experts",
    "mistral": "the order of the rows of its queries and keys (files of Mistral models have the type 'llama')",
}
"""Type -> the part that transformers does not read from GGUF files."""
_LARGEST = {"gemma2": 46, "gemma3_text": 62}
"""Model type -> number of blocks of its 27B model, which scales attention otherwise (as in llama.cpp)."""
_DEFAULT_BASE = 1e4  # of rotary positions in a file that names none, as in llama.cpp
_PRECISION = 1e-5  # of a number that a file holds in float32


@dataclass(frozen=True)
class Metadata:
    """What a GGUF file says about its architecture. values: by key, without the prefix of the architecture."""

    file: Path
    architecture: str
    values: dict[str, Any]

    @classmethod
    def of(cls, reader: Any, architecture: str, file: Path) -> Metadata:
        """Read it with a `GGUFReader`."""
        prefix = f"{architecture}."
        values = {
            name.removeprefix(prefix): field.contents()
            for name, field in reader.fields.items()
            if name.startswith(prefix)
        }
        return cls(file, architecture, values)

    def need_readable(self) -> None:
        """Raises SourceError for a type that transformers reads as another model, or a setting that is missing."""
        part = _UNREADABLE.get(self.architecture, "")
        if self.architecture == "falcon" and (self._value("attention.head_count_kv") or 1) > 1:
            part = "the order of its groups of queries, keys and values"
        if part:
            raise SourceError(
                f"{self.file}: a GGUF file of the type {self.architecture!r} cannot be read: transformers does not "
                f"read {part} from GGUF files; compress the original checkpoint (safetensors) instead"
            )
        needed: list[tuple[str, ...]] = [("attention.head_count",), _EPSILON_KEYS]
        if self._value("expert_count"):
            needed.append(("expert_used_count",))
        if self.architecture == "gemma3":
            needed.append(("attention.sliding_window",))
        for keys in needed:
            if not any(key in self.values for key in keys):
                raise SourceError(
                    f"{self.file}: does not say {self.architecture}.{keys[0]}, for which transformers would take "
                    "a default; compress the original checkpoint (safetensors) instead"
                )

    def is_of_further_block(self, tensor: str, blocks: int) -> bool:
        """Whether a tensor is of a block that predicts further tokens, which is no part of the model."""
        parts = tensor.split(".")
        number = int(parts[1]) if parts[0] == "blk" and parts[1].isdigit() else -1
        return blocks <= number < blocks + (self._value("nextn_predict_layers") or 0)

    def put_into(self, config: Any) -> None:
        """Set in transformers' configuration what it does not read.

        Raises:
            SourceError: a value that cannot be set, or is not possible.
        """
        self._need_known(config)
        one, other = (self._value(key) for key in _EPSILON_KEYS)
        if None not in (one, other) and one != other:
            raise self._refusal(_EPSILON_KEYS[0], one, f"{_EPSILON_KEYS[1]} {other}")
        for key, names in _COMPARED.items():
            name, found = _attribute(config, names)
            if found is None:
                if key == "expert_count" and self._value(key):
                    raise self._refusal(key, self.values[key], "no experts")
                continue
            if key == "block_count":
                # It counts blocks that predict further tokens, which transformers leaves out.
                found += self._value("nextn_predict_layers") or 0
            self._need(key, name, found)
        for key, names in _SET.items():
            value, (name, _) = self._value(key), _attribute(config, names)
            if value is None:
                continue
            if name not in vars(config):
                raise self._refusal(key, value, "no such setting")
            setattr(config, name, value)
        self._put_head(config)
        for key, part in _BASES.items():
            self._put_base(config, key, part)
        self._put_rotated(config)
        self._put_window(config)
        for key, kind in _PATTERNS.items():
            self._need_pattern(config, key, kind)
        if config.model_type in _LARGEST:  # no key of GGUF holds the scale of attention
            wide = config.num_hidden_layers == _LARGEST[config.model_type]
            width = config.hidden_size // config.num_attention_heads if wide else config.head_dim
            config.query_pre_attn_scalar = width

    def _need_known(self, config: Any) -> None:
        """Raises SourceError for settings that nobody reads, unless their values change nothing."""
        for key, value in self.values.items():
            neutral = _NEUTRAL.get(key, (0,))
            if key == "expert_gating_func":
                neutral = (0, _GATES.get(config.model_type, 1))
            if key not in _READ and not key.startswith("rope.scaling.") and value not in neutral:
                raise self._refusal(key, value, "no such setting")

    def _value(self, key: str) -> Any:
        """A positive number of the file; None if it has none, or 0 (there is no such part)."""
        value = self.values.get(key)
        found = set(value if isinstance(value, list) else [] if value is None else [value]) - {0}
        if len(found) > 1:
            raise self._refusal(key, value, "one value for every layer")
        number = next(iter(found), None)
        if number is not None:
            need_positive(number, f"{self.file}: {self.architecture}.{key}")
        return number

    def _need(self, key: str, name: str, found: Any) -> None:
        value = self._value(key)
        if value is not None and not math.isclose(value, found, rel_tol=_PRECISION):
            raise self._refusal(key, value, f"{name} {found}")

    def _put_head(self, config: Any) -> None:
        value = self._value("attention.key_length")
        if value is not None and "head_dim" in vars(config):
            config.head_dim = value
        width = _head(config)
        if width is not None:
            self._need("attention.key_length", "head_dim", width)
            self._need("attention.value_length", "head_dim", width)

    def _put_base(self, config: Any, key: str, part: str) -> None:
        value, every = self._value(key), getattr(config, "rope_parameters", None)
        if value is None and key == "rope.freq_base":
            value = _DEFAULT_BASE
        if value is None or not every:
            return
        if part in every:
            every[part]["rope_theta"] = value
        elif key == "rope.freq_base":
            every["rope_theta"] = value
        else:
            self._need(key, "rope_theta", every["rope_theta"])

    def _put_rotated(self, config: Any) -> None:
        key, every, width = "rope.dimension_count", getattr(config, "rope_parameters", None), _head(config)
        if not every or width is None:
            return
        own, value = every.get("full_attention", every), self._value(key) or width  # as in llama.cpp
        if "partial_rotary_factor" in own:
            share = value / width
            own["partial_rotary_factor"] = share if int(width * share) == value else math.nextafter(share, 2)
        else:
            self._need(key, "the number of rotated dimensions", width)

    def _put_window(self, config: Any) -> None:
        key, kinds = "attention.sliding_window", getattr(config, "layer_types", None)
        value, found = self._value(key), getattr(config, "sliding_window", None)
        limit = getattr(config, "max_position_embeddings", math.inf)
        if value is None or value == found or (found is None and value >= limit):
            return
        if not hasattr(config, "sliding_window") or (kinds and "sliding_attention" not in kinds):
            raise self._refusal(key, value, f"sliding_window {found}")
        config.sliding_window = value

    def _need_pattern(self, config: Any, key: str, kind: str) -> None:
        value, kinds = self.values.get(key), getattr(config, "layer_types", None)
        if not value or not kinds:
            return
        found = [own == kind for own in kinds]
        period = (
            [number % value < value - 1 for number in range(len(kinds))] if isinstance(value, int) else value
        )
        if list(period) != found:
            raise self._refusal(key, value, f"layer_types {found}")

    def _refusal(self, key: str, value: Any, found: str) -> SourceError:
        return SourceError(
            f"{self.file}: {self.architecture}.{key} is {value}, and transformers reads {found} from the file, which "
            "is another model; compress the original checkpoint (safetensors) instead"
        )


def _attribute(config: Any, names: tuple[str, ...]) -> tuple[str, Any]:
    """The first of some attributes that a configuration has, and its value."""
    name = next((name for name in names if hasattr(config, name)), names[-1])
    return name, getattr(config, name, None)


def _head(config: Any) -> Any:
    """Dimensions of a head of attention; None without attention."""
    heads = getattr(config, "num_attention_heads", None)
    return getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
