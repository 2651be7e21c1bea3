"""Ways to damage a folder, drawn at random: bits, lengths, JSON values, files that come, go or are none."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pocketllm.format.checkpoint import REPORT_NAME, file_facts

Damage = Callable[[Path, random.Random], str]
"""Damages a folder and says how."""

_ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1 << 40,
    1 << 70,
    0.5,
    float("nan"),
    "wide",
    "",
    [],
    {},
    [[]],
    "\ud83d",
)
_STRAY = (
    *(
        "added_tokens.json",
        "special_tokens_map.json",
        "adapter_config.json",
        "chat_template.jinja",
        "vocab.json",
    ),
    *(
        "additional_chat_templates/tool_use.jinja",
        "generation_config.json",
        "pytorch_model.bin",
        "modeling.py",
    ),
    *("model.safetensors.index.json", "model-00001-of-00002.safetensors", "tokenizer.model", "merges.txt"),
)
_STRAY_TEXT = (
    "{}",
    '{"hello": 95}',
    '{"weight_map": {"lm_head.weight": "../outside.safetensors"}}',
    '{"weight_map": {"lm_head.weight": "weights.bin"}}',
    '{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "megatron_config": {"a": 1}, '
    '"megatron_core": "owned"}',
    "no JSON",
)


def damage(folder: Path, random_: random.Random) -> str:
    """Damage one file of a folder in one way; says what was done."""
    kinds: list[tuple[int, Damage]] = [
        (3, _flip),
        (2, _truncate),
        (6, _edit),
        (3, _edit_and_sign),
        (1, _garbage),
        (1, _deep),
        (1, _remove),
        (3, _stray),
        (2, _no_file),
        (1, _permissions),
    ]
    kind = random_.choices([how for _, how in kinds], [weight for weight, _ in kinds])[0]
    return f"{kind.__name__.strip('_')} {kind(folder, random_)}"


def _file(folder: Path, random_: random.Random, suffix: str = "") -> Path:
    files = sorted(p for p in folder.rglob(f"*{suffix}") if p.is_file() and p.stat().st_size)
    return random_.choice(files)


def _flip(folder: Path, random_: random.Random) -> str:
    path = _file(folder, random_)
    data = bytearray(path.read_bytes())
    # Half of the flips fall on the beginning, where headers are.
    place = random_.randrange(min(len(data), 4096) if random_.random() < 0.5 else len(data))
    data[place] ^= 1 << random_.randrange(8)
    path.write_bytes(data)
    return f"{path.name} at {place}"


def _truncate(folder: Path, random_: random.Random) -> str:
    path = _file(folder, random_)
    data = path.read_bytes()
    length = random_.choice((0, 7, 8, random_.randrange(len(data)), len(data) - 1))
    path.write_bytes(data[:length])
    return f"{path.name} to {length} bytes"


def _garbage(folder: Path, random_: random.Random) -> str:
    path = _file(folder, random_)
    path.write_bytes(random_.randbytes(random_.choice((1, 100, 5000))))
    return path.name


def _deep(folder: Path, random_: random.Random) -> str:
    path = _file(folder, random_, ".json")
    path.write_text("[" * 100_000 + "]" * 100_000)
    return path.name


def _remove(folder: Path, random_: random.Random) -> str:
    path = _file(folder, random_)
    path.unlink()
    return path.name


def _edit(folder: Path, random_: random.Random) -> str:
    path = _file(folder, random_, ".json")
    value = json.loads(path.read_text(encoding="utf-8"))
    what = _change(value, random_)
    path.write_text(json.dumps(value), encoding="utf-8")
    return f"{path.name}: {what}"


def _edit_and_sign(folder: Path, random_: random.Random) -> str:
    """As somebody who writes a folder on purpose: every checksum fits."""
    done = _edit(folder, random_)
    report = folder / REPORT_NAME
    if report.is_file():
        try:
            values = json.loads(report.read_text(encoding="utf-8"))
            values["files"].update(file_facts(folder, values["files"]))
            report.write_text(json.dumps(values), encoding="utf-8")
        except (KeyError, TypeError, AttributeError, OSError, ValueError):
            pass  # the report itself was changed
    return done


def _change(value: Any, random_: random.Random) -> str:
    """Put an odd value somewhere into a JSON value, or take one out."""
    path = ""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            if isinstance(value, dict):
                value["odd"] = 1
            return f"{path} filled"
        key = random_.choice(keys)
        path += f"/{key}"
        if isinstance(value[key], dict | list) and value[key] and random_.random() < 0.8:
            value = value[key]
            continue
        if random_.random() < 0.15:
            del value[key]
            return f"{path} removed"
        value[key] = random_.choice(_ODD)
        return f"{path} = {value[key]!r}"


def _stray(folder: Path, random_: random.Random) -> str:
    """A file that nobody has listed; one that is there already is written over."""
    path = folder / random_.choice(_STRAY)
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".safetensors":
        path.write_bytes(_file(folder, random_, ".safetensors").read_bytes())
    else:
        path.write_text(random_.choice(_STRAY_TEXT))
    return path.name


def _no_file(folder: Path, random_: random.Random) -> str:
    """Something else in place of a file."""
    path = _file(folder, random_)
    path.unlink()
    what = random_.choice(("fifo", "folder", "loop", "dangling", "device", "outside"))
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        targets = {"loop": path.name, "dangling": "nowhere", "device": "/dev/zero", "outside": "/etc/passwd"}
        path.symlink_to(targets[what])
    return f"{what} in place of {path.name}"


def _permissions(folder: Path, random_: random.Random) -> str:
    path = _file(folder, random_)
    path.chmod(0)
    return path.name
