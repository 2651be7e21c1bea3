"""From settings back to the command line: `pocketllm compress` and `finetune` options that give them again."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocketllm.config import (
    DEFAULT_PRESET,
    PLAIN_PRESET,
    PLAIN_SETTINGS,
    PRESETS,
    REFINE_EPOCHS,
    TARGET_OPTIONS,
    CalibrationConfig,
    CompressConfig,
    LoraTuneConfig,
    flat,
)

_OPTIONS = [
    "vector_len",
    "codebook_size",
    "codebook_scope",
    "codebook_source",
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
_PLAIN_OPTIONS = {f"--{name.replace('_', '-')}" for name in PLAIN_SETTINGS}  # start from the plain preset
_PLAIN_OPTIONS |= {"--no-row-scale", "--no-calibration"}


_LORA_RENAMED = {"texts": "text", "validation_items": "validation-windows"}
_LORA_UNSAID = ("loop.warmup", "loop.max_grad_norm")  # no option sets them


@dataclass(frozen=True)
class Command:
    """A command, quoted for a shell. missing: settings that no option sets.

    text: empty where this version does not know the settings.
    """

    text: str = ""
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """Options for `pocketllm compress`. missing: settings that differ and that no option sets."""

    arguments: tuple[str, ...]
    missing: tuple[str, ...] = ()


def options_for(config: CompressConfig) -> Options:
    """The fewest `pocketllm compress` options that give this configuration.

    Every preset is tried as the starting point, and another target than a preset's; what leaves least unsaid,
    then the shortest, wins.

    Example:
        >>> options_for(pocketllm.preset("paper-16x")).arguments
        ('--preset', 'paper-16x')
    """
    candidates = [_overlaid(["--preset", name], entry.config, config) for name, entry in PRESETS.items()]
    candidates += [*_unnamed(DEFAULT_PRESET, config), *_unnamed(PLAIN_PRESET, config)]
    return min(candidates, key=lambda found: (len(found.missing), len(found.arguments)))


def command_for(model: str, output: str, values: Mapping[str, Any]) -> Command:
    """The command that makes a model again.

    Args:
        model: as the user named it. output: folder to make. values: the report's `config`.
    """
    try:
        config = CompressConfig.from_dict(values)
    except Exception:  # whatever a later version may have stored: there is then no command to show
        return Command()
    options = options_for(config)
    words = ["pocketllm", "compress", model, "-o", output, *options.arguments]
    return Command(shlex.join(words), options.missing)


def adapter_command(base: str, output: str, record: Mapping[str, Any]) -> Command:
    """The command that trains an adapter again.

    Args:
        base: folder of the compressed model. output: folder to make. record: as `read_record`.
    """
    values, defaults = record.get("config"), flat(LoraTuneConfig().to_dict())
    found = flat(values) if isinstance(values, Mapping) else {}
    if found.keys() != defaults.keys():
        return Command()
    words, missing = ["pocketllm", "finetune", base, "-o", output, "--method", "lora"], []
    for key, value in found.items():
        if value == defaults[key]:
            continue
        name = key.removeprefix("loop.")
        option = f"--{_LORA_RENAMED.get(name, name).replace('_', '-')}"
        if key in _LORA_UNSAID or value is None:
            missing.append(key)
        elif isinstance(value, list):
            words += [word for one in value for word in (option, str(one))]
        else:
            words += [option] if value is True else [option, str(value)]
    return Command(shlex.join(words), tuple(missing))


def _unnamed(preset: str, config: CompressConfig) -> list[Options]:
    """What gives the configuration from a preset that is not named, so that a target can be.

    None where the command line would not start from this preset: that depends on the options themselves.
    """
    base, arguments = PRESETS[preset].config, []
    targets = {key: getattr(config, key) for key in TARGET_OPTIONS}
    if config.codebook_size is None and any(targets[key] != getattr(base, key) for key in TARGET_OPTIONS):
        key = next(key for key, value in targets.items() if value is not None)
        arguments = [TARGET_OPTIONS[key], str(targets[key])]
        base = dataclasses.replace(base, **targets)
    found = _overlaid(arguments, base, config)
    is_plain = not _PLAIN_OPTIONS.isdisjoint(found.arguments)
    if preset == PLAIN_PRESET and not is_plain:  # one that changes nothing says where to start
        said = ["--no-calibration"] if config.calibration is None else ["--decoder", config.codec.decoder]
        return [Options((*found.arguments, *said), found.missing)]
    return [found] if is_plain == (preset == PLAIN_PRESET) else []


def _overlaid(arguments: list[str], base: CompressConfig, wanted: CompressConfig) -> Options:
    """`arguments` give `base`; add what turns it into `wanted`."""
    before, after = _flat(base), _flat(wanted)
    missing = []
    for key in after:
        if after[key] == before[key]:
            continue
        switch = _SWITCHES.get(key, ("", ""))[0 if after[key] else 1]
        if key == "overrides" and after[key]:
            for pattern, bits in after[key]:
                arguments += ["--override", f"{pattern}={str(bits).removesuffix('.0')}"]
        elif switch:
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
    said = {"tokens", "passes", "weigh_tokens", "two_sided", "rotate", "sequential"}
    arguments = [word for text in wanted.texts for word in ("--calibration", text)]
    if wanted.texts:
        said.add("texts")
    if wanted.tokens != start.tokens or (base is None and not wanted.texts):
        arguments += ["--calibration-tokens", str(wanted.tokens)]
    if wanted.passes != start.passes:
        arguments += ["--passes", str(wanted.passes)]
    if wanted.two_sided != start.two_sided:
        arguments.append("--two-sided" if wanted.two_sided else "--one-sided")
    for name in ("rotate", "sequential", "weigh_tokens"):
        if getattr(wanted, name) != getattr(start, name):
            option = name.replace("_", "-")
            arguments.append(f"--{option}" if getattr(wanted, name) else f"--no-{option}")
    if wanted.refine_epochs != start.refine_epochs and wanted.refine_epochs in (0, REFINE_EPOCHS):
        arguments.append("--refine" if wanted.refine_epochs else "--no-refine")
        said.add("refine_epochs")
    differing = [
        f"calibration.{f.name}"
        for f in dataclasses.fields(wanted)
        if f.name not in said and getattr(start, f.name) != getattr(wanted, f.name)
    ]
    return arguments, tuple(differing)
