"""How an authority comes to be."""

from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path

from fleet_identity.authority import Authority, utc_now
from fleet_identity.certificates import authority_certificate
from fleet_identity.errors import AuthorityError
from fleet_identity.files import make_folder
from fleet_identity.folder import AuthorityFolder
from fleet_identity.index import Index
from fleet_identity.keys import Passphrase, new_key, save_key
from fleet_identity.naming import check_free
from fleet_identity.roles import IdentityRole, check_identity_name
from schemas.names import check_name

__all__ = ["found_authority"]


def found_authority(
    path: Path,
    *,
    fleet: str,
    actor: str,
    kept: Iterable[tuple[str, IdentityRole]] = (),
    passphrase: Passphrase = None,
    clock: Callable[[], datetime] = utc_now,
) -> Authority:
    """Make an authority and return it.

    Args:
        path: Its folder; made if it is not there.
        fleet: Whose.
        actor: Who acts, for the log.
        kept: Names to keep for their roles before anybody asks for them.
        passphrase: Encrypts its key.
        clock: Now, with its time zone.

    Raises:
        AuthorityError: There is one already.
        InvalidName: The fleet's or a kept name cannot be one.
        NameRefused: A kept name belongs to another role.
        IdentityError: A file cannot be written.
    """
    check_name(fleet)
    names = [(check_identity_name(name, role), role) for name, role in kept]
    make_folder(path)
    folder = AuthorityFolder(path)
    with folder.locked():
        if folder.certificate.exists():
            raise AuthorityError(f"There is an authority in {path} already: use it, or choose another folder.")
        key = new_key()
        save_key(folder.key, key, passphrase)
        with Index(folder.index, new=True) as index, index.change():
            for name, role in names:
                check_free(index, name, role)
                index.keep_name(name, role)
        # Last, since from here on there is an authority.
        folder.write_certificate(folder.certificate, authority_certificate(key, fleet=fleet, now=clock()))
    made = Authority.open(path, actor=actor, passphrase=lambda: passphrase, clock=clock)
    with made.at_work() as desk:
        made.audit.record("found", name=fleet, role="authority", serial=f"{made.certificate.serial_number:x}")
        desk.write_list()
    return made
