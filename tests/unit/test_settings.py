"""Settings by dotted key: listed from the dataclasses, parsed, laid over a configuration, and back to options."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest

from pocketllm.config import (
    FINETUNE_METHODS,
    CompressConfig,
    EvalConfig,
    FinetuneOptions,
    as_options,
    compress_settings,
    eval_config,
    finetune_settings,
    flat,
    left_out,
    preset,
    replaced,
    settings_of,
    text_of,
)
from pocketllm.config.settings import closest_keys, help_of, parse_settings
from pocketllm.errors import ConfigError
from tests.commands import Run


@dataclass(frozen=True)
class Inner:
    """Inner settings.

    depth: How deep.
    """

    depth: int = 1


@dataclass(frozen=True)
class Outer:
    """Outer settings, in a sentence that has a colon: not a field.

    rate: Learning rate; it is explained
        on two lines.

    name: A name.
    pairs: Cannot be given as text.
    """

    rate: float | None = None
    on: bool = True
    name: str = "a"
    names: tuple[str, ...] = ()
    pairs: tuple[tuple[str, float], ...] = ()
    inner: Inner = field(default_factory=Inner)
    other: Inner | None = None


def parsed(*words: str) -> dict[str, Any]:
    return parse_settings(words, settings_of(Outer()), "the list")


def test_settings_are_listed_from_the_dataclass() -> None:
    found = settings_of(Outer(other=Inner(5)))
    assert [(one.key, one.kind, one.default) for one in found.values()] == [
        ("rate", "a number or none", None),
        ("on", "true or false", True),
        ("name", "text", "a"),
        ("names", "names, separated by commas", ()),
        ("inner.depth", "an integer", 1),
        ("other.depth", "an integer", 5),
    ]
    assert found["rate"].help == "Learning rate; it is explained on two lines."
    assert found["inner.depth"].help == "How deep." and found["on"].help == ""
    assert settings_of(Outer())["other.depth"].default == 1  # the default of what is None
    assert help_of(Inner) == {"depth": "How deep."}


def test_values_are_parsed_by_the_type_of_their_field() -> None:
    found = parsed("rate=1e-3", "on=False", "name=a=b", "names=x, y,", "inner.depth=-2", "other.depth=3")
    assert found == {
        "rate": 1e-3,
        "on": False,
        "name": "a=b",
        "names": ("x", "y"),
        "inner.depth": -2,
        "other.depth": 3,
    }
    assert parsed("rate=none", "names=") == {"rate": None, "names": ()}
    assert parsed("name=none") == {"name": "none"}


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("rate=fast", "rate: got 'fast', wanted a number or none"),
        ("on=yes", "on: got 'yes', wanted true or false"),
        ("inner.depth=1.5", "inner.depth: got '1.5', wanted an integer"),
        ("inner.depth=", "inner.depth: got '', wanted an integer"),
        ("rate", "--set: got 'rate', wanted KEY=VALUE, as rate=none; 'the list' lists all keys"),
        ("depth=1", "--set: unknown key 'depth'; closest: inner.depth, other.depth; 'the list' lists all"),
        ("raet=1", "--set: unknown key 'raet'; closest: rate"),
        ("qqqqqq=1", "--set: unknown key 'qqqqqq'; closest: none"),
        ("pairs=1", "--set: unknown key 'pairs'"),
    ],
)
def test_what_is_no_setting_is_refused(word: str, words: str) -> None:
    with pytest.raises(ConfigError) as found:
        parsed(word)
    assert words in str(found.value)


def test_closest_keys() -> None:
    keys = compress_settings()
    assert closest_keys("hidden", keys)[0] == "codec.hidden"
    assert closest_keys("two-sided", keys)[0] == "calibration.two_sided"
    assert closest_keys("codec.codebook_size", keys)[0] == "codebook_size"
    assert len(closest_keys("codec.codebook", keys)) <= 3


def test_values_are_laid_over_nested_settings() -> None:
    found = replaced(Outer(), {"name": "b", "inner.depth": 4, "other": Inner(7), "names": ("x",)})
    assert found == Outer(name="b", names=("x",), inner=Inner(4), other=Inner(7))
    assert replaced(Outer(), {"other": Inner(7), "other.depth": 8}).other == Inner(8)
    with pytest.raises(ConfigError, match=r"codec\.norm: got 'x', wanted one of rln, ln, none"):
        replaced(CompressConfig(), {"codec.norm": "x"})


ALL = {
    "compress": compress_settings(),
    **{method: finetune_settings(method) for method in FINETUNE_METHODS},
    "eval": settings_of(EvalConfig()),
}


@pytest.mark.parametrize("command", ALL)
def test_every_setting_has_help_and_its_default_is_what_its_text_means(command: str) -> None:
    for setting in ALL[command].values():
        assert setting.help.endswith(".") and setting.help[0] != " ", setting
        assert setting.parse(text_of(setting.default)) == setting.default


def test_every_field_of_a_configuration_has_a_key() -> None:
    config = preset("calibrated-8x")
    assert set(settings_of(config)) == set(flat(config.to_dict())) - {"overrides"} | {
        "towers",
        "max_memory_gb",
        "calibration.compensate",
        "calibration.compensate_rate",
    }
    for method, default in FINETUNE_METHODS.items():
        assert set(finetune_settings(method)) == set(flat(default.to_dict()))


def test_settings_of_finetune() -> None:
    options = FinetuneOptions(settings=("loop.batch_size=2", "lr_scale=0.5"), steps=3, texts=("a",), seed=1)
    found = options.config()
    wanted = {"steps": 3, "texts": ("a",), "loop.batch_size": 2, "lr_scale": 0.5, "loop.seed": 1}
    assert found == replaced(FINETUNE_METHODS["distill"], wanted)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "magic"}, "--method: got 'magic', wanted distill or lora"),
        ({"settings": ("rank=4",)}, "rank does not apply to --method distill; remove it"),
        ({"settings": ("lr_scale=4",), "method": "lora"}, "lr_scale does not apply to --method lora"),
        ({"validation_text": "v", "method": "lora"}, "--validation-text does not apply to --method lora"),
        ({"settings": ("steps=4",)}, "--set steps: use the option --steps"),
        ({"settings": ("loop.batch_size=0",)}, "loop.batch_size: got 0, wanted at least 1"),
        ({"settings": ("batch_size=0",)}, "unknown key 'batch_size'; closest: loop.batch_size"),
    ],
)
def test_settings_that_finetune_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FinetuneOptions(**options).config()


def test_settings_of_eval() -> None:
    assert eval_config(64, 3, None, ("batch_tokens=7",)) == EvalConfig(64, 3, None, batch_tokens=7)
    with pytest.raises(ConfigError, match="--set limit: use the option --limit"):
        eval_config(64, None, None, ("limit=7",))


@pytest.mark.parametrize("command", [None, "compress", "finetune", "eval"])
def test_settings_on_the_command_line(command: str | None, run: Run) -> None:
    found = run.json("settings", *([command] if command else []))
    assert all(title.split()[0] == command for title in found) if command else len(found) == 4
    rows = [row for rows in found.values() for row in rows]
    assert all(set(row) == {"key", "type", "default", "option", "help"} for row in rows)
    code, out, _ = run("settings", *([command] if command else []))
    assert code == 0 and all(row["key"] in out for row in rows)


def test_settings_of_a_preset_on_the_command_line(run: Run) -> None:
    rows = {row["key"]: row for row in run.json("settings", "compress", "--preset", "paper-16x")["compress"]}
    assert rows["vector_len"]["default"] == 8 and rows["codec.decoder"]["default"] == "row"
    assert rows["target_bpw"]["option"] == "--bpw" and rows["vector_len"]["option"] is None
    for words, message in (("study",), "got 'study', wanted compress"), (("--preset", "x"), "unknown preset"):
        code, out, err = run("settings", *words)
        assert code == 2 and message in err and not out


def test_a_target_without_effect_is_left_out() -> None:
    config = CompressConfig(vector_len=5, codebook_size=32)
    assert left_out(config) == () and "codebook_size=32" in as_options(config)
    for target in (2.5, None):
        other = dataclasses.replace(config, target_bpw=target)
        assert left_out(other) == ("target_bpw",) and as_options(other) == as_options(config)
