"""A Hugging Face Hub on loopback: the few questions that fetching a snapshot asks, and the ways a Hub says no."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


@dataclass
class Repo:
    """A model, or what the Hub says instead."""

    folder: Path | None = None
    info: tuple[int, str] = (200, "")
    """Status and X-Error-Code of questions about the model."""
    files: tuple[int, str] = (200, "")
    """The same of its files."""
    cut: bool = False
    """Whether transfers break off."""
    hang: bool = False
    """Whether questions are never answered."""
    no_list: bool = False
    """Whether the question which files there are is never answered."""
    commits: dict[str, str] = field(default_factory=dict)
    """Branch or tag -> commit, 40 hex digits."""


def commit(number: int) -> str:
    """Return a commit."""
    return f"{number:040x}"


class FakeHub:
    """What is served, and what was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.asked: list[str] = []
        self.url = ""
        self.silent = False
        """Whether no question is ever answered."""

    def add(self, name: str, folder: Path | None = None, **how: object) -> Repo:
        """Serve a model, by default from its branch ``main`` at commit 1."""
        self.repos[name] = Repo(folder, **{"commits": {"main": commit(1)}, **how})
        return self.repos[name]


def _handler(hub: FakeHub, over: threading.Event) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content_Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status: int, code: str) -> None:
            self.answer(status, b"{}", **({"X_Error_Code": code} if code else {}))

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            if parts[-1] != "agent-harnesses":  # what the client asks once a process, in some environments
                hub.asked.append(f"{self.command} {'/'.join(parts)}")
            api = parts[:2] == ["api", "models"]
            name, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
            repo = Repo(hang=True) if hub.silent else hub.repos.get(name)
            if repo is None:  # as the Hub answers who is not logged in
                self.refuse(401, "RepoNotFound")
            elif repo.hang or (repo.no_list and rest[:1] == ["tree"]):
                over.wait(30)
            elif (no := repo.info if api else repo.files)[0] != 200:
                self.refuse(*no)
            else:
                self.give(repo, name, rest, api=api)

        def give(self, repo: Repo, name: str, rest: list[str], *, api: bool) -> None:
            revision = rest[1] if len(rest) > 1 else "main"
            at = repo.commits.get(revision, revision if revision in repo.commits.values() else "")
            files = sorted(p for p in repo.folder.rglob("*") if p.is_file()) if repo.folder else []
            paths = {p.relative_to(repo.folder).as_posix(): p for p in files}
            if not at:
                self.refuse(404, "RevisionNotFound")
            elif api and rest[:1] == ["tree"]:
                entries = [
                    {"type": "file", "path": path, "size": p.stat().st_size, "oid": _digest(p)}
                    for path, p in paths.items()
                ]
                self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
            elif api:
                value = {"id": name, "sha": at, "siblings": [{"rfilename": path} for path in paths]}
                self.answer(200, json.dumps(value).encode(), Content_Type="application/json")
            elif (path := "/".join(rest[2:])) not in paths:
                self.refuse(404, "EntryNotFound")
            else:
                self.send_file(repo, paths[path], at)

        def send_file(self, repo: Repo, path: Path, at: str) -> None:
            body, top = path.read_bytes(), {"X_Repo_Commit": at, "ETag": f'"{_digest(path)}"'}
            if repo.cut and self.command == "GET" and path.suffix == ".safetensors":
                self.close_connection = True
                self.answer(200, body[: len(body) // 2], **top, Content_Length=str(len(body)))
                self.wfile.flush()
                self.connection.shutdown(2)
                return
            self.answer(200, body, **top)

    return Handler


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


@contextmanager
def serving(hub: FakeHub) -> Iterator[str]:
    """Serve on a free port of loopback; yield the URL."""
    over = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub, over))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub.url
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join(5)


def use(patch: pytest.MonkeyPatch, cache: Path, url: str, *, offline: bool = False) -> None:
    """Let the Hub client of this process ask ``url`` and keep what it gets in ``cache``."""
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", offline)
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    patch.setattr(time, "sleep", lambda seconds: None)  # between tries


def closed_port() -> str:
    """Return a URL on loopback at which nobody listens."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"
