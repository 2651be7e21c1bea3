"""The settings of `compress` and `demo`: a preset, with the options that were given laid over it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pocketllm.cli.render import parse_size
from pocketllm.config import (
    DEFAULT_PRESET,
    PLAIN_PRESET,
    PLAIN_SETTINGS,
    REFINE_EPOCHS,
    CalibrationConfig,
    CompressConfig,
    DistillConfig,
    preset,
)
from pocketllm.errors import ConfigError


def compress_config(
    chosen: str | None,
    bpw: float | None = None,
    ratio: float | None = None,
    nbytes: str | None = None,
    without_calibration: bool = False,
    **changes: Any,
) -> CompressConfig:
    """The preset, with the options that were given laid over it.

    Options of the networks and of independent indices have no meaning on a trellis: they, too, start from the
    preset without calibration.
    """
    plain = without_calibration or any(changes.get(name) is not None for name in PLAIN_SETTINGS)
    sizes = {
        "--bpw": bpw,
        "--ratio": ratio,
        "--size": nbytes,
        "--codebook-size": changes.get("codebook_size"),
    }
    _at_most_one({"--preset": chosen, "--bpw": bpw, "--ratio": ratio, "--size": nbytes})
    _at_most_one(sizes)
    config = preset(chosen or (PLAIN_PRESET if plain else DEFAULT_PRESET))
    if any(value is not None for value in (bpw, ratio, nbytes)):
        target_bytes = parse_size(nbytes) if nbytes is not None else None
        config = dataclasses.replace(config, target_bpw=bpw, target_ratio=ratio, target_bytes=target_bytes)
    given = {key: value for key, value in changes.items() if value is not None}
    codec_fields = {field.name for field in dataclasses.fields(config.codec)} - {"vector_len"}
    codec = {key: given.pop(key) for key in list(given) if key in codec_fields}
    return dataclasses.replace(config, codec=dataclasses.replace(config.codec, **codec), **given)


def _at_most_one(options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other; give one")


def with_calibration(
    config: CompressConfig,
    without: bool,
    texts: list[str] | None,
    tokens: int | None,
    refine: bool | None,
    **changes: Any,
) -> CompressConfig:
    """The options of calibration.

    Args:
        changes: settings of `CalibrationConfig`; None where not given.
    """
    found = config.calibration
    if refine is not None:
        epochs = (found.refine_epochs if found else 0) or REFINE_EPOCHS
        changes["refine_epochs"] = epochs if refine else 0
    changes |= {"texts": tuple(texts) if texts else None, "tokens": tokens}
    given = {key: value for key, value in changes.items() if value is not None}
    options = ", ".join(f"--{_OPTIONS.get(name, name)}" for name in given)
    if without:
        if given:
            raise ConfigError(f"--no-calibration excludes {options}")
        return dataclasses.replace(config, calibration=None)
    if found is None and given:
        if not texts and tokens is None:
            raise ConfigError(
                f"{options}: the preset does not calibrate; give --calibration, or another preset"
            )
        found = CalibrationConfig()
    return dataclasses.replace(config, calibration=dataclasses.replace(found, **given) if found else None)


_OPTIONS = {"texts": "calibration", "tokens": "calibration-tokens", "refine_epochs": "refine"}


def parse_overrides(options: list[str] | None) -> tuple[tuple[str, float], ...] | None:
    """(pattern, bits per weight) of each PATTERN=BITS.

    Raises:
        ConfigError: not of that form.
    """
    if not options:
        return None
    found = []
    for option in options:
        pattern, _, bits = option.rpartition("=")
        try:
            found.append((pattern, float(bits)))
        except ValueError:
            pattern = ""
        if not pattern:
            raise ConfigError(f"--override: got {option!r}, wanted PATTERN=BITS, as 'model.layers.0.*=4'")
    return tuple(found)


def recovery(
    method: str | None, texts: list[Path] | None, steps: int | None, config: CompressConfig
) -> DistillConfig | None:
    """The options of recovery."""
    if method is None:
        if texts or steps is not None:
            raise ConfigError("--recover-text and --recover-steps need --recover distill")
        return None
    if method != "distill":
        raise ConfigError(f"--recover: got {method!r}, wanted distill (for lora use pocketllm finetune)")
    chosen = tuple(map(str, texts or ())) or (config.calibration.texts if config.calibration else ())
    made = DistillConfig(texts=chosen, loop=dataclasses.replace(DistillConfig().loop, seed=config.seed))
    return made if steps is None else dataclasses.replace(made, steps=steps)
