"""Random numbers that are part of the stored form: a seed gives the same numbers on every machine and version."""

from __future__ import annotations

import numpy as np

from pocketllm.errors import ConfigError


def splitmix64(count: int, seed: int) -> np.ndarray:
    """[count] uint64: outputs of splitmix64 for the states seed + (i + 1) * 0x9E3779B97F4A7C15.

    Raises:
        ConfigError: a seed outside [0, 2^63).
    """
    if not 0 <= seed < 1 << 63:
        raise ConfigError(f"seed: got {seed}, wanted 0 to 2^63 - 1")
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
