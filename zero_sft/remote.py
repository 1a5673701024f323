"""Files at URLs, `s3://bucket/a.jsonl`, through fsspec: what identifies them, and reading them with retries.

The credentials are those that fsspec's libraries find: environment variables, profiles of the cloud, `FSSPEC_...`, `HF_TOKEN`.
"""

import errno
import functools
import io
import logging
import posixpath
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal
from urllib.parse import urlsplit, urlunsplit

logger = logging.getLogger(__name__)

LIBRARIES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}
"""The schemes that are read, and the library that fsspec needs for each."""

TRIES = 5
_LONGEST_SILENCE = 60  # seconds without a byte of an answer
_FIRST_WAIT = 0.5  # seconds before the second try; doubled before each further one
_FIRST_BYTES, _MOST_BYTES = 2**18, 2**23  # of a request, at the beginning and after reading on for a while

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.:-]*)://.*", re.DOTALL)
_ADDRESS = re.compile(r"https?://[^\s'\"<>,]+(,[^\s'\"<>,]+)*", re.IGNORECASE)
_CONTENT_KEYS = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Digest", "md5", "checksum", "sha256")
_TIME_KEYS = ("LastModified", "last_modified", "updated", "mtime", "Last-Modified")


class RemoteError(OSError):
    """A remote file that can't be read; `strerror` gives the reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(errno.EIO, reason)


def scheme_of(text: str) -> str | None:
    """Return the scheme of a URL in lower case, "s3"; None if the text is not a URL."""
    match = _URL.fullmatch(text)
    return match and match["scheme"].lower()


def is_web(url: str) -> bool:
    """Whether a URL is an address of the web, where `?` begins a query and `@` follows a password."""
    return scheme_of(url) in ("http", "https")


def redacted(url: str) -> str:
    """Return an address of the web without user, password and query, which may hold a signature; `...` stands for a query.

    Other URLs hold no secrets: a key of S3 may have any of these characters.
    """
    if not is_web(url):
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "..." if parts.query else "", ""))


def without_secrets(text: str) -> str:
    """Return a text in which all addresses of the web are `redacted`."""
    return _ADDRESS.sub(lambda match: redacted(match[0]), text)


@dataclass(frozen=True, slots=True, order=True)
class RemoteFile:
    """A file or folder at a URL; `str` leaves out what may be secret. Any rank may use it; nothing here communicates.

    All methods raise `OSError`: `FileNotFoundError`, `PermissionError`, or `RemoteError` for any other reason.
    """

    url: str

    def __str__(self) -> str:
        return redacted(self.url)

    @property
    def name(self) -> str:
        """The last part of the path."""
        path = urlsplit(self.url).path if is_web(self.url) else self.url.partition("://")[2]
        return posixpath.basename(path.rstrip("/"))

    @property
    def suffix(self) -> str:
        """The ending of the name, such as ".gz"."""
        return posixpath.splitext(self.name)[1]

    def info(self) -> dict[str, Any]:
        """Ask the server for the file's size, type and what identifies its contents, as fsspec names them."""
        filesystem, path = _open_filesystem(self.url)

        def ask() -> dict[str, Any]:
            filesystem.invalidate_cache()
            return filesystem.info(path)

        return self._retry(ask)

    def version(self) -> tuple[Any, ...]:
        """Return values that change when the file is written to: its size, digest or ETag, and time, as far as it has them."""
        return _version(self.info())

    def digest(self) -> str | None:
        """Return the size and the digest or ETag that the server gives, as text; None if it gives neither."""
        info = self.info()
        values = [f"{key} {info[key]}" for key in _CONTENT_KEYS if info.get(key)]
        return f"{info.get('size')} {' '.join(values)}" if values else None

    def is_folder(self) -> bool:
        """Whether the URL is that of a folder; an address of the web is always that of a file."""
        return not is_web(self.url) and self.info().get("type") == "directory"

    def files(self) -> dict[str, "RemoteFile"]:
        """Return all files in and below a folder, by their path inside it, sorted."""
        filesystem, path = _open_filesystem(self.url)
        top = path.rstrip("/") + "/"
        found = sorted(self._retry(lambda: filesystem.find(path)))
        return {name.removeprefix(top).lstrip("/"): RemoteFile(filesystem.unstrip_protocol(name)) for name in found}

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        """Open the file. It is read in ranges, each of them tried several times, or downloaded if the server has no ranges."""
        info = self.info()
        if info.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, "is a folder", str(self))
        filesystem, path = _open_filesystem(self.url)
        size = info.get("size")
        if size is None or not self._retry(lambda: _has_ranges(filesystem, path, info)):
            return self._downloaded(filesystem, path, size)
        return io.BufferedReader(_Ranges(self, filesystem, path, size, _version(info)))

    def _downloaded(self, filesystem: Any, path: str, size: int | None) -> BinaryIO:
        """Download the file into a temporary one, which the system removes when it is closed."""
        file: Any = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it

        def download() -> None:
            file.seek(0)
            file.truncate()
            filesystem.get_file(path, file)
            if size is not None and file.tell() != size:
                raise RemoteError(f"the server sent {file.tell():,} bytes in place of {size:,}")

        self._retry(download)
        file.seek(0)
        return file

    def _retry(self, function: Callable[[], Any]) -> Any:
        """Call a function that asks the server, up to `TRIES` times."""
        for attempt in range(1, TRIES + 1):
            try:
                return function()
            except Exception as error:  # the exceptions of every library behind fsspec
                if attempt == TRIES or _is_final(error):
                    raise _explained(error, self) from error
                logger.info("%s: %s; trying again", self, _reason(error, self))
                time.sleep(_FIRST_WAIT * 2 ** (attempt - 1))
        raise AssertionError("unreachable")


class _Ranges(io.RawIOBase):
    """A remote file as a raw file that can seek. It asks for ranges, which grow while the file is read from front to back."""

    def __init__(self, file: RemoteFile, filesystem: Any, path: str, size: int, version: tuple[Any, ...]) -> None:
        self._file, self._filesystem, self._path, self._size, self._at = file, filesystem, path, size, 0
        self._version = version
        self._block, self._block_start, self._next_bytes = b"", 0, _FIRST_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        if self._at >= self._size or not view:
            return 0
        stop = self._block_start + len(self._block)
        if not self._block_start <= self._at < stop:
            self._next_bytes = min(2 * self._next_bytes, _MOST_BYTES) if self._block and self._at == stop else _FIRST_BYTES
            wanted = min(max(len(view), self._next_bytes), self._size - self._at)
            self._block = self._file._retry(functools.partial(self._read, self._at, self._at + wanted))
            self._block_start = self._at
            if self._file.version() != self._version:
                raise RemoteError("it changed while it was read. Start again when nobody writes to it")
        begin = self._at - self._block_start
        part = memoryview(self._block)[begin : begin + len(view)]
        view[: len(part)] = part
        self._at += len(part)
        return len(part)

    def _read(self, start: int, stop: int) -> bytes:
        data = self._filesystem.cat_file(self._path, start=start, end=stop)
        if len(data) != stop - start:
            raise RemoteError(f"the server sent {len(data):,} bytes in place of {stop - start:,}")
        return data


def _version(info: Mapping[str, Any]) -> tuple[Any, ...]:
    return (info.get("size"), *(str(info[key]) for key in (*_CONTENT_KEYS, *_TIME_KEYS) if info.get(key)))


def _has_ranges(filesystem: Any, path: str, info: Mapping[str, Any]) -> bool:
    """Whether the server sends ranges of a file; on the web, only a request for one shows it."""
    if "http" not in filesystem.protocol or info["size"] < 2:
        return True
    try:
        with filesystem.open(path, "rb", block_size=1, cache_type="none") as file:
            file.seek(1)
            return len(file.read(1)) == 1
    except ValueError:  # so fsspec says that the server sent the whole file
        return False


def _open_filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it; raises as `RemoteFile` does."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url, **_options_of(url))
    except Exception as error:
        raise _explained(error, RemoteFile(url)) from error


def _options_of(url: str) -> dict[str, Any]:
    """Return options for fsspec: on the web, limits for silence in place of one for a whole download."""
    if not is_web(url):
        return {}
    import aiohttp

    limits = aiohttp.ClientTimeout(total=None, sock_connect=_LONGEST_SILENCE, sock_read=_LONGEST_SILENCE)
    return {"client_kwargs": {"timeout": limits}}


def _explained(error: Exception, file: RemoteFile) -> OSError:
    """Return the error of a library as an `OSError` with the reason."""
    if isinstance(error, IsADirectoryError | RemoteError):
        return error
    if isinstance(error, PermissionError) or _status(error) in (401, 403) or _lacks_credentials(error):
        return PermissionError(errno.EACCES, f"access denied: {_reason(error, file)}", str(file))
    if isinstance(error, FileNotFoundError) and not _hides_another(error):
        return FileNotFoundError(errno.ENOENT, "no such file", str(file))
    if isinstance(error, ImportError):
        library = LIBRARIES.get(scheme_of(file.url) or "", "a library")
        return RemoteError(f"{library} is not installed (pip install {library})")
    return RemoteError(_reason(error, file))


def _is_final(error: Exception) -> bool:
    """Whether asking again would not change the answer."""
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 429)
    is_final = isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError | ImportError)
    return _lacks_credentials(error) or (is_final and not _hides_another(error))


def _hides_another(error: Exception) -> bool:
    """Whether fsspec reports a missing file although its request failed for another reason, such as no connection."""
    cause, status = error.__cause__, _status(error)
    if status is not None:
        return status not in (404, 410)
    return cause is not None and type(cause).__module__.startswith("aiohttp")


def _lacks_credentials(error: Exception) -> bool:
    """Whether a library found no credentials: botocore's, google's and azure's errors have such names."""
    return "credential" in type(error).__name__.lower()


def _status(error: BaseException) -> int | None:
    """Return the status that a server answered with; None if the error has none. fsspec hides it in the cause."""
    for each in filter(None, (error, error.__cause__)):
        response = getattr(each, "response", None)
        of_botocore = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        for status in (getattr(each, "status", None), getattr(response, "status_code", None), of_botocore):
            if isinstance(status, int):
                return status
    return None


def _reason(error: Exception, file: RemoteFile) -> str:
    """Return the first line of an error's message, without what may be secret in the URL."""
    shown = error.__cause__ if error.__cause__ and (_status(error) or _hides_another(error)) else error
    text = str(getattr(shown, "strerror", None) or shown).replace(file.url, str(file))
    return without_secrets(next(iter(text.strip().splitlines()), "") or type(error).__name__)
