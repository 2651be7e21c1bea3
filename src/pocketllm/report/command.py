"""From settings back to the command line: `pocketllm compress` options that give a configuration again."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocketllm.config import DEFAULT_PRESET, PRESETS, CalibrationConfig, CompressConfig

_TARGETS = {"target_bpw": "--bpw", "target_ratio": "--ratio", "target_bytes": "--size"}
_OPTIONS = [
    "vector_len",
    "codebook_size",
    "codebook_scope",
    "decoder_scope",
    "dense_first",
    "dense_last",
    "decoder",
    "norm",
    "init",
    "loss",
    "hidden",
    "depth",
    "vq_weight",
    "commitment_weight",
    "epochs",
    "learning_rate",
    "batch_size",
    "seed",
]
_SWITCHES = {"keep_embeddings": ("--keep-embeddings", ""), "row_scale": ("--row-scale", "--no-row-scale")}


@dataclass(frozen=True)
class Options:
    """Options for `pocketllm compress`. missing: settings that differ and that no option sets."""

    arguments: tuple[str, ...]
    missing: tuple[str, ...] = ()


def options_for(config: CompressConfig) -> Options:
    """The fewest `pocketllm compress` options that give this configuration.

    Every preset is tried as the starting point; the one that leaves least unsaid, then the shortest, wins.

    Example:
        >>> options_for(pocketllm.preset("paper-16x")).arguments
        ('--preset', 'paper-16x')
    """
    candidates = [_from_preset(name, config) for name in PRESETS]
    candidates.append(_from_default(config))
    return min(candidates, key=lambda found: (len(found.missing), len(found.arguments)))


def command_for(model: str, output: str, values: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The command that makes a model again, quoted for a shell, from a report's stored `config`.

    Args:
        model: as the user named it. output: folder to make. values: the report's `config`.

    Returns:
        (command, settings that no option sets). The command is empty where this version does not know the
        settings.
    """
    try:
        config = CompressConfig.from_dict(values)
    except Exception:  # whatever a later version may have stored: there is then no command to show
        return "", ()
    options = options_for(config)
    words = ["pocketllm", "compress", model, "-o", output, *options.arguments]
    return shlex.join(words), options.missing


def _from_preset(name: str, config: CompressConfig) -> Options:
    """Preset NAME and what is laid over it; its target cannot be changed on the command line."""
    arguments = [] if name == DEFAULT_PRESET else ["--preset", name]
    return _overlaid(arguments, PRESETS[name].config, config)


def _from_default(config: CompressConfig) -> Options:
    """The default preset with another target."""
    base = PRESETS[DEFAULT_PRESET].config
    targets = {key: getattr(config, key) for key in _TARGETS}
    given = [(key, value) for key, value in targets.items() if value is not None]
    if len(given) != 1:
        return _overlaid([], base, config)
    (key, value) = given[0]
    return _overlaid([_TARGETS[key], str(value)], dataclasses.replace(base, **targets), config)


def _overlaid(arguments: list[str], base: CompressConfig, wanted: CompressConfig) -> Options:
    """`arguments` give `base`; add what turns it into `wanted`."""
    before, after = _flat(base), _flat(wanted)
    missing = []
    for key in after:
        if after[key] == before[key]:
            continue
        switch = _SWITCHES.get(key, ("", ""))[0 if after[key] else 1]
        if switch:
            arguments.append(switch)
        elif key in _OPTIONS and after[key] is not None:
            arguments += [f"--{key.replace('_', '-')}", str(after[key])]
        else:
            missing.append(key)
    words, unsaid = _calibration(base.calibration, wanted.calibration)
    return Options((*arguments, *words), (*missing, *unsaid))


def _flat(config: CompressConfig) -> dict[str, Any]:
    """Field -> value, the codec's among them; its `vector_len` counts only where it is not overridden."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    del values["calibration"]
    codec = dataclasses.asdict(values.pop("codec"))
    codec["codec.vector_len"] = codec.pop("vector_len")
    return {**values, **codec}


def _calibration(
    base: CalibrationConfig | None, wanted: CalibrationConfig | None
) -> tuple[list[str], tuple[str, ...]]:
    if wanted == base:
        return [], ()
    if wanted is None:
        return ["--no-calibration"], ()
    start = base or CalibrationConfig()
    arguments = [word for text in wanted.texts for word in ("--calibration", text)]
    if wanted.tokens != start.tokens or (base is None and not wanted.texts):
        arguments += ["--calibration-tokens", str(wanted.tokens)]
    said = {"tokens", "texts"} if wanted.texts else {"tokens"}
    differing = [
        f"calibration.{f.name}"
        for f in dataclasses.fields(wanted)
        if f.name not in said and getattr(start, f.name) != getattr(wanted, f.name)
    ]
    return arguments, tuple(differing)
