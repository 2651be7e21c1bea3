"""From the options of `pocketllm compress` to settings: a preset, modified by the options given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pocketllm.config.compress_config import TARGET_OPTIONS, CalibrationConfig, CompressConfig
from pocketllm.config.presets import DEFAULT_PRESET, PLAIN_PRESET, default_preset, preset
from pocketllm.config.recover_config import DistillConfig
from pocketllm.config.settings import Setting, parse_settings, refuse_options, replaced, settings_of, text_of
from pocketllm.errors import ConfigError

COMPRESS_OPTIONS = {
    **TARGET_OPTIONS,
    "keep_embeddings": "--keep-embeddings",
    "seed": "--seed",
    "max_memory_gb": "--max-memory",
    "calibration.texts": "--calibration",
    "calibration.compensate": "--compensate",
    "recover.texts": "--recover-text",
    "recover.loop.seed": "--seed",
}
"""Settings that have their own command-line option; `--set` refuses them."""
_RECOVER = "recover."


def compress_settings(chosen: str = DEFAULT_PRESET) -> dict[str, Setting]:
    """The settings of `pocketllm compress`, with their values in a preset.

    Raises:
        ConfigError: unknown preset.
    """
    return settings_of(preset(chosen)) | settings_of(DistillConfig(), _RECOVER)


@dataclass(frozen=True)
class CompressOptions:
    """The options of `pocketllm compress` that define the result.

    size: bytes of the output folder. calibration: texts. overrides: as in CompressConfig.
    compensate: steps; see CalibrationConfig. max_memory: most bytes of the process.
    settings: KEY=VALUE words of `--set`.
    """

    preset: str | None = None
    bpw: float | None = None
    ratio: float | None = None
    size: int | None = None
    calibration: tuple[str, ...] = ()
    no_calibration: bool = False
    keep_embeddings: bool = False
    overrides: tuple[tuple[str, float], ...] = ()
    seed: int = 0
    max_memory: int | None = None
    compensate: int | None = None
    settings: tuple[str, ...] = ()

    @cached_property
    def given(self) -> dict[str, Any]:
        """Values of `settings` by key.

        Raises:
            ConfigError: an unknown key, one with an option of its own, or a value of another type.
        """
        found = parse_settings(self.settings, compress_settings(), "pocketllm settings compress")
        refuse_options(found, COMPRESS_OPTIONS)
        return found

    def config(self) -> CompressConfig:
        """The preset, modified by these options.

        Settings of the networks and of independent indices do not apply to a trellis: if no preset is named, they
        select the preset without calibration, as `no_calibration` does.

        Raises:
            ConfigError: unknown preset, a value out of range, or options that cannot be combined.
        """
        targets = {"--bpw": self.bpw, "--ratio": self.ratio, "--size": self.size}
        _at_most_one({"--preset": self.preset, **targets})
        _at_most_one({**targets, "codebook_size": self.given.get("codebook_size")})
        given = {key: value for key, value in self.given.items() if not key.startswith(_RECOVER)}
        base = preset(self._start if self.preset is None else self.preset)
        if self.calibration:
            given["calibration.texts"] = self.calibration
        if self.compensate is not None:
            given["calibration.compensate"] = self.compensate
        return replaced(base, {**given, **self._options(), **self._calibration(base, given)})

    @property
    def _start(self) -> str:
        """The preset that the settings start from if none is named."""
        return default_preset(
            self.no_calibration, [key for key, value in self.given.items() if value is not None]
        )

    def note(self) -> str:
        """What settings have changed beyond their own values, for the user; empty if nothing."""
        if self.preset is not None or self.no_calibration or self._start == DEFAULT_PRESET:
            return ""
        keys = ", ".join(key for key in self.given if default_preset(False, [key]) != DEFAULT_PRESET)
        return (
            f"{keys} does not apply to the default, which chooses indices on a trellis: starting from preset "
            f"{self._start}, without calibration; name a preset to choose another"
        )

    def text_note(self) -> str:
        """What is calibrated on if no text is named, for the user; empty if one is, or without calibration."""
        calibration = self.config().calibration
        if calibration is None or calibration.texts:
            return ""
        return (
            "calibrated on Python's documentation, since no --calibration is given: text like its future inputs "
            "serves a model much better, and so does text that it writes itself (pocketllm sample)"
        )

    def recovery(self, texts: tuple[str, ...] = ()) -> DistillConfig:
        """Settings of the distillation that follows a compression.

        Args:
            texts: to train on; without any, the calibration texts.

        Raises:
            ConfigError: a value is out of range.
        """
        given = {key.removeprefix(_RECOVER): self.given[key] for key in self.recovery_keys}
        try:
            own = {"texts": texts or self.calibration, "loop.seed": self.seed}
            return replaced(DistillConfig(), {**given, **own})
        except ConfigError as error:
            raise ConfigError(f"{_RECOVER}{error}") from error

    @property
    def recovery_keys(self) -> list[str]:
        """The keys given that are settings of the recovery."""
        return [key for key in self.given if key.startswith(_RECOVER)]

    def _options(self) -> dict[str, Any]:
        """Settings from all options except `settings` and those of calibration."""
        values: dict[str, Any] = {"seed": self.seed}
        if self.max_memory is not None:
            values["max_memory_gb"] = self.max_memory / 1e9
        targets = {"target_bpw": self.bpw, "target_ratio": self.ratio, "target_bytes": self.size}
        if any(value is not None for value in targets.values()):
            values |= targets
        if self.keep_embeddings:
            values["keep_embeddings"] = True
        if self.overrides:
            values["overrides"] = self.overrides
        return values

    def _calibration(self, base: CompressConfig, given: Mapping[str, Any]) -> dict[str, Any]:
        """Calibration turned off, or on if the preset has none and texts or tokens are given."""
        keys = [key for key in given if key.startswith("calibration.")]
        named = ", ".join(COMPRESS_OPTIONS.get(key, key) for key in keys)
        if self.no_calibration:
            if keys:
                raise ConfigError(f"--no-calibration cannot be combined with {named}")
            return {"calibration": None}
        if base.calibration is not None or not keys:
            return {}
        codec = replaced(base.codec, {k[6:]: v for k, v in given.items() if k.startswith("codec.")})
        if codec.decoder != "lookup" or not codec.row_scale:
            raise ConfigError(
                f"{named}: got codec.decoder={codec.decoder} and codec.row_scale={text_of(codec.row_scale)} with the "
                f"preset {self.preset or PLAIN_PRESET}, calibration needs lookup and true; choose a calibrated or "
                f"lookup preset, or leave out {named}"
            )
        if {"calibration.texts", "calibration.tokens"}.isdisjoint(keys):
            raise ConfigError(
                f"{named}: the preset does not calibrate; give --calibration TEXT or --set calibration.tokens=N, "
                "or choose another preset"
            )
        return {"calibration": CalibrationConfig()}


def _at_most_one(options: Mapping[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} cannot be combined; give one")
