"""Manifest of a model's folder, with checksums: written after every finished step, so that work resumes."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fleet_cli.models.files import sync_folder

__all__ = [
    "MANIFEST",
    "Artifact",
    "FileRecord",
    "Manifest",
    "SourceRecord",
    "read_manifest",
    "write_manifest",
]

MANIFEST = "manifest.json"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Bytes = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class FileRecord(_Record):
    """One file: SHA-256 and bytes."""

    sha256: Digest
    size: Bytes


class SourceRecord(_Record):
    """The GGUF that everything was made from."""

    package: str
    version: str
    file: str
    size: Bytes
    sha256: Digest


class Artifact(_Record):
    """What one step made.

    Attributes:
        files: By path relative to the model's folder.
        made_with: Versions of the packages that made it.
    """

    files: Annotated[dict[str, FileRecord], Field(min_length=1)]
    made_with: dict[str, str]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files.values())


class Manifest(_Record):
    """A model's folder.

    Attributes:
        format: Of this file.
        source: What all was made from.
        artifacts: By step.
    """

    format: Literal[1] = 1
    source: SourceRecord
    artifacts: dict[str, Artifact] = Field(default_factory=dict)

    def having(self, step: str, artifact: Artifact) -> "Manifest":
        """Return this manifest with one more finished step."""
        return self.model_copy(update={"artifacts": self.artifacts | {step: artifact}})


def read_manifest(folder: Path) -> Manifest | None:
    """Return the folder's manifest, or None if there is none that can be read; it is then made anew."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the folder's manifest atomically."""
    partial = folder / f".partial-{os.getpid()}-{MANIFEST}"
    with partial.open("wb") as file:
        file.write(manifest.model_dump_json(indent=2).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / MANIFEST)
    sync_folder(folder)
