"""Exceptions of the certificate authority and of enrolment; bounded reads."""

from pathlib import Path
from typing import Final

from fleet_common import host
from schemas.errors import FleetError


class IdentityError(FleetError):
    """Base class of the errors of this package. Its message is one sentence for the user."""


class AuthorityError(IdentityError):
    """The authority's folder or key cannot be used."""


class NameRefused(IdentityError):  # noqa: N818 - reads as what it says
    """The identity must not have this name, or the name is unknown."""


class SigningRefused(IdentityError):  # noqa: N818
    """The signing request must not be signed."""


class CertificateRefused(IdentityError):  # noqa: N818
    """The certificate or key does not fit its purpose."""


class CutOffFailed(IdentityError):  # noqa: N818
    """The broker cannot be notified of a revocation, or does not obey it."""


SECRET: Final = 0o600
PUBLIC: Final = 0o644
LARGEST_FILE: Final = 1 << 16  # of a key, certificate or request: they are a few kilobytes


def write_atomically(path: Path, content: bytes, *, mode: int) -> None:
    """Replace a file as `fleet_common.host.write_atomically` does; raise IdentityError."""
    try:
        host.write_atomically(path, content, mode=mode)
    except OSError as error:
        raise IdentityError(f"The file {path} cannot be written: {error.strerror}.") from error


def read_bounded(path: Path, what: str) -> bytes:
    """Return the content of a small file; raise IdentityError if it is too large or cannot be read.

    `what` names it in the error message: "The signing request".
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise IdentityError(
            f"{what} {path} cannot be read: {error.strerror}; check the path and who may read it."
        ) from error
    if len(content) > LARGEST_FILE:
        raise IdentityError(f"{what} {path} has more than {LARGEST_FILE} bytes: it is not the expected file.")
    return content


def make_folder(path: Path) -> None:
    """Create a folder for secrets, or use an existing one; raise IdentityError if others may write to it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        others_write = path.stat().st_mode & 0o022
    except OSError as error:
        raise IdentityError(f"The folder {path} cannot be made: {error.strerror}.") from error
    if others_write:
        raise IdentityError(f"Other users may write in the folder {path}: restrict it (chmod go-w) or choose another.")
