"""What the options of `compress` make of a preset."""

from __future__ import annotations

from typing import Any

import pytest
from typer.main import get_command

from pocketllm import preset
from pocketllm.cli import serve_command
from pocketllm.cli.compress_command import recovery_of
from pocketllm.cli.render import parse_size
from pocketllm.cli.shared_options import parse_overrides
from pocketllm.config import DEFAULT_PRESET, PLAIN_PRESET, CalibrationConfig, CompressConfig, CompressOptions
from pocketllm.config.serve_config import ServeConfig
from pocketllm.config.settings import help_of
from pocketllm.errors import ConfigError


def made(*settings: str, **options: Any) -> CompressConfig:
    return CompressOptions(settings=settings, **options).config()


def calibration(*settings: str, **options: Any) -> CalibrationConfig:
    found = made(*settings, **options).calibration
    assert found is not None
    return found


def test_without_options_the_default_preset() -> None:
    assert made() == preset(DEFAULT_PRESET)


def test_targets() -> None:
    assert made(bpw=2.5).target_bpw == 2.5
    by_ratio = made(ratio=8.0)
    assert (by_ratio.target_ratio, by_ratio.target_bpw, by_ratio.target_bytes) == (8.0, None, None)
    by_size = made(size=30_000_000)
    assert (by_size.target_bytes, by_size.target_bpw) == (30_000_000, None)
    assert by_size.calibration == preset(DEFAULT_PRESET).calibration


@pytest.mark.parametrize(
    ("options", "settings", "words"),
    [
        ({"bpw": 3.0, "ratio": 4.0}, [], "--bpw and --ratio"),
        ({"bpw": 3.0, "size": 30_000_000}, [], "--bpw and --size"),
        ({"ratio": 3.0, "size": 30_000_000}, [], "--ratio and --size"),
        ({"bpw": 3.0, "preset": "paper-8x"}, [], "--preset and --bpw"),
        ({"size": 1_000_000, "preset": "lookup-8x"}, [], "--preset and --size"),
        ({"bpw": 3.0}, ["codebook_size=16", "vector_len=4"], "--bpw and codebook_size"),
    ],
)
def test_exactly_one_target(options: dict[str, Any], settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=f"{words} cannot be combined; give one"):
        made(*settings, **options)


@pytest.mark.parametrize("size", ["", "30 apples", "-3MB", "MB"])
def test_sizes_that_are_none(size: str) -> None:
    with pytest.raises(ConfigError, match="--size"):
        parse_size(size)


def test_settings_of_the_networks_start_from_the_preset_without_calibration() -> None:
    assert made("codec.epochs=5").calibration is None
    assert made(no_calibration=True) == preset(PLAIN_PRESET)
    assert made("codebook_size=64", "vector_len=4").codebook_size == 64
    assert made("codebook_size=none") == preset(DEFAULT_PRESET)
    assert made("codec.epochs=5", preset="calibrated-8x").codec.epochs == 5


def test_a_preset_that_settings_choose_is_noted() -> None:
    note = CompressOptions(settings=("codec.hidden=8",)).note()
    assert note.startswith("codec.hidden does not apply") and PLAIN_PRESET in note
    for options in ({}, {"preset": PLAIN_PRESET}, {"no_calibration": True}):
        settings = ("codec.hidden=8",) if options else ("codec.vq_weight=1.0",)
        assert CompressOptions(settings=settings, **options).note() == ""


def test_the_last_of_a_key_counts() -> None:
    assert made("dense_first=1", "dense_first=2").dense_first == 2


def test_refinement() -> None:
    assert calibration("calibration.refine_epochs=2").refine_epochs == 2
    assert calibration("calibration.refine_epochs=2", "calibration.refine_epochs=0").refine_epochs == 0


def test_other_calibration_settings() -> None:
    found = calibration(
        "calibration.tokens=2048",
        "calibration.passes=2",
        "calibration.two_sided=false",
        "calibration.rotate=false",
        "calibration.sequential=false",
        calibration=("a.txt", "owner/name"),
    )
    assert found.texts == ("a.txt", "owner/name") and found.tokens == 2048 and found.passes == 2
    assert not found.rotate and not found.sequential
    assert calibration().rotate and calibration().sequential


def test_a_preset_without_calibration() -> None:
    plain = {"preset": "lookup-8x"}
    assert made(**plain) == preset("lookup-8x")
    assert calibration(calibration=("a.txt",), **plain) == CalibrationConfig(texts=("a.txt",))
    assert calibration("calibration.tokens=32768", **plain) == CalibrationConfig()
    words = "calibration.passes, calibration.rotate: the preset does not calibrate; give --calibration"
    with pytest.raises(ConfigError, match=words):
        made("calibration.passes=1", "calibration.rotate=false", **plain)
    words = (
        "^--calibration: got codec.decoder=row and codec.row_scale=true with the preset paper-8x, .* choose a"
    )
    with pytest.raises(ConfigError, match=words):
        made(preset="paper-8x", calibration=("a.txt",))
    with pytest.raises(
        ConfigError, match=r"calibration\.tokens: got codec.decoder=lookup and codec.row_scale=false"
    ):
        made("codec.row_scale=false", "calibration.tokens=2048", **plain)


def test_calibration_switched_off() -> None:
    assert made(no_calibration=True, preset="calibrated-8x").calibration is None
    words = "--no-calibration cannot be combined with calibration.rotate, --calibration"
    with pytest.raises(ConfigError, match=words):
        made("calibration.rotate=false", no_calibration=True, calibration=("a.txt",))


def test_an_empty_name_is_no_preset() -> None:
    with pytest.raises(ConfigError, match="unknown preset ''; known: "):
        made(preset="")


def test_overrides() -> None:
    assert parse_overrides([]) == ()
    found = parse_overrides(["model.layers.0.*=4", "a=b*=2.5", "lm_head.weight=16"])
    assert found == (("model.layers.0.*", 4.0), ("a=b*", 2.5), ("lm_head.weight", 16.0))
    assert made(overrides=found).overrides == found
    for wrong in ("model.layers.0.*", "=4", "x=", "x=four"):
        with pytest.raises(ConfigError, match=r"--override: got .*, wanted PATTERN=BITS"):
            parse_overrides([wrong])
    with pytest.raises(ConfigError, match="17"):
        made(overrides=(("x", 17.0),))
    with pytest.raises(ConfigError, match="trellis"):
        made(preset="lookup-8x", overrides=(("x", 4.0),))


def test_recovery() -> None:
    assert recovery_of(CompressOptions(), None, []) is None
    options = CompressOptions(settings=("recover.steps=7", "recover.loop.batch_size=2"), seed=3)
    found = recovery_of(options, "distill", ["a.txt"])
    assert found is not None and (found.texts, found.steps) == (("a.txt",), 7)
    assert (found.loop.batch_size, found.loop.seed) == (2, 3)
    assert options.config() == made(seed=3)
    own = recovery_of(CompressOptions(calibration=("b.txt",)), "distill", [])
    assert own is not None and own.texts == ("b.txt",)
    with pytest.raises(ConfigError, match=r"^--recover-text, recover\.steps, .*: needs --recover distill"):
        recovery_of(options, None, ["a.txt"])
    with pytest.raises(ConfigError, match="wanted distill"):
        recovery_of(CompressOptions(), "magic", [])
    with pytest.raises(ConfigError, match=r"recover\.steps: got 0, wanted at least 1"):
        recovery_of(CompressOptions(settings=("recover.steps=0",)), "distill", [])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("target_bpw=3", "--set target_bpw: use the option --bpw"),
        ("keep_embeddings=true", "use the option --keep-embeddings"),
        ("calibration.texts=a.txt", "use the option --calibration"),
        ("recover.loop.seed=1", "use the option --seed"),
        ("overrides=x", "unknown key 'overrides'"),
        ("codec.hidden=-1", "codec.hidden: got -1, wanted 0 to 16384"),
        ("codec.epochs=-1", "codec.epochs: got -1, wanted at least 0"),
        ("calibration.passes=1", "calibration.passes: coordinate descent needs two_sided=False"),
        ("calibration.tokens=1", "calibration.tokens: got 1, wanted at least 512"),
    ],
)
def test_settings_that_are_refused(setting: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        made(setting)


def test_options_of_a_configuration_have_its_help_and_defaults() -> None:
    command = get_command(serve_command.app)
    found = {option.name: option for option in command.params}
    assert found["max_waiting"].help == help_of(ServeConfig)["max_waiting"]  # type: ignore[attr-defined]
    assert found["max_waiting"].default == ServeConfig.max_waiting
    assert found["api_key"].envvar == "POCKETLLM_API_KEY"
