"""Client of a TUF repository: signed releases, and their files in chunks that resume.

The repository is a folder on any HTTPS server that answers Range requests::

    metadata/   root, timestamp, snapshot, targets (The Update Framework 1.0, consistent snapshots)
    targets/    releases/<number>.json, models/<sha256>/<file>, models/<sha256>/<model>/<file>, wheels/<sha256>/<file>

A file's target has the SHA-256 of each of its chunks, so that a part is checked before the rest is fetched, and what
a power cut has damaged is fetched again, and no more.
"""

import contextlib
import hashlib
import math
import os
import re
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from platform import machine
from typing import TYPE_CHECKING, Annotated, BinaryIO, Final

import urllib3
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from tuf.api.exceptions import DownloadError, DownloadHTTPError, ExpiredMetadataError, RepositoryError
from tuf.ngclient import Updater, UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface

from fleet_common.mqtt.settings import TlsSettings
from fleet_common.mqtt.tls import tls_context
from schemas.control import MAX_LABEL, Release
from schemas.errors import FleetError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class UpdateFailed(FleetError):  # noqa: N818 - reads as what it says
    """The release cannot be installed here; it is not tried again."""


class UpdateWaits(FleetError):  # noqa: N818 - likewise
    """The update continues at a later start of the updater."""


class StorageFailed(FleetError):  # noqa: N818 - likewise
    """This machine cannot store the release now; the release is not at fault."""


CHUNK_BYTES: Final = 1 << 20
MAX_TARGET_BYTES: Final = 1 << 38
MAX_MANIFEST_BYTES: Final = 64 << 10
MAX_FILES: Final = 500

_OK, _PARTIAL = 200, 206  # of HTTP
_READ: Final = 16 << 10
_RECEIVE_BUFFER: Final = 128 << 10
"""Bytes that the kernel may hold: those that have arrived and were not read are lost when the power is cut."""

_TIMEOUT_S: Final = 30.0
_ATTEMPTS: Final = 5  # in a row, each with less than `_READ` bytes
_BACKOFF_S: Final = 2.0

_METADATA_S: Final = 900.0
"""Limit of the metadata, which does not resume. It is a few hundred kB after years; a line of GPRS carries 2 MB."""

_WINDOW_S: Final = 60.0
_WINDOW_BYTES: Final = 30_000
"""Bytes of a file in `_WINDOW_S`, at least. A line of GPRS carries five times as much."""

_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._+!-]{0,150}"
_FILE: Final = re.compile(rf"(?P<kind>models|wheels)/(?P<digest>[0-9a-f]{{64}})/(?P<name>(?:{_NAME}/)?{_NAME})")


def _checked(path: str) -> str:
    if not _FILE.fullmatch(path):
        raise ValueError("it is no path of a release's file")
    return path


_Path = Annotated[str, AfterValidator(_checked)]


class Manifest(BaseModel):
    """Content of `releases/<number>.json`.

    Attributes:
        number: Its own.
        version: Of the program, if the release has one.
        model: Path of the draft model; None keeps the model.
        wheels: Paths of all wheels of the program by kind of machine, such as `aarch64-cp311`; empty keeps the program.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    number: Release
    version: Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z.+]*$", max_length=MAX_LABEL)] | None = None
    model: _Path | None = None
    wheels: Mapping[str, Annotated[tuple[_Path, ...], Field(max_length=MAX_FILES)]] = Field(default_factory=dict)


class _Custom(BaseModel):
    chunks: Annotated[tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class ReleaseFile:
    """A file of a release.

    Attributes:
        name: Its name, after that of its folder if it has one.
        digest: Its SHA-256.
        source: Where the server has it.
    """

    name: str
    digest: str
    size: int
    source: str
    chunks: Sequence[str]


@dataclass(frozen=True, slots=True)
class VerifiedRelease:
    number: int
    version: str | None
    model: ReleaseFile | None
    wheels: Sequence[ReleaseFile]


def this_machine() -> str:
    """Return architecture and Python, as bundles are named by."""
    return f"{machine()}-cp{sys.version_info.major}{sys.version_info.minor}"


class _TooSlow(Exception):  # noqa: N818 - reads as what it says
    """The server holds the updater up. It is no OSError, which urllib3 would hide."""


class _Pace:
    """Least amount of content in each span of time, whatever else the server sends."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._span_s = self._needed = math.inf
        self._since, self._received = 0.0, 0
        self._look: Callable[[], None] | None = None

    def begin(self, span_s: float, needed: float, look: Callable[[], None] | None = None) -> None:
        """Require `needed` bytes in each span from now on; `look` is called whenever something arrives."""
        self._span_s, self._needed, self._look = span_s, needed, look
        self._since, self._received = self._clock(), 0

    def receive(self, size: int) -> None:
        self._received += size

    def check(self) -> None:
        """Raise `_TooSlow`, or what `look` raises."""
        if self._look is not None:
            self._look()
        passed_s = self._clock() - self._since
        if passed_s >= self._span_s:
            if self._received < self._needed:
                raise _TooSlow(f"it has sent {self._received} bytes in {passed_s:.0f} s")
            self.begin(self._span_s, self._needed, self._look)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        began = self._clock()
        yield
        self._since += self._clock() - began


def _https_pool(tls: TlsSettings, pace: _Pace) -> urllib3.PoolManager:
    """Return the connections of a device that shows its certificate, with no proxy, redirect or retry of their own.

    The pace is checked where all arrives, because headers can be endless too. A time-out is for a single receive.
    """

    class Socket(ssl.SSLSocket):
        def recv_into(self, buffer: "WriteableBuffer", nbytes: int | None = None, flags: int = 0) -> int:
            size = super().recv_into(buffer, nbytes, flags)
            pace.check()
            return size

    context = tls_context(tls)
    context.sslsocket_class = Socket
    options = [(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)]
    return urllib3.PoolManager(ssl_context=context, retries=False, socket_options=options)


class _Fetcher(FetcherInterface):
    def __init__(self, pool: urllib3.PoolManager, pace: _Pace) -> None:
        self._pool = pool
        self._pace = pace

    def _fetch(self, url: str) -> Iterator[bytes]:
        response = self._pool.request("GET", url, preload_content=False, redirect=False, timeout=_TIMEOUT_S)
        try:
            if response.status != _OK:
                raise DownloadHTTPError(f"status {response.status}", response.status)
            while data := response.read1(_READ):
                self._pace.receive(len(data))
                yield data
        finally:
            response.close()


class Repository:
    """A repository; what the root metadata does not vouch for is refused.

    `root` is the trusted root metadata. `folder` keeps the latest metadata of each role, so that older are refused.
    """

    def __init__(
        self, url: str, root: bytes, folder: Path, tls: TlsSettings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._url = url.rstrip("/")
        self._root = root
        self._folder = folder
        self._pace = _Pace(clock)
        self._pool = _https_pool(tls, self._pace)

    def release(self, number: int, look: Callable[[], None]) -> VerifiedRelease:
        """Return a release with its files for this machine.

        `look` is called whenever something arrives, and may raise `UpdateWaits`.
        """
        self._pace.begin(_METADATA_S, math.inf, look)
        try:
            return self._release(number)
        except ExpiredMetadataError as error:
            raise UpdateWaits(
                f"The signatures at {self._url} have expired ({error}): sign again with `fleet admin update publish`, "
                "or correct this machine's clock."
            ) from error
        except RepositoryError as error:
            raise UpdateWaits(
                f"The metadata of {self._url} is refused ({error}): this fleet's release key has not signed it, or it "
                "is older than before."
            ) from error
        except (DownloadError, urllib3.exceptions.HTTPError) as error:
            raise UpdateWaits(f"{self._url} cannot be read now: {_reason(error)}.") from error
        except _TooSlow as error:
            raise UpdateWaits(f"The metadata of {self._url} is too slow: {error}.") from error

    def _release(self, number: int) -> VerifiedRelease:
        self._folder.mkdir(parents=True, exist_ok=True)
        client = Updater(
            str(self._folder),
            f"{self._url}/metadata/",
            str(self._folder),
            f"{self._url}/targets/",
            _Fetcher(self._pool, self._pace),
            UpdaterConfig(prefix_targets_with_hash=False),
            bootstrap=self._root,
        )
        client.refresh()
        info = client.get_targetinfo(f"releases/{number}.json")
        if info is None:
            raise UpdateWaits(f"{self._url} has no release {number}; publish it, or see whether the mirror is current.")
        if info.length > MAX_MANIFEST_BYTES:
            raise UpdateFailed(f"The description of release {number} is longer than {MAX_MANIFEST_BYTES} bytes.")
        content = Path(client.download_target(info)).read_bytes()
        try:
            manifest = Manifest.model_validate_json(content)
        except ValidationError as error:
            raise UpdateFailed(f"The description of release {number} cannot be read by this version.") from error
        if manifest.number != number:
            raise UpdateFailed(f"The description of release {number} is that of another one.")
        wheels = manifest.wheels.get(this_machine(), ())
        if manifest.wheels and not wheels:
            raise UpdateFailed(f"Release {number} has no program for this machine, {this_machine()}.")
        return VerifiedRelease(
            number=number,
            version=manifest.version if wheels else None,
            model=None if manifest.model is None else _file(client, manifest.model),
            wheels=[_file(client, path) for path in wheels],
        )

    def fetch(
        self, file: ReleaseFile, part: Path, passed: Callable[[int], None], pause: Callable[[float], None]
    ) -> None:
        """Download a file to `part`, or the rest of it, and check it.

        `passed` receives the number of bytes that are present, delays the next ones, or raises `UpdateWaits`; `pause`
        waits before another attempt.
        """
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "r+b") as target:
            keep_valid_chunks(target, file)
            failures, why = 0, ""
            while (begin := target.tell()) < file.size:
                passed(begin)
                self._pace.begin(_WINDOW_S, _WINDOW_BYTES)
                try:
                    why = "its content is damaged" if not self._receive(file, target, passed) else "it ends too early"
                except urllib3.exceptions.HTTPError as error:
                    why = _reason(error)
                except _TooSlow as error:
                    raise UpdateWaits(f"{self._url}/targets/{file.source} is too slow: {error}.") from error
                failures = 0 if target.tell() - begin >= _READ else failures + 1
                if failures == _ATTEMPTS:
                    raise UpdateWaits(f"{self._url}/targets/{file.source} cannot be read now: {why}.")
                if target.tell() < file.size:
                    pause(_BACKOFF_S * 2**failures)
            passed(file.size)
            target.flush()
            os.fsync(descriptor)
            target.seek(0)
            if hashlib.file_digest(target, "sha256").hexdigest() != file.digest:
                raise UpdateFailed(f"{file.name} is not what its signature says: its chunks are, the whole is not.")

    def _receive(self, file: ReleaseFile, target: BinaryIO, passed: Callable[[int], None]) -> bool:
        """Append what the server sends; return False for a damaged chunk, which is dropped."""
        at = target.tell()
        wanted = {"Range": f"bytes={at}-", "Accept-Encoding": "identity"}
        url = f"{self._url}/targets/{file.source}"
        response = self._pool.request(
            "GET", url, headers=wanted, preload_content=False, redirect=False, timeout=_TIMEOUT_S
        )
        try:
            ranged = response.headers.get("Content-Range", "").startswith(f"bytes {at}-")
            if not (response.status == _PARTIAL and ranged) and not (response.status == _OK and at == 0):
                raise UpdateWaits(
                    f"{url} answers with status {response.status} instead of a range: use a server for static files "
                    "that knows HTTP Range, and see that the file is there."
                )
            while at < file.size and (
                data := response.read1(min(_READ, CHUNK_BYTES - at % CHUNK_BYTES, file.size - at))
            ):
                self._pace.receive(len(data))
                target.write(data)
                at += len(data)
                if at % CHUNK_BYTES == 0 or at == file.size:
                    target.flush()
                    os.fsync(target.fileno())
                    if not _valid(target, file, (at - 1) // CHUNK_BYTES):
                        target.truncate(target.seek((at - 1) // CHUNK_BYTES * CHUNK_BYTES))
                        return False
                    target.seek(at)
                with self._pace.suspended():
                    passed(at)
        finally:
            response.close()
        return True


def keep_valid_chunks(target: BinaryIO, file: ReleaseFile) -> None:
    """Truncate a part where its content is not that of the file, and move to its end."""
    size = target.seek(0, os.SEEK_END)
    whole, rest = divmod(size, CHUNK_BYTES)
    count = whole + (size == file.size and rest > 0)
    valid = next((index for index in range(min(count, len(file.chunks))) if not _valid(target, file, index)), count)
    end = valid * CHUNK_BYTES if valid < count or size > file.size else size
    target.truncate(target.seek(end))


def _valid(target: BinaryIO, file: ReleaseFile, index: int) -> bool:
    target.seek(index * CHUNK_BYTES)
    return hashlib.sha256(target.read(CHUNK_BYTES)).hexdigest() == file.chunks[index]


def _file(client: Updater, path: str) -> ReleaseFile:
    match, info = _FILE.fullmatch(path), client.get_targetinfo(path)
    if match is None or info is None or info.hashes.get("sha256") != match["digest"]:
        raise UpdateFailed(f"The file {path} of the release is not signed; publish the release again.")
    try:
        chunks = _Custom.model_validate(info.custom).chunks
    except ValidationError as error:
        raise UpdateFailed(f"The file {path} of the release has no usable chunks; publish it again.") from error
    if not 0 < info.length <= MAX_TARGET_BYTES or len(chunks) != -(-info.length // CHUNK_BYTES):
        raise UpdateFailed(f"The file {path} of the release has another size than its chunks; publish it again.")
    return ReleaseFile(match["name"], match["digest"], info.length, path, chunks)


def _reason(error: BaseException) -> str:
    """Return the innermost reason: the layers above it repeat it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(getattr(error, "reason", "")) or str(error) or type(error).__name__)[:200].rstrip(".")
