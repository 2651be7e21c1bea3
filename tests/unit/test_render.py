"""What the terminal is told while a long step runs, and what stands in JSON."""

from __future__ import annotations

import json
import math

import pytest

from pocketllm.cli.render import Output, number


@pytest.mark.parametrize(
    ("seconds", "words"), [(2, "half\n"), (120, "half, 4 min left\n"), (7200, "half, 4.0 h left\n")]
)
def test_lines_say_the_time_left(
    seconds: float, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("pocketllm.cli.render.time.monotonic", lambda: now[0])
    with Output().bars() as bars:
        bars.update("train", 0.1, "resumed")  # what was done before does not count
        now[0] = seconds
        bars.update("train", 0.4, "half")
        now[0] = 3 * seconds
        bars.update("train", 1.0, "done")
    lines = capsys.readouterr().err
    assert lines.startswith("train:  10% resumed\n") and lines.endswith("train: 100% done\n")
    assert words in lines


def test_json_holds_no_infinities(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True).result({"a": math.inf, "b": [-math.inf, {"c": math.nan}], "d": 1.5})
    out = capsys.readouterr().out
    assert json.loads(out) == {"a": None, "b": [None, {"c": None}], "d": 1.5}


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (1.05e-4, None, "0.00010500"),
        (7.3e-5, None, "0.000073000"),
        (0.25, None, "0.25000"),
        (17.43219, None, "17.432"),
        (-2.5, None, "-2.5000"),
        (9115433934.357, 38984271.847, "9,115,433,934 ± 38,984,272"),
        (0.00331, 0.00002, "0.0033100 ± 0.0000200"),
        (1e-9, 2e-5, "0.000000001 ± 0.000020000"),
        (0.0, None, "0"),
        (12345, None, "12,345"),
        (math.inf, None, "inf"),
    ],
)
def test_numbers(value: float, error: float | None, words: str) -> None:
    assert number(value, error) == words
