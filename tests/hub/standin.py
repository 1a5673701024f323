"""A stand-in for the Hugging Face hub on loopback: the routes of huggingface_hub's downloads, and a record of requests."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Hub:
    """Repositories by id, each a list of (commit, folder), the newest last; and the requests so far.

    `token`: the one that may read; None lets everybody. `moves`: the newest commit is told only from the second question for
    "main" on, as when somebody pushes during a load.
    """

    repos: dict[str, list[tuple[str, Path]]]
    token: str | None = None
    moves: bool = False
    requests: list[tuple[str, str]] = field(default_factory=list)
    asked: int = 0
    url: str = ""

    def downloads(self, suffix: str) -> int:
        """How many times the contents of files that end in `suffix` were fetched."""
        return sum(method == "GET" and "/resolve/" in path and path.endswith(suffix) for method, path in self.requests)

    def commit(self, repo: str, revision: str) -> tuple[str, Path] | None:
        """The commit and folder that a branch or a commit's hash stands for."""
        history = self.repos[repo]
        if revision == "main":
            self.asked += 1
            return history[0] if self.moves and self.asked == 1 else history[-1]
        return next((each for each in history if each[0] == revision), None)


def commit_hash(text: str) -> str:
    """Forty hex digits, as a commit has."""
    return hashlib.sha1(text.encode()).hexdigest()


@contextlib.contextmanager
def serve(hub: Any, kind: type[BaseHTTPRequestHandler] | None = None) -> Iterator[Any]:
    """Answer on a free port of loopback until the body ends; `hub.url` tells where.

    Args:
        kind: the handler of requests, which finds the hub as `served`; by default that of downloads.
    """

    class Handler(kind or _Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        """A question about some paths of a repository."""
        self._answer(parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode()).get("paths"))

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def _answer(self, paths: list[str] | None = None) -> None:
        path = unquote(urlsplit(self.path).path)
        self.served.requests.append((self.command, path))
        repo = next((each for each in self.served.repos if f"/{each}/" in f"{path}/"), None)
        if repo is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if self.served.token and self.headers.get("Authorization") != f"Bearer {self.served.token}":
            return self._send(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        kind, rest = path.split(f"/{repo}", 1)
        words = rest.strip("/").split("/", 2)
        revision = words[1] if len(words) > 1 else "main"
        found = self.served.commit(repo, revision)
        if found is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        commit, folder = found
        if kind.startswith("/api/"):
            tree = [
                {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": commit_hash(str(f))}
                for f in sorted(folder.rglob("*"))
                if f.is_file() and (paths is None or str(f.relative_to(folder)) in paths)
            ]
            info = {"id": repo, "sha": commit, "siblings": [{"rfilename": each["path"]} for each in tree]}
            return self._send(200, json.dumps(tree if words[0] in ("tree", "paths-info") else info).encode(), {})
        file = folder / words[2]
        if not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {"ETag": f'"{commit_hash(str(file))}"', "X-Repo-Commit": commit}
        return self._send(200, file.read_bytes(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
