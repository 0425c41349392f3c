"""Repository of signed releases that gateways pull (The Update Framework); `fleet_device.updates` reads it.

Two keys: `root.key` has signed who may sign and can stay in a safe, `release.key` signs releases. Neither has to be on
a machine with a network: sign there, then copy the folder to any static HTTPS server, the metadata last.
"""

import hashlib
import io
import re
import secrets
import tarfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import IO, Final, TypeVar

from pydantic import ValidationError
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from fleet_common.host import write_atomically
from fleet_common.identity.certificates import Passphrase, load_key, new_key, save_key
from fleet_common.validation import plain_sentence
from fleet_device.drafters.model_file import name_of_file
from fleet_device.updates.repository import CHUNK_BYTES, Manifest
from schemas.errors import FleetError

ROOT_KEY: Final = "root.key"
RELEASE_KEY: Final = "release.key"
ROOT_YEARS: Final = 10
_YEAR: Final = timedelta(days=365)
_READABLE: Final = 0o644
_RELEASES: Final = "releases/"
_BUNDLE: Final = re.compile(r"dssd-fleet-(?P<version>[0-9][0-9A-Za-z.+]*)-device\.tar")

S = TypeVar("S", Root, Timestamp, Snapshot, Targets)


class ReleaseError(FleetError):
    """A release cannot be published."""


def create_repository(folder: Path, keys: Path, *, passphrase: Passphrase = None) -> Path:
    """Make the keys and an empty repository; return the root metadata, which every gateway gets."""
    root_file = folder / "metadata" / "1.root.json"
    if root_file.exists() or (keys / ROOT_KEY).exists():
        raise ReleaseError(f"There is a repository in {folder} or a key in {keys} already; name other folders.")
    for each in (folder / "metadata", folder / "targets", keys):
        each.mkdir(parents=True, exist_ok=True)
    signers = []
    for name in (ROOT_KEY, RELEASE_KEY):
        key = new_key()
        save_key(keys / name, key, passphrase)
        signers.append(CryptoSigner(key))
    root = Root(expires=_from_now(ROOT_YEARS * _YEAR), consistent_snapshot=True)
    root.add_key(signers[0].public_key, Root.type)
    for role in (Targets.type, Snapshot.type, Timestamp.type):
        root.add_key(signers[1].public_key, role)
    _write(folder, "1.root.json", Metadata(root), signers[0])
    return root_file


def publish(
    folder: Path,
    keys: Path,
    *,
    model: Path | None = None,
    bundles: Sequence[Path] = (),
    valid: timedelta,
    passphrase: Passphrase = None,
) -> int | None:
    """Add a release, and sign all metadata for another while; without content only the latter.

    `bundles` are those of `scripts/ansible-bundle device`, in the folders of their kind of machine. Return the number
    of the release.
    """
    signer = CryptoSigner(load_key(keys / RELEASE_KEY, passphrase))
    targets = _latest(folder, Targets.type, Targets()).signed
    number = None
    if model is not None or bundles:
        earlier = [path for path in targets.targets if path.startswith(_RELEASES)]
        number = max((int(PurePosixPath(path).stem) for path in earlier), default=0) + 1
        manifest = _manifest(folder, targets, number, model, bundles)
        path = f"{_RELEASES}{number}.json"
        targets.targets[path] = _store(folder, path, io.BytesIO(manifest.model_dump_json().encode()))[1]
    _sign(folder, signer, targets, valid)
    return number


def _manifest(folder: Path, targets: Targets, number: int, model: Path | None, bundles: Sequence[Path]) -> Manifest:
    """Store the files of a release, and describe it."""
    wheels: dict[str, list[str]] = {}
    versions = set()
    path = None
    try:
        if model is not None:
            with model.open("rb") as file:
                # A device names a model like `name_of_file`, also where its folder is named by a digest.
                name = name_of_file(model)
                path = _add(
                    folder, targets, "models", model.name if name == model.stem else f"{name}/{model.name}", file
                )
        for bundle in bundles:
            match = _BUNDLE.fullmatch(bundle.name)
            if match is None:
                raise ReleaseError(f"{bundle} is no bundle of a device; scripts/ansible-bundle device makes them.")
            versions.add(match["version"])
            with tarfile.open(bundle) as archive:
                found = [
                    (PurePosixPath(each.name).name, archive.extractfile(each)) for each in archive if each.isfile()
                ]
                wheels[bundle.resolve().parent.name] = [
                    _add(folder, targets, "wheels", name, file)
                    for name, file in found
                    if file and name.endswith(".whl")
                ]
    except (OSError, tarfile.TarError) as error:
        raise ReleaseError(f"The release cannot be made: {error}.") from error
    if len(versions) > 1:
        raise ReleaseError(f"The bundles have different versions: {', '.join(sorted(versions))}.")
    try:
        return Manifest(number=number, version=next(iter(versions), None), model=path, wheels=wheels)
    except ValidationError as error:
        raise ReleaseError(
            f"A file or its folder has a name that gateways do not accept: {plain_sentence(error.errors()[0])}."
        ) from error


def _sign(folder: Path, signer: CryptoSigner, targets: Targets, valid: timedelta) -> None:
    """Sign targets, snapshot and timestamp, in the order that lets a reader in between see the old ones."""
    snapshot = _latest(folder, Snapshot.type, Snapshot())
    timestamp = _latest(folder, Timestamp.type, Timestamp())
    for signed in (targets, snapshot.signed, timestamp.signed):
        signed.version += 1
        signed.expires = _from_now(valid)
    _write(folder, f"{targets.version}.targets.json", Metadata(targets), signer)
    snapshot.signed.meta["targets.json"] = MetaFile(targets.version)
    _write(folder, f"{snapshot.signed.version}.snapshot.json", snapshot, signer)
    timestamp.signed.snapshot_meta = MetaFile(snapshot.signed.version)
    _write(folder, "timestamp.json", timestamp, signer)


def _latest(folder: Path, role: str, first: S) -> Metadata[S]:
    """Return a role's newest metadata."""
    if not (folder / "metadata" / "1.root.json").is_file():
        raise ReleaseError(f"There is no repository in {folder}; make one with `fleet admin update create`.")
    files = {int(path.name.split(".")[0]): path for path in (folder / "metadata").glob(f"*.{role}.json")}
    path = files[max(files)] if files else folder / "metadata" / f"{role}.json"
    if not path.is_file():
        return Metadata(first)
    try:
        return Metadata[S].from_file(str(path))
    except RepositoryError as error:
        raise ReleaseError(f"The metadata {path} cannot be read: {error}; take it from a mirror.") from error


def _add(folder: Path, targets: Targets, kind: str, name: str, source: IO[bytes]) -> str:
    """Store a file under its digest, and return its path."""
    path, target = _store(folder, f"{kind}/{{}}/{name}", source)
    targets.targets[path] = target
    return path


def _store(folder: Path, path: str, source: IO[bytes]) -> tuple[str, TargetFile]:
    """Copy a file to its path, in which braces stand for its digest, and return path and target."""
    draft = folder / "targets" / f".{secrets.token_hex(8)}"
    whole, chunks, size = hashlib.sha256(), [], 0
    try:
        with draft.open("xb") as file:
            while chunk := source.read(CHUNK_BYTES):
                file.write(chunk)
                whole.update(chunk)
                chunks.append(hashlib.sha256(chunk).hexdigest())
                size += len(chunk)
        digest = whole.hexdigest()
        path = path.replace("{}", digest)
        place = folder / "targets" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        draft.chmod(_READABLE)
        draft.replace(place)
    finally:
        draft.unlink(missing_ok=True)
    return path, TargetFile(size, {"sha256": digest}, path, {"custom": {"chunks": chunks}})


def _write(folder: Path, name: str, metadata: Metadata[S], signer: CryptoSigner) -> None:
    metadata.sign(signer)
    write_atomically(folder / "metadata" / name, metadata.to_bytes(), mode=_READABLE)


def _from_now(span: timedelta) -> datetime:
    return (datetime.now(UTC) + span).replace(microsecond=0)
