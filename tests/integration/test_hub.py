"""Models on the Hub: found, downloaded, refused. A small server on 127.0.0.1 speaks the Hub's protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import pocketllm
from pocketllm.errors import ConfigError, FormatError, OutputError, SourceError
from pocketllm.files import need_regular
from pocketllm.format import check_push, read_report, verify
from pocketllm.source import folder_of, name_of, resolve, resolve_local
from tests import tiny
from tests.commands import SETTINGS, Run
from tests.hub_server import TOKEN, Hub, RefusedError, served, use

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning"
)  # huggingface_hub's way to upload


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with served() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, source: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """With a dense and a compressed model, and nothing of them on this machine."""
    server.repositories.clear()
    server.requests.clear()
    server.add("owner/dense", source)
    server.add("owner/small", small)
    use(server, tmp_path / "cache", monkeypatch)
    monkeypatch.chdir(tmp_path)
    return server


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([list(range(3, 20))])).logits


def test_a_compressed_model_is_loaded(hub: Hub, small: Path) -> None:
    model, tokenizer = pocketllm.load("owner/small", dtype=torch.float32)
    assert torch.equal(logits(model), logits(pocketllm.load(small, dtype=torch.float32)[0]))
    assert tokenizer.decode([5]) == tiny.tokenizer().decode([5])


def test_a_revision_is_a_keyword_or_part_of_the_name(hub: Hub, small: Path) -> None:
    repository = hub.repositories["owner/small"]
    first = repository.refs["v1"] = repository.refs["main"]
    repository.commit({"config.json": b"{}"})
    for folder in (
        resolve("owner/small", revision="v1"),
        resolve("owner/small@v1"),
        folder_of("owner/small@v1"),
    ):
        assert folder.name == first
        assert verify(folder) == verify(small)
    pocketllm.load("owner/small", revision="v1")
    with pytest.raises(FormatError, match="not a model compressed by pocketllm"):
        pocketllm.load("owner/small")


@pytest.mark.parametrize("name", ["SMALL", "owner/small@v1", "builtin:smollm2-135m"])
def test_only_hub_ids_have_revisions(name: str, hub: Hub, small: Path) -> None:
    with pytest.raises(ConfigError, match=r"revision: got 'v1' for .*, wanted a Hub id"):
        pocketllm.load(name.replace("SMALL", str(small)), revision="v1")


def test_commands_take_hub_ids(hub: Hub, text: Path, run: Run, tmp_path: Path) -> None:
    assert run("info", "owner/small")[0] == 0
    found = run.json("eval", "owner/small", "--ppl", text, "--context", "32", "--windows", "2")
    assert (found["model"], found["compressed"]) == ("owner/small", True)
    report = run.json("report", "owner/small", "--against", "owner/dense", "--no-check")
    assert Path(report["output"]) == tmp_path / "small.html"
    assert run.json("export", "owner/small", "--to", tmp_path / "dense")["bytes_on_disk"]
    dense = run.json(
        "compress", "owner/dense@main", "-o", tmp_path / "out", "--preset", "lookup-8x", "--dry-run"
    )
    assert dense["model"] == "owner/dense@main"
    tuned = ["finetune", "owner/small", "-o", tmp_path / "tuned", "--teacher", "owner/dense", "--dry-run"]
    assert run.json(*tuned, "--text", text, "--steps", "2", "--context", "32")["steps"] == 2


def test_what_is_in_the_cache_serves_without_connection(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_local("owner/small") is None
    folder = resolve("owner/small")
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve("owner/small") == folder == resolve_local("owner/small")
    assert hub.requests == []
    words = "^owner/dense: no local folder, not .* in the Hub's cache, and HF_HUB_OFFLINE forbids"
    with pytest.raises(SourceError, match=words):
        resolve("owner/dense")


def test_a_download_that_was_interrupted_does_not_serve(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    (resolve("owner/small") / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"not \(or not all of it\) in the Hub's cache"):
        resolve("owner/small")


def test_a_hub_that_is_not_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    words = "^owner/small: no local folder, and the Hub cannot be reached .*; check the connection, or give a local"
    with pytest.raises(SourceError, match=words):
        resolve("owner/small")


def test_a_gated_model_says_where_its_terms_are(hub: Hub) -> None:
    hub.repositories["owner/small"].gated = True
    words = f"^owner/small: a gated model; accept its terms at {hub.url}/owner/small, then log in"
    with pytest.raises(SourceError, match=words):
        resolve("owner/small")


def test_a_model_that_is_not_there_may_be_private(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["owner/small"].private = True
    monkeypatch.setenv("HF_TOKEN", "another")
    for name in ("owner/small", "owner/nothing"):
        words = f"^{name}: no local folder, and no such model on the Hub, or a private one; check the name, or log in"
        with pytest.raises(SourceError, match=words):
            resolve(name)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert resolve("owner/small").is_dir()


def test_a_revision_that_is_not_there(hub: Hub) -> None:
    with pytest.raises(SourceError, match="the Hub has owner/small, but no revision 'v9'"):
        resolve("owner/small@v9")


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(
        SourceError, match=f"cannot be stored in the Hub's cache {tmp_path / 'cache'} .*HF_HOME"
    ):
        resolve("owner/small")


def test_no_name_for_the_hub(hub: Hub) -> None:
    with pytest.raises(SourceError, match=r"owner/.*: no local folder, and the Hub lookup failed"):
        resolve("owner/--")


def test_the_name_of_a_cached_model(tmp_path: Path) -> None:
    assert name_of(tmp_path / "hub" / "models--owner--small" / "snapshots" / "0123") == "small"
    assert name_of(tmp_path / "snapshots" / "mine") == "mine"


def test_files_that_models_in_the_cache_share(small: Path, tmp_path: Path) -> None:
    """huggingface_hub 2 keeps one copy of a file for all models, behind a link to a link."""
    cache = tmp_path / "hub"
    shared, own = cache / "blobs" / "ab", cache / "models--owner--small" / "blobs"
    folder = cache / "models--owner--small" / "snapshots" / "0123"
    shutil.copytree(small, folder)
    for place in (shared, own):
        place.mkdir(parents=True)
    (folder / "model.safetensors").rename(shared / "abcd")
    (own / "etag").symlink_to(os.path.relpath(shared / "abcd", own))
    (folder / "model.safetensors").symlink_to(os.path.relpath(own / "etag", folder))
    verify(folder)
    (tmp_path / "elsewhere").mkdir()
    (shared / "abcd").rename(tmp_path / "elsewhere" / "abcd")
    (own / "etag").unlink()
    (own / "etag").symlink_to(tmp_path / "elsewhere" / "abcd")
    with pytest.raises(FormatError, match="a link that leads out of the folder"):
        need_regular(folder / "model.safetensors", FormatError)


def test_a_process_that_is_given_the_endpoint(hub: Hub, tmp_path: Path) -> None:
    """As users say it: HF_ENDPOINT and HF_HOME in the environment."""
    changes = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
    }
    command = [sys.executable, "-m", "pocketllm", "info", "owner/small", "--json"]
    environment = {**os.environ, **changes, "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout)["matrices"]
    assert "GET /api/models/owner/small/revision/main" in hub.requests


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
