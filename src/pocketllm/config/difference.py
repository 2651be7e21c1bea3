"""From settings back to the command line: the fewest options that give a configuration."""

from __future__ import annotations

import dataclasses

from pocketllm.config.compress_config import TARGET_OPTIONS, CompressConfig
from pocketllm.config.compress_options import COMPRESS_OPTIONS
from pocketllm.config.finetune_options import FINETUNE_METHODS, FINETUNE_OPTIONS
from pocketllm.config.presets import DEFAULT_PRESET, PLAIN_PRESET, PRESETS, default_preset
from pocketllm.config.recover_config import DistillConfig, LoraTuneConfig
from pocketllm.config.settings import settings_of, text_of


def as_options(config: CompressConfig) -> list[str]:
    """The fewest `pocketllm compress` options that give this configuration.

    Every preset is tried as the starting point: by name, and for the two default presets also without a name and
    with a target. `left_out` lists what no option gives.

    Example:
        >>> as_options(pocketllm.preset("paper-16x"))
        ['--preset', 'paper-16x']
    """
    if left_out(config):
        config = dataclasses.replace(config, target_bpw=PRESETS[PLAIN_PRESET].config.target_bpw)
    found = [
        ["--preset", name, *_changes(entry.config, config)]
        for name, entry in PRESETS.items()
        if _target(entry.config) == _target(config)
    ]
    return min([*found, *_unnamed(DEFAULT_PRESET, config), *_unnamed(PLAIN_PRESET, config)], key=len)


def left_out(config: CompressConfig) -> tuple[str, ...]:
    """Settings that no option gives: a target_bpw that no preset has, if codebook_size replaces it."""
    targets = [_target(entry.config) for entry in PRESETS.values()]
    return () if config.codebook_size is None or _target(config) in targets else ("target_bpw",)


def finetune_as_options(config: DistillConfig | LoraTuneConfig) -> list[str]:
    """The fewest `pocketllm finetune` options that give this configuration."""
    method = "lora" if isinstance(config, LoraTuneConfig) else "distill"
    words = ["--method", method] if method == "lora" else []
    before = settings_of(FINETUNE_METHODS[method])
    for key, setting in settings_of(config).items():
        value, option = setting.default, FINETUNE_OPTIONS.get(key)
        if value == before[key].default:
            continue
        if key == "texts":
            words += [word for text in value for word in ("--text", text)]
        elif option is not None and value is not None:
            words += [option, text_of(value)]
        else:
            words += ["--set", f"{key}={text_of(value)}"]
    return words


def _target(config: CompressConfig) -> tuple[float | None, ...]:
    return tuple(getattr(config, key) for key in TARGET_OPTIONS)


def _unnamed(preset: str, config: CompressConfig) -> list[list[str]]:
    """The options that give the configuration from a preset that is not named, so that a target can be given.

    Empty if the command line would not start from this preset, which depends on the options themselves.
    """
    base, words = PRESETS[preset].config, list[str]()
    if _target(base) != _target(config):
        if config.codebook_size is not None:
            return []
        targets = {key: getattr(config, key) for key in TARGET_OPTIONS}
        base = dataclasses.replace(base, **targets)
        for key, value in targets.items():
            words += [TARGET_OPTIONS[key], str(value)] if value is not None else []
    words += _changes(base, config)
    keys = [word.partition("=")[0] for word in words if not word.endswith("=none")]
    start = default_preset("--no-calibration" in words, keys)
    if start == preset:
        return [words]
    if preset == PLAIN_PRESET:  # an option that changes nothing selects the preset
        selecting = ["--set", f"codec.decoder={config.codec.decoder}"]
        return [[*words, *(["--no-calibration"] if config.calibration is None else selecting)]]
    return []


def _changes(base: CompressConfig, wanted: CompressConfig) -> list[str]:
    """The options that turn `base` into `wanted`, which has the same target."""
    words = [word for pattern, bits in wanted.overrides for word in ("--override", _override(pattern, bits))]
    words += ["--keep-embeddings"] if wanted.keep_embeddings else []
    words += ["--seed", str(wanted.seed)] if wanted.seed else []
    texts = wanted.calibration.texts if wanted.calibration else ()
    words += [word for text in texts for word in ("--calibration", text)]
    before, after = settings_of(base), settings_of(wanted)
    changed = {key for key in after if after[key].default != before[key].default} - COMPRESS_OPTIONS.keys()
    if wanted.calibration is None:
        changed = {key for key in changed if not key.startswith("calibration.")}
        words += ["--no-calibration"] if base.calibration is not None else []
    elif base.calibration is None and not texts:
        changed.add("calibration.tokens")  # given, it turns calibration on
    for key in after:
        words += ["--set", f"{key}={text_of(after[key].default)}"] if key in changed else []
    compensate = "calibration.compensate"
    if wanted.calibration is not None and after[compensate].default != before[compensate].default:
        words += [COMPRESS_OPTIONS[compensate], text_of(after[compensate].default)]
    return words


def _override(pattern: str, bits: float) -> str:
    return f"{pattern}={str(bits).removesuffix('.0')}"
