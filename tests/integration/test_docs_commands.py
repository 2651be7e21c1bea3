"""The commands in the guides do what the guides say: they run in page order on a tiny model.

A block that is preceded by `<!-- not run: REASON -->` is not run here; its commands are parsed all the same
(tests/unit/test_documented_commands.py).
"""

from __future__ import annotations

import glob
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import pocketllm
from tests import tiny
from tests.commands import Run
from tests.hub_server import Hub, served, use

ROOT = Path(__file__).parents[2]
GUIDES = ("install", "quickstart", "sizes", "hub", "evaluation", "report")
BLOCK = re.compile(r"^(?:<!-- not run: (.+?) -->\n)?```(?:bash)?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^(?:\.venv/bin/)?pocketllm (.+)$", re.MULTILINE)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 32,
    "num_hidden_layers": 1,
}  # 3 bits can be met
SMALL = "codec.trellis_width=6 codec.kmeans_iterations=3 codec.depth=1 codec.hidden=8 decoder_scope=matrix"
SMALL += " calibration.tokens=512 calibration.context=32 calibration.sensitivity_tokens=128"
QUICK = {  # what is added to a command, or replaced in it, to make it fit a tiny model
    "compress": [word for setting in SMALL.split() for word in ("--set", setting)],
    "finetune": ["--steps", "2", "--context", "32", "--dry-run"],
}
REPLACED = {"60MB": "40KB"}


def commands(page: str) -> Iterator[tuple[str, str | None]]:
    """(command, why it is not run or None) of a guide."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    for reason, block in BLOCK.findall(text):
        for command in COMMAND.findall(block):
            yield command, reason or None


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the guides suppose: a dense model, texts, and models that were compressed before."""
    folder = tmp_path_factory.mktemp("models")
    tiny.save(folder / "my-model", **SIZES)
    for name in ("my-model-8x", "my-model-16x"):
        pocketllm.compress(folder / "my-model", tiny.settings(), folder / name)
    (folder / "my-texts").mkdir()
    for name in ("wiki.test.raw", "c4.txt", "code.txt", "my-texts/a.txt"):
        (folder / name).write_text("a text that is long enough for some windows. " * 400)
    (folder / "data" / "piqa").mkdir(parents=True)
    (folder / "data" / "arc_easy").mkdir()
    counts = [{"goal": f"count to {n}", "sol1": "one two", "sol2": "2", "label": n % 2} for n in range(1, 9)]
    choices = {"text": ["one", "two"], "label": ["A", "B"]}
    asked = [{"question": f"what is {n}", "choices": choices, "answerKey": "AB"[n % 2]} for n in range(8)]
    for name, rows in (("piqa/valid", counts), ("arc_easy/test", asked)):
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def hub(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with served() as hub:
        hub.add("owner/name", models / "my-model")
        small = hub.add("owner/name-small", models / "my-model-8x")
        small.refs["v1"] = small.refs["main"]
        use(hub, tmp_path / "cache", monkeypatch)
        yield hub


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.parametrize("page", GUIDES)
def test_the_commands_of_a_guide(
    page: str, models: Path, hub: Hub, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("POCKETLLM_DATA", raising=False)
    for command, reason in commands(page):
        if reason is not None:
            continue
        words, target = _words(command)
        if words[0] == "compress" and Path("small").exists():
            words.append("--overwrite")
        code, out, err = run(*words)
        assert code == 0, f"{command}\n{err}"
        if target is not None:
            Path(target).write_text(out)


def _words(command: str) -> tuple[list[str], str | None]:
    """The words of a command as it is run here, and the file that its output goes to."""
    text, _, target = shlex.join(shlex.split(command, comments=True)).partition(" '>' ")
    words = [REPLACED.get(word, word) for word in shlex.split(text)]
    expanded = [
        found for word in words for found in (sorted(glob.glob(word)) if "*" in word else []) or [word]
    ]
    return [*expanded, *QUICK.get(words[0], [])], target or None


def test_every_guide_has_commands_that_run() -> None:
    for page in GUIDES:
        assert any(reason is None for _, reason in commands(page)), page


@pytest.mark.parametrize(
    "page", sorted(path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")), ids=str
)
def test_a_command_is_run_here_or_marked(page: Path) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^(<!-- not run: .+? -->\n)?```(\w*)\n.*?^```$", text, re.DOTALL | re.MULTILINE)
    unmarked = [language for mark, language in blocks if language in ("", "bash") and not mark]
    assert not unmarked or page.stem in GUIDES
