"""Client of a TUF repository: signed releases, and their files in chunks that resume.

The repository is a folder on any HTTPS server that answers Range requests::

    metadata/   root, timestamp, snapshot, targets (The Update Framework 1.0, consistent snapshots)
    targets/    releases/<number>.json, models/<sha256>/<file>, models/<sha256>/<model>/<file>, wheels/<sha256>/<file>

A file's target has the SHA-256 of each of its chunks, so that a part is checked before the rest is fetched, and what
a power cut has damaged is fetched again, and no more.
"""

import hashlib
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from platform import machine
from typing import Annotated, BinaryIO, Final

import urllib3
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from tuf.api.exceptions import DownloadError, DownloadHTTPError, ExpiredMetadataError, RepositoryError
from tuf.ngclient import Updater, UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface

from fleet_common.mqtt.settings import TlsSettings
from fleet_common.mqtt.tls import tls_context
from schemas.control import MAX_LABEL, Release
from schemas.errors import FleetError


class UpdateFailed(FleetError):  # noqa: N818 - reads as what it says
    """The release cannot be installed here; it is not tried again."""


class UpdateWaits(FleetError):  # noqa: N818 - likewise
    """The update continues at a later start of the updater."""


CHUNK_BYTES: Final = 1 << 20
MAX_TARGET_BYTES: Final = 1 << 38
MAX_MANIFEST_BYTES: Final = 64 << 10
MAX_FILES: Final = 500

_OK, _PARTIAL = 200, 206  # of HTTP
_READ: Final = 16 << 10
_RECEIVE_BUFFER: Final = 128 << 10
"""Bytes that the kernel may hold: those that have arrived and were not read are lost when the power is cut."""

_TIMEOUT_S: Final = 30.0
_ATTEMPTS: Final = 5  # without a byte in between
_BACKOFF_S: Final = 2.0

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


def https_pool(tls: TlsSettings) -> urllib3.PoolManager:
    """Return the connections of a device that shows its certificate, with no proxy, redirect or retry of their own."""
    options = [(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)]
    return urllib3.PoolManager(ssl_context=tls_context(tls), retries=False, socket_options=options)


class _Fetcher(FetcherInterface):
    def __init__(self, pool: urllib3.PoolManager) -> None:
        self._pool = pool

    def _fetch(self, url: str) -> Iterator[bytes]:
        response = self._pool.request("GET", url, preload_content=False, redirect=False, timeout=_TIMEOUT_S)
        if response.status != _OK:
            response.close()
            raise DownloadHTTPError(f"status {response.status}", response.status)
        return response.stream(_READ)


class Repository:
    """A repository; what the root metadata does not vouch for is refused.

    `root` is the trusted root metadata. `folder` keeps the latest metadata of each role, so that older are refused.
    """

    def __init__(self, url: str, root: bytes, folder: Path, pool: urllib3.PoolManager) -> None:
        self._url = url.rstrip("/")
        self._root = root
        self._folder = folder
        self._pool = pool

    def release(self, number: int) -> VerifiedRelease:
        """Return a release with its files for this machine."""
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

    def _release(self, number: int) -> VerifiedRelease:
        self._folder.mkdir(parents=True, exist_ok=True)
        client = Updater(
            str(self._folder),
            f"{self._url}/metadata/",
            str(self._folder),
            f"{self._url}/targets/",
            _Fetcher(self._pool),
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
                try:
                    why = "its content is damaged" if not self._receive(file, target, passed) else "it ends too early"
                except urllib3.exceptions.HTTPError as error:
                    why = _reason(error)
                failures = 0 if target.tell() > begin else failures + 1
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
                data := response.read(min(_READ, CHUNK_BYTES - at % CHUNK_BYTES, file.size - at))
            ):
                target.write(data)
                at += len(data)
                if at % CHUNK_BYTES == 0 or at == file.size:
                    target.flush()
                    os.fsync(target.fileno())
                    if not _valid(target, file, (at - 1) // CHUNK_BYTES):
                        target.truncate(target.seek((at - 1) // CHUNK_BYTES * CHUNK_BYTES))
                        return False
                    target.seek(at)
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
