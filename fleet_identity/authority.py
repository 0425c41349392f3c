"""Certificate authority of a fleet: creates, signs, issues, renews, revokes, and remembers.

Every action that changes something holds the folder's lock from its first look to its last write, so that two commands
at once come one after the other. The index is written before a list or a certificate leaves: if the machine dies in
between, saying the command again completes it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fleet_identity.certificates import RENEWAL_DAYS, Revocation, Subject, authority_certificate
from fleet_identity.errors import AuthorityError, NameRefused
from fleet_identity.files import PUBLIC, make_folder, write_atomically
from fleet_identity.folder import AuthorityFolder
from fleet_identity.index import Entry, Index, check_free, check_key, current, renewable
from fleet_identity.keys import Passphrase, fingerprint, new_key, save_key
from fleet_identity.requests import check_request, make_request
from fleet_identity.roles import IdentityRole, check_identity_name
from fleet_identity.signer import Audit, Signer
from schemas.names import check_name

__all__ = ["Authority", "Issued", "create_authority", "issue", "utc_now"]


def utc_now() -> datetime:
    """Return the time."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """An authority that exists. `fleet_identity.authority` makes a new one.

    Attributes:
        folder: Its files.
        certificate: Its certificate.
        fleet: Whose authority it is.
        passphrase: Asked for when the key is needed and encrypted.
        audit: Its log.
        clock: Now, with its time zone.
    """

    folder: AuthorityFolder
    certificate: x509.Certificate
    fleet: str
    passphrase: Callable[[], Passphrase]
    audit: Audit
    clock: Callable[[], datetime]

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        actor: str,
        passphrase: Callable[[], Passphrase] = lambda: None,
        clock: Callable[[], datetime] = utc_now,
    ) -> Self:
        """Return the authority in a folder.

        Raises:
            AuthorityError: There is none, or it has run out.
            IdentityError: A file cannot be used.
        """
        folder = AuthorityFolder(path)
        own = folder.load_certificate()
        if not own.not_valid_before_utc <= clock() < own.not_valid_after_utc:
            raise AuthorityError(
                f"The authority in {path} is valid from {own.not_valid_before_utc:%Y-%m-%d} to "
                f"{own.not_valid_after_utc:%Y-%m-%d} and this machine's clock says {clock():%Y-%m-%d}: set the clock, "
                "or found a new authority."
            )
        organization = own.subject.get_attributes_for_oid(x509.NameOID.ORGANIZATION_NAME)
        if len(organization) != 1:
            raise AuthorityError(f"{folder.certificate} was not made by `fleet broker ca`: it does not name a fleet.")
        fleet = str(organization[0].value)
        audit = Audit(folder.audit, actor, clock)
        return cls(folder=folder, certificate=own, fleet=fleet, passphrase=passphrase, audit=audit, clock=clock)

    def sign(
        self, request: x509.CertificateSigningRequest, *, name: str, role: IdentityRole, hosts: Sequence[str] = ()
    ) -> Entry:
        """Sign a request for somebody new.

        Args:
            request: Unchecked.
            name: Whom the operator signs for.
            role: What for.
            hosts: For a broker, the host names and addresses that it is reached by.

        Raises:
            InvalidName: It cannot be a name.
            NameRefused: The name is another's, reserved, or has a certificate already; or a host is malformed.
            RequestRefused: The request must not be signed.
            AuthorityError: The authority's key cannot be used.
        """
        check_identity_name(name, role)
        public_key = check_request(request, name=name)
        with self.at_work() as signer:
            check_free(signer.index, name, role)
            check_key(signer.index, fingerprint(public_key), name)
            held = current(signer.index, name, now=self.clock())
            if held is not None:
                raise NameRefused(
                    f"{name!r} has a certificate until {held.not_after:%Y-%m-%d}: use `fleet broker renew`, or revoke "
                    "it first."
                )
            return signer.certify(Subject(self.fleet, role, name, tuple(hosts)), public_key, action="sign")

    def renew(self, name: str, *, request: x509.CertificateSigningRequest | None = None, early: bool = False) -> Entry:
        """Sign a new period for somebody known, whose old certificate stays valid until its own end.

        Args:
            name: Whom.
            request: With a new key; without one the key stays, and nothing but the new certificate has to travel.
            early: Whether also with more than 30 days left.

        Raises:
            NameRefused: Nobody has that name, it was revoked, or it is too early.
            RequestRefused: The request must not be signed.
            AuthorityError: The authority's key cannot be used.
        """
        asked = None if request is None else check_request(request, name=name)
        with self.at_work() as signer:
            latest = renewable(signer.index, name, now=self.clock(), early=early)
            kept = x509.load_pem_x509_certificate(latest.pem.encode()).public_key()
            assert isinstance(kept, ec.EllipticCurvePublicKey)  # we have signed no other
            if asked is not None:
                check_key(signer.index, fingerprint(asked), name)
            subject = Subject(self.fleet, latest.role, latest.name, latest.hosts)
            return signer.certify(subject, asked or kept, action="renew")

    def revoke(self, names: Sequence[str]) -> Revocation:
        """Revoke every certificate of these names, and write the list. Saying it again writes a newer list.

        Raises:
            NameRefused: Nobody has such a name, or none is given; then nobody is revoked.
            AuthorityError: The authority's key cannot be used.
        """
        if not names:
            raise NameRefused("Say whom to revoke: see `fleet broker list`.")
        with self.at_work() as signer:
            held = {name: signer.index.of_name(name) for name in names}
            for name, entries in held.items():
                if not entries:
                    raise NameRefused(f"Nobody has a certificate for {name[:80]!r}: see `fleet broker list`.")
            everything = [entry for entries in held.values() for entry in entries]
            with signer.index.change():
                for entry in everything:
                    if entry.revoked_at is None:
                        signer.index.revoke(entry.serial, self.clock())
                        self.audit.record("revoke", name=entry.name, role=entry.role, serial=entry.serial)
            clients = {name: entries[-1].role for name, entries in held.items() if not entries[-1].role.is_server}
            kickers = {
                name: signer.take_over(Subject(self.fleet, role, name), revoked=False) for name, role in clients.items()
            }
            canary = signer.take_over(Subject(self.fleet, IdentityRole.DEVICE, everything[0].name), revoked=True)
            return Revocation(
                serials=tuple(entry.serial for entry in everything),
                revocation_list=signer.write_list(),
                authority=self.certificate.public_bytes(serialization.Encoding.PEM),
                canary=canary,
                kickers=kickers,
            )

    def entries(self) -> tuple[Entry, ...]:
        """Return all certificates of identities, oldest first."""
        with Index(self.folder.index) as index:
            return index.identities()

    def names(self, role: IdentityRole) -> tuple[str, ...]:
        """Return all names that belong to a role: those that a broker's description may give its rights to."""
        with Index(self.folder.index) as index:
            return index.names(role)

    def due(self) -> tuple[str, ...]:
        """Return the names whose certificate ends within 30 days, or has ended."""
        last: dict[str, datetime] = {}
        for entry in self.entries():
            if entry.revoked_at is None:
                last[entry.name] = max(entry.not_after, last.get(entry.name, entry.not_after))
        return tuple(name for name, end in last.items() if end - self.clock() <= timedelta(days=RENEWAL_DAYS))

    @contextmanager
    def at_work(self) -> Iterator[Signer]:
        """Hold the lock and the key."""
        key = self.folder.load_key(self.certificate, self.passphrase)  # may ask a person, so before the lock
        with self.folder.locked(), Index(self.folder.index) as index:
            yield Signer(
                folder=self.folder,
                certificate=self.certificate,
                key=key,
                index=index,
                audit=self.audit,
                clock=self.clock,
            )


def create_authority(
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
    with made.at_work() as signer:
        made.audit.record("found", name=fleet, role="authority", serial=f"{made.certificate.serial_number:x}")
        signer.write_list()
    return made


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
