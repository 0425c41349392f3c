"""Trial: a broker on rendered files, with valid and invalid identities and their clients."""

import socket
import ssl
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from broker_config.broker import Broker
from broker_config.processes import INSPECTOR, IdentityFiles, TrialBroker, TrialFiles
from fleet_common.identity.certificates import (
    SKEW,
    IdentityRole,
    Revoked,
    Subject,
    authority_certificate,
    certificate,
    new_key,
    revocation_list,
    save_key,
)
from fleet_common.identity.enforcement import CONNACK, connect_packet, hear_out
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings, TlsSettings

TIMEOUT_S: Final = 5.0
ALERT_S: Final = 0.3  # TLS 1.3 lets a client finish before the broker has judged its certificate
OURS: Final = ("NO_PROTOCOLS_AVAILABLE", "NO_CIPHERS_AVAILABLE")
NO_ANSWER: Final = "NO_ANSWER"


def refusal(host: str, port: int, tls: TlsSettings) -> str | None:
    """Connect as `somebody`; return the broker's reason to refuse, None if it accepts.

    The reason is that of TLS (it contains `CERTIFICATE_EXPIRED` and the like), or `NO_ANSWER`.
    """
    context = ssl.create_default_context(cafile=str(tls.ca))
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    with socket.create_connection((host, port), timeout=TIMEOUT_S) as sock:
        try:
            with context.wrap_socket(sock, server_hostname=host) as stream:
                return _introduce(stream)
        except ssl.SSLError as error:
            return error.reason or NO_ANSWER
        except ConnectionError:
            return NO_ANSWER


def refuses_old_tls(host: str, port: int) -> bool | None:
    """Whether a listener refuses TLS 1.1 and older; None if this machine's library cannot offer them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent: what counts is how far it gets
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that it is deprecated is why we ask
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection((host, port), timeout=TIMEOUT_S) as sock:
        try:
            with context.wrap_socket(sock, server_hostname=host):
                return False
        except ssl.SSLError as error:
            return None if error.reason in OURS else True
        except ConnectionError:
            return True


def _introduce(stream: ssl.SSLSocket) -> str | None:
    # What is sent to a peer that has hung up makes the network forget the alert that says why.
    hear_out(stream, ALERT_S)
    stream.settimeout(TIMEOUT_S)
    stream.sendall(connect_packet("somebody"))
    answer = stream.recv(4)
    return None if len(answer) == 4 and answer[0] == CONNACK and answer[3] == 0 else NO_ANSWER  # noqa: PLR2004


DAY = timedelta(days=1)
HOST = "127.0.0.1"
_FLEET = "trial"


@dataclass(slots=True)
class TrialAuthority:
    """An authority in its own folder that signs any name, also those that the fleet's authority refuses."""

    folder: Path
    now: datetime  # UTC
    _key: ec.EllipticCurvePrivateKey = field(init=False, default_factory=new_key)
    _certificate: x509.Certificate = field(init=False)
    _revoked: list[Revoked] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._certificate = authority_certificate(self._key, fleet=_FLEET, now=self.now)
        (self.folder / "ca.pem").write_bytes(self._certificate.public_bytes(Encoding.PEM))
        self._write_crl()

    def broker(self) -> IdentityFiles:
        return self._issue(Subject(_FLEET, IdentityRole.BROKER, "localhost", ("localhost", HOST)), "broker")

    def client(self, name: str, *, file: str | None = None, begins: timedelta = -SKEW) -> IdentityFiles:
        return self._issue(Subject(_FLEET, IdentityRole.DEVICE, name), file or name, begins=begins)

    def revoke(self, files: IdentityFiles) -> None:
        """Revoke a certificate; a running broker reads the list at a reload."""
        serial = x509.load_pem_x509_certificate(files.certificate.read_bytes()).serial_number
        self._revoked.append(Revoked(serial, self.now - SKEW))
        self._write_crl()

    def _issue(self, subject: Subject, file: str, *, begins: timedelta = -SKEW) -> IdentityFiles:
        key, now = new_key(), self.now + begins + SKEW
        signer: dict[str, Any] = {"issuer": self._certificate, "issuer_key": self._key}
        made = certificate(subject, key.public_key(), **signer, now=now, lifetime=DAY - SKEW)
        files = IdentityFiles(self.folder / "ca.pem", self.folder / f"{file}.pem", self.folder / f"{file}.key")
        files.certificate.write_bytes(made.public_bytes(Encoding.PEM))
        save_key(files.key, key)
        return files

    def _write_crl(self) -> None:
        listed = revocation_list(
            self._revoked,
            number=len(self._revoked),
            issuer=self._certificate,
            issuer_key=self._key,
            this_update=self.now - SKEW,
        )
        (self.folder / "crl.pem").write_bytes(listed.public_bytes(Encoding.PEM))


PATIENCE_S: Final = 10.0


@dataclass(slots=True)
class BrokerTrial:
    broker: TrialBroker
    authority: TrialAuthority | None  # None without TLS
    folder: Path  # for certificates
    stack: ExitStack  # closed at the end of the trial
    _numbers: int = 0

    def connect(self, name: str, *, client_id: str | None = None, packet_bytes: int = 1 << 20) -> PahoLink:
        """Return a link with a certificate for `name`, or with that user name without TLS."""
        files = None if self.authority is None else self.identity(name)
        settings = LinkSettings(
            client_id=client_id or name,
            username=name if files is None else None,
            host=self.broker.host,
            port=self.broker.broker.port_of(name),
            tls=_tls(files),
            packet_bytes=packet_bytes,
            min_backoff_s=0.05,
            max_backoff_s=0.1,
        )
        link = PahoLink(settings)
        link.start(timeout_s=PATIENCE_S)
        self.stack.callback(link.stop)
        return link

    def identity(self, name: str, *, begins: timedelta = -SKEW) -> IdentityFiles:
        assert self.authority is not None
        self._numbers += 1
        return self.authority.client(name, file=f"identity-{self._numbers}", begins=begins)

    def refusal(self, files: IdentityFiles | None) -> str | None:
        """Return why the broker refuses a client with these files, or with none; None if a listener accepts it."""
        assert self.authority is not None
        tls = _tls(files) or TlsSettings(self.authority.folder / "ca.pem")
        reasons = [refusal(self.broker.host, port, tls) for port in self.ports]
        return None if None in reasons else reasons[0]

    @property
    def ports(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((self.broker.port, self.broker.edge_port)))

    def bad_identities(self) -> dict[str, IdentityFiles | None]:
        """Return identities that no broker may accept, by their fault; the broker has read the revocation."""
        assert self.authority is not None
        stranger = TrialAuthority(self.folder / "stranger", datetime.now(UTC)).client("device-a")
        revoked = self.identity("device-a")
        self.authority.revoke(revoked)
        self.broker.reload()
        return {
            "of an unknown authority": IdentityFiles(
                self.authority.folder / "ca.pem", stranger.certificate, stranger.key
            ),
            "expired": self.identity("device-a", begins=-2 * DAY),
            "not valid yet": self.identity("device-a", begins=DAY),
            "revoked": revoked,
            "that is missing": None,
        }


def _tls(files: IdentityFiles | None) -> TlsSettings | None:
    return None if files is None else TlsSettings(files.ca, files.certificate, files.key)


@contextmanager
def begin_trial(conf: str, access: str, broker: Broker, folder: Path) -> Iterator[BrokerTrial]:
    """Start a broker on rendered files; `folder` gets the certificates."""
    authority = None
    if broker.tls is not None:
        authority = TrialAuthority(folder / "authority", datetime.now(UTC))
        authority.broker()
    files = TrialFiles(conf, access, authority.folder if authority else None)
    with ExitStack() as stack:
        running = stack.enter_context(TrialBroker(files, broker))
        yield BrokerTrial(running, authority, folder, stack)


def connect_all(trial: BrokerTrial, names: Iterable[str]) -> dict[str, PahoLink]:
    """Connect users and the inspector, under client ids that differ from their names."""
    return {name: trial.connect(name, client_id=f"claim-{number}") for number, name in enumerate([*names, INSPECTOR])}
