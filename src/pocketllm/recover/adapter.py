"""Adapters on disk: check the base of an adapter, run it, merge it into its base.

PEFT's own `merge_and_unload` on a model in mode `packed` silently drops the adapter: it adds to a weight that was
only decoded for that moment. So merging is done here on the decoded model, and logits are compared.

PEFT acts on a settings file: some of its keys import packages, read other files or run searches. So only the settings
of plain LoRA are accepted, which is all that `lora`, and PEFT for plain LoRA, write.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pocketllm.errors import ConfigError, ExtraError, FormatError, LoadError, reason_of
from pocketllm.files import need_regular, read_object
from pocketllm.format import checkpoint as ckpt
from pocketllm.recover.base_model import Base, identity
from pocketllm.torch_state import in_default_torch_state

RECORD_NAME, SETTINGS_NAME = "pocketllm-adapter.json", "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_TOLERANCE = 1e-3  # on logits, relative to their standard deviation
_NAME = re.compile(r"[A-Za-z0-9_.\-]+")
_STRINGS = ("base_model_name_or_path", "revision", "task_type", "peft_version", "layers_pattern")
_SWITCHES = ("inference_mode", "fan_in_fan_out", "use_rslora", "use_dora", "lora_bias")
_NUMBERS = ("lora_alpha", "lora_dropout")
_RANKS = ("rank_pattern", "alpha_pattern")
_NAMES = ("target_modules", "exclude_modules", "modules_to_save")
_UNUSED = {"megatron_core": "megatron.core", "qalora_group_size": 16}  # PEFT writes them always


def need_peft() -> None:
    """Check that PEFT, an optional package, is installed.

    Raises:
        ExtraError: it is not.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ExtraError(
            "LoRA needs PEFT, which is not installed: pip install 'pocketllm-codec[finetune]'"
        ) from error


def check_adapter(adapter: Path, base: Path) -> dict[str, Any]:
    """Check that an adapter is complete and was trained on this compressed model; returns its PEFT settings.

    Raises:
        FormatError: no adapter in the folder, a damaged one (names the file), or `base` is not a compressed model.
        ConfigError: it was trained on another base.
    """
    report = ckpt.read_report(base)
    path = adapter / SETTINGS_NAME
    if not os.path.lexists(path):
        raise FormatError(f"{adapter}: no {SETTINGS_NAME}; wanted an adapter in PEFT's format")
    settings = _read_object(path, ("peft_type",))
    shapes = _stored_shapes(adapter)
    try:
        check_settings(settings, _largest_rank(shapes))
    except ValueError as error:
        raise FormatError(f"{path}: {error}; only adapters in plain LoRA are read") from error
    record = read_record(adapter)
    if record is not None and record["base_identity"] != identity(report):
        raise ConfigError(
            f"{adapter}: was trained on {record['base']} (made from {record['base_model']}), not on "
            f"{base} (made from {report['model']}); name the base it was trained on"
        )
    return settings


def check_settings(settings: Mapping[str, Any], largest_rank: int) -> None:
    """Check that settings are those of plain LoRA.

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
    """What a setting should be; empty if the value is accepted."""
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


def _largest_rank(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Rank of the stored tensors, [rank, inputs] each."""
    ranks = [shape[0] for name, shape in shapes.items() if shape and re.search(r"lora_(embedding_)?A", name)]
    return max(ranks, default=0)


def read_record(adapter: Path) -> dict[str, Any] | None:
    """The record that `lora` stores with an adapter: its base and its training. None: trained elsewhere.

    Raises:
        FormatError: damaged.
    """
    path = adapter / RECORD_NAME
    if not os.path.lexists(path):
        return None
    return _read_object(path, ("base", "base_model", "base_identity"))


def _read_object(path: Path, wanted: tuple[str, ...]) -> dict[str, Any]:
    """Read the object in a JSON file of an adapter. wanted: keys whose values must be strings.

    Raises:
        FormatError: not a JSON object, or one that lacks such a string.
    """
    need_regular(path, FormatError)
    try:
        found = read_object(path)
        lacking = [key for key in wanted if not isinstance(found.get(key), str)]
        if lacking:
            raise ValueError(f"no {lacking[0]} in it")
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: damaged ({error}); fetch or train the adapter again") from error
    return found


def _stored_shapes(adapter: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapter's tensors by name. Checked here because PEFT asks the hub for a file that is missing.

    Raises:
        FormatError: the weight file is missing, truncated, or of another kind.
    """
    path = adapter / WEIGHTS_NAME
    if not os.path.lexists(path):
        raise FormatError(f"{path}: missing; fetch or train the adapter again")
    need_regular(path, FormatError)
    try:
        with safe_open(str(path), framework="pt") as handle:
            return {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{path}: not a readable safetensors file ({error}); fetch or train the adapter again"
        ) from error


@in_default_torch_state
def attach_adapter(model: Any, base: Path, adapter: Path) -> Any:
    """Put an adapter into a model loaded from the compressed folder `base`; returns the PeftModel around it.

    The model itself then computes with the adapter as well.

    Raises:
        FormatError: as `check_adapter`; PEFT cannot read the settings, or the weight file lacks a tensor.
        ConfigError: as `check_adapter`; or the adapter's layers do not fit the base.
    """
    need_peft()
    from peft import PeftModel, get_peft_model_state_dict

    settings = check_adapter(adapter, base)
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter), local_files_only=True).eval()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{adapter}: made for {settings.get('base_model_name_or_path')}, does not fit {base} "
            f"({reason_of(error)})"
        ) from error
    except Exception as error:  # what PEFT raises for settings it does not expect
        raise FormatError(
            f"{adapter / SETTINGS_NAME}: PEFT cannot read it ({error!r}); fetch or train the adapter again"
        ) from error
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    lacking = sorted(wanted - _stored_shapes(adapter).keys())
    if lacking:  # PEFT only warns, and leaves them as initialized
        raise FormatError(
            f"{adapter / WEIGHTS_NAME}: lacks {lacking[0]} ({len(lacking)} of {len(wanted)} tensors); "
            "fetch or train the adapter again"
        )
    return adapted


@torch.no_grad()
def merged(base: Base, adapter: Path, device: Any = "cpu") -> Any:
    """Merge an adapter into its base; returns a dense float32 model.

    Raises:
        LoadError: the logits after merging differ.
    """
    adapted = attach_adapter(base.load("dense", device), base.folder, adapter)
    ids = torch.arange(16, device=adapted.device)[None] % adapted.config.get_text_config().vocab_size
    before = adapted(input_ids=ids, use_cache=False).logits
    model = adapted.merge_and_unload()
    after = model(input_ids=ids, use_cache=False).logits
    gap = float((after - before).abs().max() / before.std())
    if not gap <= _TOLERANCE:
        raise LoadError(f"{adapter}: merging changed the logits (by {gap:.2g} of their spread); not written")
    return model
