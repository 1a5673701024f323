"""A server on loopback that answers as S3 does, and plain HTTP with ranges; it can be slow, refuse and break off on purpose."""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.hub import standin


@dataclass
class Store:
    """Files by path, "bucket/folder/name", and the requests so far.

    `key`: the access key that may read; None lets everybody. `busy`: the number of further requests that are answered with 503.
    `cut`: the number of further bodies that break off in the middle. `ranges`, `etags`: whether the server knows them.
    """

    files: dict[str, bytes]
    key: str | None = None
    busy: int = 0
    cut: int = 0
    ranges: bool = True
    etags: bool = True
    requests: list[tuple[str, str]] = field(default_factory=list)
    sent: Counter = field(default_factory=Counter)
    url: str = ""


def serve(store: Store) -> AbstractContextManager[Store]:
    """Answer on a free port of loopback until the block ends; `store.url` tells where."""
    return standin.serve(store, _Handler)


@contextlib.contextmanager
def serve_s3(store: Store, monkeypatch) -> Iterator[Store]:
    """The same, with the environment variables by which S3's clients find this server and a key."""
    import s3fs

    with serve(store):
        for name, value in {
            "AWS_ENDPOINT_URL": store.url, "AWS_ACCESS_KEY_ID": "the-key", "AWS_SECRET_ACCESS_KEY": "the-secret",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            yield store
        finally:
            s3fs.S3FileSystem.clear_instance_cache()


class _Handler(BaseHTTPRequestHandler):
    served: Store
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        store, url = self.served, urlsplit(self.path)
        path, query = unquote(url.path).strip("/"), parse_qs(url.query)
        store.requests.append((self.command, self.path))
        if store.busy > 0:
            store.busy -= 1
            return self._send(503, _error("SlowDown"), with_body)
        if store.key is not None and f"Credential={store.key}/" not in self.headers.get("Authorization", ""):
            return self._send(403, _error("AccessDenied"), with_body)
        if "list-type" in query:
            return self._send(200, self._listing(path, query), with_body)
        if path not in store.files:
            return self._send(404, _error("NoSuchKey"), with_body)
        return self._send_file(path, store.files[path], with_body)

    def _send_file(self, path: str, content: bytes, with_body: bool) -> None:
        store, asked = self.served, self.headers.get("Range")
        headers = {"ETag": f'"{hashlib.md5(content).hexdigest()}"'} if store.etags else {}
        if not store.ranges:
            return self._send(200, content, with_body, headers, path)
        headers["Accept-Ranges"] = "bytes"
        if not asked:
            return self._send(200, content, with_body, headers, path)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1 if last else len(content), len(content))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self._send(206, content[start:stop], with_body, headers, path)

    def _listing(self, bucket: str, query: dict[str, list[str]]) -> bytes:
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        keys = sorted(path.removeprefix(f"{bucket}/") for path in self.served.files if path.startswith(f"{bucket}/{prefix}"))
        folders = {prefix + key[len(prefix) :].split(delimiter)[0] + delimiter for key in keys if delimiter and delimiter in key[len(prefix) :]}  # fmt: skip  # noqa: E501
        shown = [key for key in keys if not delimiter or delimiter not in key[len(prefix) :]]
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{hashlib.md5(self.served.files[f'{bucket}/{key}']).hexdigest()}&quot;</ETag>"
            f"<Size>{len(self.served.files[f'{bucket}/{key}'])}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for key in shown
        ) + "".join(f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" for each in sorted(folders))
        return (
            '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(shown) + len(folders)}</KeyCount>"
            f"<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        ).encode()

    def _send(self, status: int, body: bytes, with_body: bool, headers: dict | None = None, path: str = "") -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not with_body:
            return
        if path and self.served.cut > 0:
            self.served.cut -= 1
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body)
        self.served.sent[path] += len(body)


def _error(code: str) -> bytes:
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'.encode()
