"""Releases on a gateway, in the layout of the Ansible roles.

::

    <programs>/venvs/<version>-<digest>   a program, installed from wheels
    <programs>/releases/update-<number>   configuration, with links to its program
    <programs>/current, previous          the running release, and the one before
    <programs>/updater                    the latest release that passed its self-test: the updater runs from it
    <models>/<sha256>/<file>              models
    <models>/<sha256>/<model>/<file>      likewise, if the file is named by the quantization
"""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from broker_config.broker import toml_lines
from fleet_common.host import sync, write_atomically
from fleet_device.updates.repository import ReleaseFile, StorageFailed, UpdateFailed, VerifiedRelease

CONFIG: Final = "device.toml"
PREFIX: Final = "update-"
_DIGEST: Final = 16  # characters of a digest in a path
_CONFIG_MODE: Final = 0o640
_INSTALL_S: Final = 1800.0

_STORAGE_ERRORS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
"""What pip prints if a machine cannot store, in the form of Python's OSError."""

INSTALLED_SHARE: Final = 4
"""Bytes of an installed program for a byte of its wheels, at most."""


@dataclass(frozen=True, slots=True)
class UpdatePaths:
    programs: Path
    models: Path

    @property
    def running(self) -> str:
        """Return the folder of the release that runs."""
        return (self.programs / "current").readlink().name

    def model(self, file: ReleaseFile) -> Path:
        return self.models / file.digest[:_DIGEST] / file.name

    def program(self, release: VerifiedRelease) -> Path:
        names = "\n".join(sorted(wheel.digest for wheel in release.wheels))
        return self.programs / "venvs" / f"{release.version}-{hashlib.sha256(names.encode()).hexdigest()[:8]}"

    def prepare(self, release: VerifiedRelease, wheels: Sequence[Path]) -> str:
        """Install a release next to those that are there, and return the name of its folder.

        What the release does not have, program or model, is that of the running release. Raise UpdateFailed only if
        it is the release's fault.
        """
        current = self.programs / "current"
        program = (current / "venv").resolve()
        if release.wheels:
            program = self.program(release)
            install_program(program, wheels, version=str(release.version))
        name = f"{PREFIX}{release.number}"
        folder = self.programs / "releases" / name
        draft, old = folder.with_name(f".{name}"), folder.with_name(f".{name}.old")
        for rest in (draft, old):
            shutil.rmtree(rest, ignore_errors=True)
        try:
            before = current / CONFIG
            config = tomllib.loads(before.read_text(encoding="utf-8"))
            if release.model is not None:
                config["model"] = str(self.model(release.model))
            text = "\n".join([*toml_lines(config), ""])
            if tomllib.loads(text) != config:
                raise UpdateFailed(f"{before} has sections in sections; roll this release out with Ansible.")
            draft.mkdir(mode=0o755)
            write_atomically(draft / CONFIG, text.encode(), mode=_CONFIG_MODE)
            os.chown(draft / CONFIG, -1, before.stat().st_gid)  # the service reads it as a member of this group
            (draft / "venv").symlink_to(program)
            if folder.exists():  # from an earlier attempt; a link may lead to it
                folder.rename(old)
            draft.rename(folder)
            sync(folder.parent)
        except ValueError as error:
            raise UpdateFailed(f"The release cannot be prepared in {folder}: {error}.") from error
        return name

    def switch(self, name: str) -> None:
        """Make the service run the release `name` from its next start on."""
        self._link("current", name)

    def prove(self, name: str, *, previous: str) -> None:
        """Record that a release has passed its self-test, and what ran before it."""
        write_atomically(self.programs / "releases" / name / "proven", f"{name}\n".encode(), mode=0o644)
        self._link("previous", previous)
        self._link("updater", name)

    def remove_old(self) -> None:
        """Remove releases of earlier updates, and programs and models that no release uses any more."""
        releases = self.programs / "releases"
        kept = {(self.programs / link).resolve().name for link in ("current", "previous", "updater")}
        for folder in releases.iterdir():
            if folder.name.startswith((PREFIX, f".{PREFIX}")) and folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)
        used: set[Path] = set()
        for folder in releases.iterdir():
            used.add((folder / "venv").resolve())
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                model = tomllib.loads((folder / CONFIG).read_text(encoding="utf-8"))["model"]
                used.update(Path(model).resolve().parents)
        for folder in (*(self.programs / "venvs").iterdir(), *self.models.iterdir()):
            # What Ansible has installed belongs to root.
            if folder.resolve() not in used and folder.stat().st_uid == os.geteuid():
                shutil.rmtree(folder, ignore_errors=True)

    def _link(self, link: str, name: str) -> None:
        draft = self.programs / f".{link}.{secrets.token_hex(4)}"
        draft.symlink_to(f"releases/{name}")
        draft.replace(self.programs / link)
        sync(self.programs)


def install_program(folder: Path, wheels: Sequence[Path], *, version: str) -> None:
    """Install wheels into a virtual environment, which is marked as complete in the end. Nothing is downloaded.

    Raise UpdateFailed if it is the wheels' fault, else StorageFailed.
    """
    complete = folder / "complete"
    if complete.exists():
        return
    python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    problem = f"The program cannot be installed in {folder}: "
    try:
        _run([python, "-m", "venv", "--clear", folder])
    except (OSError, subprocess.SubprocessError) as error:
        raise StorageFailed(problem + _last_line(error)) from error
    try:
        _run([folder / "bin" / "python", *install, "--no-index", "--no-deps", "--only-binary=:all:", *wheels])
        said = _run([folder / "bin" / "fleet", "--version"]).strip()
    except (OSError, subprocess.SubprocessError) as error:
        output = f"{error} {getattr(error, 'stderr', '')}"
        not_stored = any(f"[Errno {number}]" in output for number in _STORAGE_ERRORS)
        raise (StorageFailed if not_stored else UpdateFailed)(problem + _last_line(error)) from error
    if said != version:
        raise UpdateFailed(f"The program of the release is version {said[:40]!r} instead of {version}.")
    write_atomically(complete, f"{version}\n".encode(), mode=0o644)


def _last_line(error: Exception) -> str:
    lines = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
    return lines[-1] if lines else str(error)


def _run(command: Sequence[str | Path]) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_S, check=True, env=clean)
    return done.stdout
