"""What the terminal is told while a long step runs, and what stands in JSON."""

from __future__ import annotations

import json
import math

import pytest

from pocketllm.cli.render import Output


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
