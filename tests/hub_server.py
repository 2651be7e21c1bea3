"""A small Hugging Face Hub on 127.0.0.1: the part of its protocol that downloads and pushes models.

Repositories are kept in memory. Weights go through the large-file protocol, as on the Hub; everything else is in the
commit. A private repository and pushing need the token.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_of_the_tests"
_LARGE = ("*.safetensors", "*.bin")


@dataclass
class Repository:
    """Commits by id, each with its files, and branches and tags by name."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        """A new commit, with these files and no others, at the end of a branch."""
        digest = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[digest] = dict(files)
        self.refs[ref] = digest
        return digest

    def at(self, revision: str) -> str | None:
        """The commit of a branch, tag or commit id."""
        found = self.refs.get(revision, revision)
        return found if found in self.commits else None


@dataclass
class Hub:
    """The repositories by id; requests: `METHOD /path` of each that was answered."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def add(self, name: str, folder: Path, **how: Any) -> Repository:
        """A repository with the files of a folder."""
        made = self.repositories[name] = Repository(**how)
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        made.commit({name: path.read_bytes() for name, path in files.items()})
        return made


class RefusedError(Exception):
    """An answer that is not 200. code: as in the header X-Error-Code."""

    def __init__(self, status: int, code: str = "", message: str = "", **body: str) -> None:
        self.status, self.code, self.body = status, code, {"error": message or code, **body}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def do_PUT(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        headers: dict[str, str] = {}
        try:
            status, found = 200, self._route(path, body, headers)
        except RefusedError as error:
            status, found = error.status, error.body
            headers = {"X-Error-Code": error.code} if error.code else {}
        data = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _route(self, path: str, body: bytes, headers: dict[str, str]) -> Any:
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "whoami-v2"]:
            self._need_token()
            return {"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        if parts[:2] == ["api", "validate-yaml"]:
            return {"warnings": [], "errors": []}
        if parts[:3] == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts[0] == "objects":
            return self._store(parts[1], body)
        if parts[2:6] == ["info", "lfs", "objects", "batch"]:
            return self._batch(json.loads(body))
        if parts[:2] == ["api", "models"]:
            return self._model("/".join(parts[2:4]), parts[4:], body)
        if parts[2:3] != ["resolve"]:
            raise RefusedError(404)
        return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), headers)

    def _store(self, digest: str, content: bytes) -> Any:
        if hashlib.sha256(content).hexdigest() != digest:
            raise RefusedError(400, message="other bytes than announced")
        self.hub.objects[digest] = content
        return {}

    def _need_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise RefusedError(401, message="Invalid username or password.")

    def _repository(self, name: str) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            raise RefusedError(401 if "Authorization" not in self.headers else 404, "RepoNotFound")
        return found

    def _create(self, wanted: dict[str, Any]) -> Any:
        self._need_token()
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if not name.startswith("me/"):
            raise RefusedError(
                403, message="You don't have the rights to create a model under this namespace"
            )
        if name in self.hub.repositories:
            raise RefusedError(
                409, message="You already created this model repo", url=f"{self.hub.url}/{name}"
            )
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repositories[name] = Repository(private=private)
        self.hub.repositories[name].commit({".gitattributes": b""})
        return {"url": f"{self.hub.url}/{name}"}

    def _model(self, name: str, rest: list[str], body: bytes) -> Any:
        repository = self._repository(name)
        revision = "/".join(rest[1:]) or "main"
        commit = repository.at(revision)
        if commit is None:
            raise RefusedError(404, "RevisionNotFound")
        files = repository.commits[commit]
        if rest[:1] == ["preupload"]:
            wanted = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": p, "uploadMode": _mode(p), "shouldIgnore": False} for p in wanted]}
        if rest[:1] == ["commit"]:
            self._need_token()
            digest = repository.commit(self._changed(files, body), revision)
            url = f"{self.hub.url}/{name}/commit/{digest}"
            return {"commitUrl": url, "commitOid": digest, "success": True}
        if rest[:1] == ["tree"]:
            return [_entry(path, content) for path, content in files.items()]
        return {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]}

    def _changed(self, files: Mapping[str, bytes], body: bytes) -> dict[str, bytes]:
        found = dict(files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                found[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                found[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del found[value["path"]]
        return found

    def _batch(self, wanted: dict[str, Any]) -> Any:
        self._need_token()
        places = {entry["oid"]: f"{self.hub.url}/objects/{entry['oid']}" for entry in wanted["objects"]}
        return {
            "transfer": "basic",
            "objects": [
                {**entry, "actions": {"upload": {"href": places[entry["oid"]]}}}
                for entry in wanted["objects"]
            ],
        }

    def _file(self, name: str, revision: str, path: str, headers: dict[str, str]) -> bytes:
        repository = self._repository(name)
        if repository.gated:
            raise RefusedError(403, "GatedRepo")
        commit = repository.at(revision)
        if commit is None:
            raise RefusedError(404, "RevisionNotFound")
        if path not in repository.commits[commit]:
            raise RefusedError(404, "EntryNotFound")
        content = repository.commits[commit][path]
        headers |= {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        return content


def _mode(path: str) -> str:
    return "lfs" if any(fnmatch.fnmatch(path, pattern) for pattern in _LARGE) else "regular"


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextmanager
def served() -> Iterator[Hub]:
    """A Hub without models, for as long as the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment variables HF_ENDPOINT, HF_HUB_CACHE and HF_TOKEN do when Python starts."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # that storage is elsewhere
    monkeypatch.setenv("HF_TOKEN", TOKEN)
