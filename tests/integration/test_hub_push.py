"""Models pushed to the Hub: what is uploaded, replaced, refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pocketllm
from pocketllm.errors import ConfigError, FormatError, OutputError
from pocketllm.format import check_push, read_report, verify
from pocketllm.source import resolve
from tests.commands import SETTINGS, Run
from tests.hub_server import Hub, RefusedError
from tests.integration.test_hub import logits

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning"
)  # huggingface_hub's way to upload


def pushed(hub: Hub, name: str = "me/model") -> dict[str, bytes]:
    repository = hub.repositories[name]
    return repository.commits[repository.refs["main"]]


def test_a_pushed_model_is_the_model(hub: Hub, small: Path, tmp_path: Path) -> None:
    (small / ".secret").write_text("of the machine")
    address = pocketllm.push(small, "me/model", private=True)
    (small / ".secret").unlink()
    files, repository = pushed(hub), hub.repositories["me/model"]
    assert address == f"{hub.url}/me/model/commit/{repository.refs['main']}"
    assert repository.private and ".secret" not in files
    for name in read_report(small)["files"]:
        assert files[name] == (small / name).read_bytes()
    assert b'pocketllm.load("me/model")' in files["README.md"]
    model, _ = pocketllm.load("me/model", dtype=torch.float32)
    assert torch.equal(logits(model), logits(pocketllm.load(small, dtype=torch.float32)[0]))


def test_what_an_earlier_model_has_left_goes(hub: Hub, small: Path) -> None:
    earlier = {
        "pocketllm.json": b"{}",
        "model-00002-of-00002.safetensors": b"",
        "picture.png": b"",
        ".gitattributes": b"",
    }
    hub.add("me/model", small).commit({**earlier, "README.md": b"mine"})
    pocketllm.push(small, "me/model")
    kept = {path.name for path in small.iterdir()} | {"picture.png", ".gitattributes"}
    assert pushed(hub).keys() == kept
    pocketllm.load("me/model")


def test_a_dense_model_is_not_replaced(hub: Hub, small: Path, source: Path) -> None:
    hub.add("me/dense", source)
    before = pushed(hub, "me/dense")
    for refused in (lambda: pocketllm.push(small, "me/dense"), lambda: check_push("me/dense")):
        with pytest.raises(
            OutputError, match=r"^me/dense: has files on the Hub \(.*\) and is not a compressed model"
        ):
            refused()
    assert pushed(hub, "me/dense") == before


def test_a_damaged_model_is_not_pushed(hub: Hub, copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        pocketllm.push(copy, "me/model")
    assert "me/model" not in hub.repositories


def test_files_of_others_are_not_pushed(hub: Hub, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of the machine")
    (copy / "notes.md").symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match=r"notes\.md: a link that leads out of the folder"):
        pocketllm.push(copy, "me/model")
    assert "me/model" not in hub.repositories


@pytest.mark.parametrize("name", ["model", "me/model/more", "me/mo del", "", "me/modèle"])
def test_names_that_no_repository_has(name: str, hub: Hub, small: Path) -> None:
    with pytest.raises(ConfigError, match=r"push: got .*, wanted OWNER/NAME"):
        pocketllm.push(small, name)


def test_pushing_needs_a_login(
    hub: Hub, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "another")
    with pytest.raises(
        OutputError, match=r"me/model: the Hub refused the request .* check that your token may write to it"
    ):
        pocketllm.push(small, "me/model")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(OutputError, match="me/model: pushing requires a login; log in"):
        check_push("me/model")


def test_a_hub_that_refuses_or_is_away(hub: Hub, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        OutputError,
        match=r"somebody/model: the Hub refused the request .* check that your token may write to it",
    ):
        pocketllm.push(small, "somebody/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OutputError, match="me/model: HF_HUB_OFFLINE is set, so nothing can be uploaded"):
        pocketllm.push(small, "me/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        OutputError, match=r"me/model: the Hub cannot be reached .*; check the connection and"
    ):
        check_push("me/model")


def test_an_upload_that_breaks_off(hub: Hub, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> object:
        raise RefusedError(403, message="no more space")

    monkeypatch.setattr("tests.hub_server._Handler._store", broken)
    with pytest.raises(OutputError, match=r"me/model: the upload failed \(.*403"):
        pocketllm.push(small, "me/model")
    assert pushed(hub).keys() == {".gitattributes"}


def test_a_hub_that_is_broken(hub: Hub, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> object:
        raise RefusedError(507, message="no space")

    monkeypatch.setattr("tests.hub_server._Handler._create", broken)
    with pytest.raises(OutputError, match=r"me/model: the Hub refused the request .* try again later"):
        pocketllm.push(small, "me/model")


def test_commands_push(hub: Hub, source: Path, small: Path, text: Path, run: Run, tmp_path: Path) -> None:
    assert run.json("push", small, "me/model")["commit"].startswith(f"{hub.url}/me/model/commit/")
    measuring = ["--ppl", text, "--context", "32", "--windows", "2"]
    command = [
        "compress",
        source,
        "-o",
        tmp_path / "out",
        "--no-calibration",
        *SETTINGS,
        "--push",
        "me/other",
    ]
    assert run.json(*command, "--dry-run")["is_plan"] and "me/other" not in hub.repositories
    found = run.json(*command, *measuring, "--private")
    assert found["commit"].startswith(f"{hub.url}/me/other/commit/") and hub.repositories["me/other"].private
    assert "perplexity on text.txt" in pushed(hub, "me/other")["README.md"].decode()
    verify(resolve("me/other"))


def test_where_to_push_is_checked_before_the_work(hub: Hub, source: Path, run: Run, tmp_path: Path) -> None:
    hub.add("me/dense", source)
    command = ["compress", source, "-o", tmp_path / "out", "--no-calibration", *SETTINGS, "--push"]
    code, _, err = run(*command, "me/dense")
    assert code == 1 and "is not a compressed model; choose another name" in err
    assert run(*command, "me")[0] == 2
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
