"""Identities whose key is made at the operator's desk: for edges, monitors and brokers that he sets up himself."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from fleet_identity.authority import Authority
from fleet_identity.errors import NameRefused
from fleet_identity.files import PUBLIC, make_folder, write_atomically
from fleet_identity.index import Entry
from fleet_identity.keys import new_key, save_key
from fleet_identity.requests import make_request
from fleet_identity.roles import IdentityRole, check_identity_name

__all__ = ["Issued", "issue"]


@dataclass(frozen=True, slots=True)
class Issued:
    """What was made.

    Attributes:
        entry: The certificate, as the index has it.
        certificate: Its file.
        key: Its key's file, for its owner alone.
        ca: The authority's certificate, beside them.
    """

    entry: Entry
    certificate: Path
    key: Path
    ca: Path


def issue(authority: Authority, name: str, *, role: IdentityRole, folder: Path, hosts: Sequence[str] = ()) -> Issued:
    """Make a key and a certificate for it, as `NAME.key` and `NAME.pem`.

    Args:
        authority: Who signs.
        name: For whom.
        role: What for.
        folder: Where the files go.
        hosts: For a broker, the host names and addresses that it is reached by.

    Raises:
        IdentityError: As `Authority.sign`, or a file cannot be written; then there is no key either.
    """
    check_identity_name(name, role)
    make_folder(folder)
    issued_key, path = new_key(), folder / f"{name}.key"
    if path.exists():
        raise NameRefused(f"{path} exists: a key is never overwritten; move it away, or choose another folder.")
    save_key(path, issued_key)
    try:
        request = x509.load_pem_x509_csr(make_request(issued_key, name))
        entry = authority.sign(request, name=name, role=role, hosts=hosts)
    except BaseException:  # also of a person who gives up when asked for the passphrase
        path.unlink(missing_ok=True)
        raise
    certificate, ca = folder / f"{name}.pem", folder / "ca.pem"
    write_atomically(certificate, entry.pem.encode(), mode=PUBLIC)
    authority.folder.write_certificate(ca, authority.certificate)
    return Issued(entry, certificate, path, ca)
