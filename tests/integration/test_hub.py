"""Models on the Hub: found, downloaded, refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pocketllm
from pocketllm.errors import ConfigError, FormatError, SourceError
from pocketllm.files import need_regular
from pocketllm.format import verify
from pocketllm.source import folder_of, name_of, resolve, resolve_local
from tests import tiny
from tests.commands import Run
from tests.hub_server import TOKEN, Hub

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning"
)  # huggingface_hub's way to upload


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
