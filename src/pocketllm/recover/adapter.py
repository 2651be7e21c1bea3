"""Adapters on disk: which base one belongs to, running it, and merging it into its base.

PEFT's own `merge_and_unload` on a model in mode `packed` drops the adapter without a word, since it adds to a
weight that was decoded for the moment. So a merge is done here on the decoded model, and logits are compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pocketllm.errors import ConfigError, ExtraError, FormatError, LoadError
from pocketllm.model import checkpoint as ckpt
from pocketllm.recover.setting import Base, identity

RECORD_NAME, SETTINGS_NAME = "pocketllm-adapter.json", "adapter_config.json"
_TOLERANCE = 1e-3  # of logits, relative to their spread


def need_peft() -> None:
    """PEFT is an extra.

    Raises:
        ExtraError: it is not installed.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ExtraError(
            "LoRA needs PEFT, which is not installed: pip install 'pocketllm-codec[finetune]'"
        ) from error


def check_adapter(adapter: Path, base: Path) -> dict[str, Any]:
    """PEFT's settings of an adapter that belongs to this compressed model.

    Raises:
        FormatError: no adapter there, or no compressed model. ConfigError: it was trained on another base.
    """
    path, report = adapter / SETTINGS_NAME, ckpt.read_report(base)
    if not path.is_file():
        raise FormatError(f"{adapter}: no {SETTINGS_NAME}; wanted an adapter in PEFT's form")
    try:
        record = adapter / RECORD_NAME
        facts = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
        settings = dict(json.loads(path.read_text(encoding="utf-8")))
        other = facts is not None and facts["base_identity"] != identity(report)
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{adapter}: malformed adapter ({error!r}); fetch or train it again") from error
    if facts is not None and other:
        raise ConfigError(
            f"{adapter}: was trained on {facts['base']} (made from {facts['base_model']}), not on "
            f"{base} (made from {report['model']}); name the base it belongs to"
        )
    return settings


def attach(model: Any, base: Path, adapter: Path) -> Any:
    """Put an adapter into a model loaded from the compressed folder `base`; the PeftModel around it.

    The model itself computes with the adapter afterwards, too.

    Raises:
        FormatError, ConfigError: as `check_adapter`; or the adapter's layers do not fit the base.
    """
    need_peft()
    from peft import PeftModel

    settings = check_adapter(adapter, base)
    try:
        return PeftModel.from_pretrained(model, str(adapter)).eval()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{adapter}: made for {settings.get('base_model_name_or_path')}, does not fit {base} "
            f"({str(error).splitlines()[0]})"
        ) from error


@torch.no_grad()
def merged(base: Base, adapter: Path, device: Any = "cpu") -> Any:
    """A dense float32 model that computes what base and adapter compute together.

    Raises:
        LoadError: the logits after merging differ.
    """
    adapted = attach(base.load("dense", device), base.folder, adapter)
    ids = torch.arange(16, device=adapted.device)[None] % adapted.config.get_text_config().vocab_size
    before = adapted(input_ids=ids, use_cache=False).logits
    model = adapted.merge_and_unload()
    after = model(input_ids=ids, use_cache=False).logits
    gap = float((after - before).abs().max() / before.std())
    if not gap <= _TOLERANCE:
        raise LoadError(f"{adapter}: merging changed the logits (by {gap:.2g} of their spread); not written")
    return model
