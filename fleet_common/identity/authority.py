"""Certificate authority of a fleet: create, sign, issue, renew, suspend and revoke certificates.

Every change holds the folder's lock from the first read to the last write, so concurrent commands run one after the
other. The index is written before a certificate or revocation list leaves the folder: after a crash, repeating the
command completes it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fleet_common import host
from fleet_common.identity.certificates import (
    RENEWAL_DAYS,
    SKEW,
    TAKEOVER_LIFETIME,
    AccessAction,
    AccessChange,
    Credential,
    IdentityRole,
    Passphrase,
    Revoked,
    Subject,
    authority_certificate,
    certificate,
    check_identity_name,
    check_request,
    fingerprint,
    is_encrypted,
    load_certificate,
    load_key,
    make_request,
    new_key,
    revocation_list,
    same_key,
    save_key,
)
from fleet_common.identity.files import (
    PUBLIC,
    AuthorityError,
    NameRefused,
    make_folder,
    write_atomically,
)
from fleet_common.identity.index import (
    CertificateIndex,
    CertificateRecord,
    check_free,
    check_key,
    check_not_suspended,
    current,
    renewable,
)
from schemas.names import check_name

LOCK_S: Final = 30.0
"""Wait for another command on the same folder."""


class AuthorityFolder:
    """Files of an authority.

    `broker` has settings that say how to reach the broker on a revocation; `issued` is the default folder for issued
    certificates.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.certificate, self.key = path / "ca.pem", path / "ca.key"
        self.revocation_list = path / "crl.pem"
        self.index = path / "index.sqlite3"
        self.broker, self.issued = path / "broker.json", path / "issued"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock; raise AuthorityError if another command holds it for too long."""
        with ExitStack() as stack:
            try:
                stack.enter_context(host.locked(self.path, timeout_s=LOCK_S))
            except TimeoutError:
                raise AuthorityError(f"Another command is using {self.path}: try again when it has ended.") from None
            except OSError as error:
                raise AuthorityError(f"The folder {self.path} cannot be opened: {error.strerror}.") from error
            yield

    def load_certificate(self) -> x509.Certificate:
        """Return the authority's certificate; raise AuthorityError if the folder holds none."""
        if not self.certificate.exists():
            raise AuthorityError(
                f"There is no authority in {self.path}: make one with `fleet broker ca`, or correct --ca."
            )
        return load_certificate(self.certificate, "The authority's certificate")

    def load_key(
        self, certificate: x509.Certificate, passphrase: Callable[[], Passphrase]
    ) -> ec.EllipticCurvePrivateKey:
        """Return the authority's private key; `passphrase` is called only if the key is encrypted."""
        if not self.key.exists():
            raise AuthorityError(
                f"The authority's key {self.key} is missing: restore it from your copy; without it nothing can "
                "be signed or revoked."
            )
        if self.key.stat().st_mode & 0o077:
            raise AuthorityError(
                f"Others may read the authority's key {self.key}: make it yours alone (chmod 600), and think of who "
                "has had it."
            )
        key = load_key(self.key, passphrase() if is_encrypted(self.key) else None)
        if not same_key(key.public_key(), certificate.public_key()):
            raise AuthorityError(f"The key {self.key} does not belong to {self.certificate}: restore the matching two.")
        return key

    def write_certificate(self, path: Path, certificate: x509.Certificate) -> None:
        write_atomically(path, certificate.public_bytes(serialization.Encoding.PEM), mode=PUBLIC)


CLOCKS_APART: Final = timedelta(days=1)  # a revoked certificate stays listed this long after its end


@dataclass(frozen=True, slots=True, kw_only=True)
class Signer:
    """Sign certificates and record them in the index."""

    folder: AuthorityFolder
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    index: CertificateIndex
    actor: str
    clock: Callable[[], datetime]

    def certify(self, subject: Subject, public_key: ec.EllipticCurvePublicKey, *, action: str) -> CertificateRecord:
        signed = certificate(subject, public_key, issuer=self.certificate, issuer_key=self.key, now=self.clock())
        record = self._record(signed, subject, action)
        with self.index.change():
            self.index.keep_name(subject.name, subject.role)
            self.index.put(record)
        return record

    def take_over(self, subject: Subject, *, revoked: bool) -> Credential:
        """Return a short-lived credential that can connect under another client's name and end its session.

        `revoked` says whether the next revocation list already contains it.
        """
        key = new_key()
        signed = certificate(
            subject,
            key.public_key(),
            issuer=self.certificate,
            issuer_key=self.key,
            now=self.clock(),
            lifetime=TAKEOVER_LIFETIME,
        )
        record = self._record(signed, subject, "take over")
        with self.index.change():
            self.index.put(self.changed(record, AccessAction.REVOKE) if revoked else record)
        return Credential(subject.name, signed.public_bytes(serialization.Encoding.PEM), key)

    def write_list(self) -> bytes:
        now = self.clock()
        with self.index.change():
            # Backdated by an hour: a broker whose clock is slow rejects a later list, and then refuses every client.
            number, this_update = self.index.next_list(now - SKEW)
            revoked = [
                Revoked(int(entry.serial, 16), entry.revoked_at or entry.suspended_at or now, held=entry.suspended)
                for entry in self.index.refused(ending_after=now - CLOCKS_APART)
            ]
        made = revocation_list(
            revoked, number=number, issuer=self.certificate, issuer_key=self.key, this_update=this_update
        )
        content = made.public_bytes(serialization.Encoding.PEM)
        write_atomically(self.folder.revocation_list, content, mode=PUBLIC)
        return content

    def changed(self, record: CertificateRecord, action: AccessAction) -> CertificateRecord:
        """Return a record after an action."""
        match action:
            case AccessAction.REVOKE if record.revoked_at is None:
                update = {"revoked_at": self.clock(), "revoked_by": self.actor}
            case AccessAction.SUSPEND if record.suspended_at is None:
                update = {"suspended_at": self.clock(), "suspended_by": self.actor}
            case AccessAction.UNSUSPEND:
                update = {"suspended_at": None, "suspended_by": ""}
            case _:
                update = {}
        return record.model_copy(update=update)

    def _record(self, signed: x509.Certificate, subject: Subject, action: str) -> CertificateRecord:
        return CertificateRecord(
            serial=f"{signed.serial_number:x}",
            name=subject.name,
            role=subject.role,
            hosts=subject.hosts,
            key_sha256=fingerprint(signed.public_key()),
            not_before=signed.not_valid_before_utc,
            not_after=signed.not_valid_after_utc,
            pem=signed.public_bytes(serialization.Encoding.PEM).decode(),
            action=action,
            by=self.actor,
        )


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """An existing authority; `create_authority` makes a new one."""

    folder: AuthorityFolder
    certificate: x509.Certificate
    fleet: str
    passphrase: Callable[[], Passphrase]
    actor: str
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
        """Open the authority in a folder; raise AuthorityError if there is none or its certificate has expired."""
        folder = AuthorityFolder(path)
        own = folder.load_certificate()
        if not own.not_valid_before_utc <= clock() < own.not_valid_after_utc:
            raise AuthorityError(
                f"The authority in {path} is valid from {own.not_valid_before_utc:%Y-%m-%d} to "
                f"{own.not_valid_after_utc:%Y-%m-%d} and this machine's clock says {clock():%Y-%m-%d}: set the clock, "
                "or create a new authority."
            )
        organization = own.subject.get_attributes_for_oid(x509.NameOID.ORGANIZATION_NAME)
        if len(organization) != 1:
            raise AuthorityError(f"{folder.certificate} was not made by `fleet broker ca`: it does not name a fleet.")
        fleet = str(organization[0].value)
        return cls(folder=folder, certificate=own, fleet=fleet, passphrase=passphrase, actor=actor, clock=clock)

    def sign(
        self, request: x509.CertificateSigningRequest, *, name: str, role: IdentityRole, hosts: Sequence[str] = ()
    ) -> CertificateRecord:
        """Sign the unchecked request of a new identity; `hosts` are a broker's names and addresses.

        Raise InvalidName or NameRefused for the name, SigningRefused for the request.
        """
        check_identity_name(name, role)
        public_key = check_request(request, name=name)
        with self.at_work() as signer:
            check_free(signer.index, name, role)
            check_key(signer.index, fingerprint(public_key), name)
            check_not_suspended(signer.index, name)
            held = current(signer.index, name, now=self.clock())
            if held is not None:
                raise NameRefused(
                    f"{name!r} has a certificate until {held.not_after:%Y-%m-%d}: use `fleet broker renew`, or revoke "
                    "it first."
                )
            return signer.certify(Subject(self.fleet, role, name, tuple(hosts)), public_key, action="sign")

    def renew(
        self, name: str, *, request: x509.CertificateSigningRequest | None = None, early: bool = False
    ) -> CertificateRecord:
        """Sign a new certificate for a known identity; the old one stays valid until its own end.

        Without a request the key stays, and only a certificate has to travel. `early` renews although more than 30 days
        are left. Raise NameRefused for the name, SigningRefused for the request.
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

    def revoke(self, names: Sequence[str]) -> AccessChange:
        return self.change_access(AccessAction.REVOKE, names)

    def change_access(self, action: AccessAction, names: Sequence[str]) -> AccessChange:
        """Apply an action to every certificate of these names, and write the list. Repeating it writes a newer list.

        Raise NameRefused, and change nothing, if a name is unknown, cannot be acted on like that, or none is given.
        """
        if not names:
            raise NameRefused(f"Name the identities to {action}: see `fleet broker list`.")
        with self.at_work() as signer:
            held = {name: signer.index.of_name(name) for name in names}
            for name, entries in held.items():
                _check_action(action, name, entries)
            everything = [entry for entries in held.values() for entry in entries]
            with signer.index.change():
                for entry in everything:
                    signer.index.put(signer.changed(entry, action))
            roles = {name: entries[-1].role for name, entries in held.items()}
            kickers = {
                name: signer.take_over(Subject(self.fleet, role, name), revoked=False)
                for name, role in roles.items()
                if action is not AccessAction.UNSUSPEND and not role.is_server
            }
            lists = action is not AccessAction.DISCONNECT
            canary = Subject(self.fleet, IdentityRole.DEVICE, everything[0].name)
            return AccessChange(
                serials=tuple(entry.serial for entry in everything),
                canary=signer.take_over(canary, revoked=True) if lists else None,
                revocation_list=signer.write_list() if lists else None,
                authority=self.certificate.public_bytes(serialization.Encoding.PEM),
                kickers=kickers,
            )

    def entries(self) -> tuple[CertificateRecord, ...]:
        with CertificateIndex(self.folder.index) as index:
            return index.identities()

    def due(self) -> tuple[str, ...]:
        """Return the names whose certificate ends within 30 days or has ended."""
        last: dict[str, datetime] = {}
        for entry in self.entries():
            if entry.revoked_at is None and not entry.suspended:
                last[entry.name] = max(entry.not_after, last.get(entry.name, entry.not_after))
        return tuple(name for name, end in last.items() if end - self.clock() <= timedelta(days=RENEWAL_DAYS))

    @contextmanager
    def at_work(self) -> Iterator[Signer]:
        key = self.folder.load_key(self.certificate, self.passphrase)  # may ask a person, so before the lock
        with self.folder.locked(), CertificateIndex(self.folder.index) as index:
            yield Signer(
                folder=self.folder,
                certificate=self.certificate,
                key=key,
                index=index,
                actor=self.actor,
                clock=self.clock,
            )


def _check_action(action: AccessAction, name: str, entries: Sequence[CertificateRecord]) -> None:
    if not entries:
        raise NameRefused(f"There is no certificate for {name[:80]!r}: see `fleet broker list`.")
    if action is AccessAction.SUSPEND and all(entry.revoked_at is not None for entry in entries):
        raise NameRefused(f"{name!r} was revoked: it is refused for good, and needs no suspension.")
    if action is AccessAction.UNSUSPEND and not any(entry.suspended for entry in entries):
        raise NameRefused(f"{name!r} is not suspended: see `fleet broker list`.")
    if action is AccessAction.DISCONNECT and entries[-1].role.is_server:
        raise NameRefused(f"{name!r} is a broker: only its clients can be disconnected.")


def create_authority(
    path: Path,
    *,
    fleet: str,
    actor: str,
    kept: Iterable[tuple[str, IdentityRole]] = (),
    passphrase: Passphrase = None,
    clock: Callable[[], datetime] = utc_now,
) -> Authority:
    """Create an authority, with names to reserve for their roles; `passphrase` encrypts the private key.

    Raise AuthorityError if the folder holds one already, InvalidName or NameRefused for a name that cannot be reserved.
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
        with CertificateIndex(folder.index, new=True) as index, index.change():
            for name, role in names:
                check_free(index, name, role)
                index.keep_name(name, role)
        # Written last: once the certificate exists, the authority exists.
        folder.write_certificate(folder.certificate, authority_certificate(key, fleet=fleet, now=clock()))
    made = Authority.open(path, actor=actor, passphrase=lambda: passphrase, clock=clock)
    with made.at_work() as signer:
        signer.write_list()
    return made


@dataclass(frozen=True, slots=True)
class Issued:
    """An issued certificate and its files; `ca` is a copy of the authority's certificate in the same folder."""

    entry: CertificateRecord
    certificate: Path
    key: Path
    ca: Path


def issue(authority: Authority, name: str, *, role: IdentityRole, folder: Path, hosts: Sequence[str] = ()) -> Issued:
    """Create a key and a certificate as `NAME.key` and `NAME.pem`; leave no key behind on an error."""
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
