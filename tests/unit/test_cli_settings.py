"""What the options of `compress` make of a preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pocketllm import preset
from pocketllm.cli.settings import compress_config, parse_overrides, recovery, with_calibration
from pocketllm.config import DEFAULT_PRESET, PLAIN_PRESET, REFINE_EPOCHS, CalibrationConfig, CompressConfig
from pocketllm.errors import ConfigError


def calibrated(config: CompressConfig | None = None, **options: Any) -> CompressConfig:
    given = {"without": False, "texts": None, "tokens": None, "refine": None, **options}
    return with_calibration(config or preset(DEFAULT_PRESET), **given)


def settings_of(**options: Any) -> CalibrationConfig:
    found = calibrated(**options).calibration
    assert found is not None
    return found


def test_without_options_the_default_preset() -> None:
    assert calibrated(compress_config(None)) == preset(DEFAULT_PRESET)


def test_targets() -> None:
    assert compress_config(None, bpw=2.5).target_bpw == 2.5
    by_ratio = compress_config(None, ratio=8.0)
    assert (by_ratio.target_ratio, by_ratio.target_bpw, by_ratio.target_bytes) == (8.0, None, None)
    by_size = compress_config(None, nbytes="30MB")
    assert (by_size.target_bytes, by_size.target_bpw) == (30_000_000, None)
    assert by_size.calibration == preset(DEFAULT_PRESET).calibration


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bpw": 3.0, "ratio": 4.0}, "--bpw and --ratio"),
        ({"bpw": 3.0, "nbytes": "30MB"}, "--bpw and --size"),
        ({"ratio": 3.0, "nbytes": "30MB"}, "--ratio and --size"),
        ({"bpw": 3.0, "chosen": "paper-8x"}, "--preset and --bpw"),
        ({"nbytes": "1MB", "chosen": "lookup-8x"}, "--preset and --size"),
        ({"bpw": 3.0, "codebook_size": 16, "vector_len": 4}, "--bpw and --codebook-size"),
    ],
)
def test_exactly_one_target(options: dict[str, Any], words: str) -> None:
    chosen = options.pop("chosen", None)
    with pytest.raises(ConfigError, match=f"{words} exclude each other; give one"):
        compress_config(chosen, **options)


@pytest.mark.parametrize("size", ["", "30 apples", "-3MB", "MB"])
def test_sizes_that_are_none(size: str) -> None:
    with pytest.raises(ConfigError, match="--size"):
        compress_config(None, nbytes=size)


def test_options_of_the_networks_start_from_the_preset_without_calibration() -> None:
    assert compress_config(None, epochs=5).calibration is None
    assert compress_config(None, without_calibration=True) == preset(PLAIN_PRESET)
    assert compress_config(None, codebook_size=64, vector_len=4).codebook_size == 64


def test_refinement() -> None:
    assert settings_of(refine=False).refine_epochs == 0
    assert settings_of(refine=True).refine_epochs > 0
    tuned = calibrated(refine=True)
    assert calibrated(tuned, refine=False).calibration == settings_of(refine=False)
    assert calibrated(tuned, refine=None) == tuned
    assert REFINE_EPOCHS > 0


def test_other_calibration_options() -> None:
    found = settings_of(
        texts=["a.txt", "owner/name"],
        tokens=2048,
        passes=2,
        two_sided=False,
        rotate=False,
        sequential=False,
        refine=None,
    )
    assert found.texts == ("a.txt", "owner/name") and found.tokens == 2048 and found.passes == 2
    assert not found.rotate and not found.sequential
    assert settings_of().rotate and settings_of().sequential


def test_a_preset_without_calibration() -> None:
    plain = preset("lookup-8x")
    assert calibrated(plain) == plain
    assert calibrated(plain, texts=["a.txt"]).calibration == CalibrationConfig(texts=("a.txt",))
    with pytest.raises(ConfigError, match="--passes, --refine: the preset does not calibrate"):
        calibrated(plain, passes=1, refine=True)
    with pytest.raises(ConfigError, match="calibration needs decoder='lookup'"):
        calibrated(preset("paper-8x"), texts=["a.txt"])


def test_calibration_switched_off() -> None:
    plain = compress_config(None, without_calibration=True)
    assert calibrated(plain, without=True) == plain
    assert calibrated(without=True).calibration is None
    with pytest.raises(ConfigError, match="--no-calibration excludes --rotate, --calibration-tokens"):
        calibrated(plain, without=True, rotate=False, tokens=2048)


def test_overrides() -> None:
    assert parse_overrides(None) is None
    found = parse_overrides(["model.layers.0.*=4", "a=b*=2.5", "lm_head.weight=16"])
    assert found == (("model.layers.0.*", 4.0), ("a=b*", 2.5), ("lm_head.weight", 16.0))
    assert compress_config(None, overrides=found).overrides == found
    for wrong in ("model.layers.0.*", "=4", "x=", "x=four"):
        with pytest.raises(ConfigError, match=r"--override: got .*, wanted PATTERN=BITS"):
            parse_overrides([wrong])
    with pytest.raises(ConfigError, match="17"):
        compress_config(None, overrides=(("x", 17.0),))
    with pytest.raises(ConfigError, match="trellis"):
        compress_config("lookup-8x", overrides=(("x", 4.0),))


def test_recovery() -> None:
    config = preset(DEFAULT_PRESET)
    assert recovery(None, None, None, config) is None
    found = recovery("distill", [Path("a.txt")], 7, config)
    assert found is not None and (found.texts, found.steps) == (("a.txt",), 7)
    own = recovery("distill", None, None, calibrated(texts=["b.txt"]))
    assert own is not None and own.texts == ("b.txt",)
    with pytest.raises(ConfigError, match="need --recover"):
        recovery(None, None, 3, config)
    with pytest.raises(ConfigError, match="wanted distill"):
        recovery("magic", None, None, config)
