"""From settings back to the command line: the commands that reproduce a model or an adapter."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocketllm.config.checks import flat
from pocketllm.config.compress_config import CompressConfig
from pocketllm.config.difference import as_options, finetune_as_options, left_out
from pocketllm.config.recover_config import LoraTuneConfig
from pocketllm.config.settings import replaced
from pocketllm.errors import ConfigError


@dataclass(frozen=True)
class Command:
    """A command, quoted for a shell. missing: settings that no option sets.

    text: empty where this version does not know the settings.
    """

    text: str = ""
    missing: tuple[str, ...] = ()


def command_for(model: str, output: str, values: Mapping[str, Any]) -> Command:
    """The command that reproduces a model.

    Args:
        model: as the user named it. output: folder to create. values: the report's `config`.
    """
    try:
        config = CompressConfig.from_dict(values)
    except Exception:  # whatever a later version may have stored: there is then no command to show
        return Command()
    words = ["pocketllm", "compress", model, "-o", output, *as_options(config)]
    return Command(shlex.join(words), left_out(config))


def adapter_command(base: str, output: str, record: Mapping[str, Any]) -> Command:
    """The command that reproduces an adapter.

    Args:
        base: folder of the compressed model. output: folder to create. record: as `read_record`.
    """
    values, defaults = record.get("config"), LoraTuneConfig()
    found = flat(values) if isinstance(values, Mapping) else {}
    if found.keys() != flat(defaults.to_dict()).keys():
        return Command()
    try:
        config = replaced(
            defaults,
            {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()},
        )
    except (ConfigError, TypeError):  # a value of a later version
        return Command()
    return Command(shlex.join(["pocketllm", "finetune", base, "-o", output, *finetune_as_options(config)]))
