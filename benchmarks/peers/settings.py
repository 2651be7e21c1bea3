"""What is measured: the texts, the peers and their settings. The models are those of benchmarks/common.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TEST_TEXT = ("wikitext2", "wiki.test.raw")
CALIBRATION_TEXT = ("wikitext2", "wiki.train.first_part.txt")
SAMPLES, SAMPLE_TOKENS = 64, 512  # of the calibration text
SEED = 42


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    name: of its folder and its entry in the results. peer: whose adapter makes it. title: as the peer's users
    say it. named_bits: the bits per weight that the title says. options: for the adapter.
    """

    name: str
    peer: str
    title: str
    named_bits: float
    options: dict[str, Any] = field(default_factory=dict)


def _autoround(bits: int, group_size: int) -> Setting:
    options = {"bits": bits, "group_size": group_size, "iters": 60}
    name = f"autoround-w{bits}-g{group_size}"
    return Setting(name, "autoround", f"AutoRound W{bits} g{group_size}", bits, options)


def _gptqmodel(bits: int, group_size: int) -> Setting:
    options = {"bits": bits, "group_size": group_size}
    name = f"gptqmodel-w{bits}-g{group_size}"
    return Setting(name, "gptqmodel", f"GPTQModel W{bits} g{group_size}", bits, options)


def _hqq(bits: int, axis: int) -> Setting:
    options = {"bits": bits, "group_size": 64, "axis": axis}
    name = f"hqq-{bits}bit-g64-axis{axis}"
    return Setting(name, "hqq", f"HQQ {bits}-bit g64 axis {axis}", bits, options)


def _llamacpp(kind: str, bits: int) -> Setting:
    return Setting(f"llamacpp-{kind.lower()}", "llamacpp", f"llama.cpp {kind}, imatrix", bits, {"type": kind})


def _pocketllm(bpw: float) -> Setting:
    return Setting(f"pocketllm-{bpw}", "pocketllm", f"PocketLLM --bpw {bpw}", bpw, {"bpw": bpw})


SETTINGS = (
    _autoround(4, 64),
    _autoround(3, 64),
    _autoround(2, 32),
    _gptqmodel(4, 64),
    _gptqmodel(3, 64),
    _gptqmodel(2, 32),
    _hqq(4, axis=1),
    _hqq(3, axis=1),
    _hqq(2, axis=1),
    _llamacpp("Q4_K_M", 4),
    _llamacpp("Q3_K_M", 3),
    _llamacpp("IQ2_XXS", 2),
    *(_pocketllm(bpw) for bpw in (4.05, 3.05, 2.55, 2.05, 1.55)),
)
PAIRED = ("autoround-w3-g64", "pocketllm-3.05")  # the reference for time, and ours against it
