"""A stand-in for the routes of the hub by which huggingface_hub uploads: it keeps what was committed."""

import base64
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit


@dataclass
class UploadHub:
    """The owner's token, and the files of each repository after its commits."""

    token: str
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    url: str = ""


class Uploads(BaseHTTPRequestHandler):
    """Answers the requests of an upload; `standin.serve` starts it."""

    served: UploadHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        """Everybody may read; only the owner passes the check of who may write."""
        if "auth-check" in self.path and self.headers.get("Authorization") != f"Bearer {self.served.token}":
            return self._send(401, {"error": "Invalid credentials"})
        return self._send(200, {"id": "me/model", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {self.served.token}":
            return self._send(401, {"error": "Invalid credentials"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(filter(None, (asked.get("organization") or "me", asked["name"])))
            if repo in self.served.repos:
                return self._send(409, {"error": "exists", "url": f"{self.served.url}/{repo}"})
            self.served.repos[repo], self.served.private[repo] = {}, asked.get("visibility") == "private"
            return self._send(200, {"url": f"{self.served.url}/{repo}"})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        _, _, owner, name, action, *_ = path.strip("/").split("/")
        repo = f"{owner}/{name}"
        if action == "preupload":
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in json.loads(body)["files"]
            ]
            return self._send(200, {"files": files})
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.served.repos[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        url = f"{self.served.url}/{repo}/commit/{'1' * 40}"
        return self._send(200, {"commitUrl": url, "commitOid": "1" * 40, "success": True})

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        content = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _send(self, status: int, body: dict) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
