"""Files of the prepared models: written atomically, recorded in a manifest."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fleet_common.gguf_files import GgufUnreadable, vocabulary_of
from fleet_common.host import sync, write_atomically
from schemas.errors import FleetError
from schemas.vocabulary import Vocabulary, token_strings


class ModelsError(FleetError):
    """Base of the errors of this package."""


class SourceMissing(ModelsError):  # noqa: N818 - reads as what it says
    """The package that carries the model is not installed."""


class SourceDamaged(ModelsError):  # noqa: N818
    """The model in that package has changed."""


class NotEnoughSpace(ModelsError):  # noqa: N818
    """The disk is too full to begin."""


class FolderUnusable(ModelsError):  # noqa: N818
    """The models folder cannot be written."""


class StepFailed(ModelsError):  # noqa: N818
    """A conversion failed; what was finished before it is kept."""


class ModelUnreadable(ModelsError):  # noqa: N818
    """The file or folder is no readable model."""


PARTIAL = ".partial-"
_STALE = ".partial-stale-"


def walk(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(entry for entry in path.rglob("*") if entry.is_file())
    return [path]


def measure(path: Path) -> int:
    """Return the bytes at or under `path`; 0 if it does not exist."""
    total = 0
    for file in walk(path):
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # renamed or removed by its writer meanwhile
            continue
    return total


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(path: Path) -> None:
    """Make everything at or under `path` readable by all and durable."""
    for file in walk(path):
        # Weights are written for the owner alone by safetensors; the edge may run as another user.
        if file.stat().st_uid == os.geteuid():
            file.chmod(0o644)
        sync(file)
    if path.is_dir():
        path.chmod(0o755)
        sync(path)


def publish(partial: Path, final: Path) -> None:
    """Move a finished file or folder to its final place, replacing an old one."""
    if final.is_dir():
        # A folder cannot be replaced in one step: the old one is moved aside first.
        stale = final.with_name(f"{_STALE}{os.getpid()}-{final.name}")
        final.rename(stale)
        partial.rename(final)
        remove(stale)
    else:
        partial.replace(final)
    sync(final.parent)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def lock(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold an exclusive lock on a file, which the kernel frees; `on_wait` is called before waiting."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


MANIFEST = "manifest.json"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Bytes = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class FileRecord(_Record):
    sha256: Digest
    size: Bytes


class SourceRecord(_Record):
    package: str
    version: str
    file: str
    size: Bytes
    sha256: Digest


class PreparedArtifact(_Record):
    files: Annotated[dict[str, FileRecord], Field(min_length=1)]  # by path relative to the model's folder
    made_with: dict[str, str]  # versions of packages

    @property
    def size(self) -> int:
        return sum(record.size for record in self.files.values())


class Manifest(_Record):
    format: Literal[1] = 1
    source: SourceRecord
    artifacts: dict[str, PreparedArtifact] = Field(default_factory=dict)  # by step

    def having(self, step: str, artifact: PreparedArtifact) -> "Manifest":
        return self.model_copy(update={"artifacts": self.artifacts | {step: artifact}})


def read_manifest(folder: Path) -> Manifest | None:
    """Return the folder's manifest; None if it is missing or unreadable."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=2).encode() + b"\n", mode=0o644)


def write_vocabulary(target: Path, out: Path) -> Vocabulary:
    """Write the vocabulary of a target's GGUF to its own file, and return it; raises `ModelsError`."""
    if target.is_dir():
        raise ModelUnreadable(
            f"{target} is a folder; give a GGUF of the same model, in any quantization, for llama.cpp on the devices."
        )
    try:
        strings, content = vocabulary_of(target)
    except GgufUnreadable as error:
        raise ModelUnreadable(str(error)) from error
    if out.exists() and out.samefile(target):
        raise ModelsError(f"{out} is the target itself; name another file with --out.")
    partial = out.with_name(f"{PARTIAL}{out.name}")
    try:
        partial.write_bytes(content)
        seal(partial)
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ModelsError(f"The file {out} cannot be written: {error.strerror or error}.") from error
    return Vocabulary.of(token_strings(strings))
