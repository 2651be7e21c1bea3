"""PEFT's settings of an adapter, of which only those of plain LoRA are let through.

PEFT acts on a settings file: some of its keys import packages, read other files or run searches. What `lora`
writes, and what PEFT writes for plain LoRA, needs none of these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9_.\-]+")
_STRINGS = ("base_model_name_or_path", "revision", "task_type", "peft_version", "layers_pattern")
_SWITCHES = ("inference_mode", "fan_in_fan_out", "use_rslora", "use_dora", "lora_bias")
_NUMBERS = ("lora_alpha", "lora_dropout")
_RANKS = ("rank_pattern", "alpha_pattern")
_NAMES = ("target_modules", "exclude_modules", "modules_to_save")
_UNUSED = {"megatron_core": "megatron.core", "qalora_group_size": 16}  # PEFT writes them always


def check_settings(settings: Mapping[str, Any], largest_rank: int) -> None:
    """See that settings are those of plain LoRA.

    Args:
        largest_rank: of the stored tensors.

    Raises:
        ValueError: naming the key, what was got and what was wanted.
    """
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"peft_type: got {settings.get('peft_type')!r}, wanted 'LORA'")
    for key, value in settings.items():
        wanted = _wanted(key, value, largest_rank)
        if wanted:
            raise ValueError(f"{key}: got {str(value)[:80]!r}, wanted {wanted}")
    if "r" not in settings:
        raise ValueError("r: missing")


def _wanted(key: str, value: Any, largest_rank: int) -> str:
    """What a setting should be, '' where it is."""
    if key == "r":
        return "" if _is_rank(value, largest_rank) else f"a rank of 1 to {largest_rank}, as stored"
    if key == "bias":
        return "" if value == "none" else "'none'"
    if key == "init_lora_weights":
        return "" if isinstance(value, bool) or value == "gaussian" else "true, false or 'gaussian'"
    if value is None or key == "peft_type":
        return ""
    if key in _STRINGS:
        return (
            "" if isinstance(value, str) and (key != "layers_pattern" or _NAME.fullmatch(value)) else "a name"
        )
    if key in _SWITCHES:
        return "" if isinstance(value, bool) else "true or false"
    if key in _NUMBERS:
        return "" if _is_number(value) else "a number"
    if key in _NAMES:
        return "" if value == "all-linear" or _are_names(value) else "a list of names of modules"
    if key in _RANKS:
        return "" if _is_pattern(value, largest_rank if key == "rank_pattern" else None) else "ranks by name"
    if key == "layers_to_transform":
        numbers = value if isinstance(value, list) else [value]
        return "" if all(type(number) is int for number in numbers) else "numbers of blocks"
    if value == _UNUSED.get(key) or value in (False, "", [], {}):
        return ""
    return "nothing: an adapter in plain LoRA has no such setting"


def _are_names(value: Any) -> bool:
    names = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return names and all(_NAME.fullmatch(name) for name in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rank(value: Any, largest: int) -> bool:
    return type(value) is int and 1 <= value <= largest


def _is_pattern(value: Any, largest_rank: int | None) -> bool:
    if not isinstance(value, dict) or not all(_NAME.fullmatch(name) for name in value):
        return False
    return all(_is_number(v) if largest_rank is None else _is_rank(v, largest_rank) for v in value.values())
