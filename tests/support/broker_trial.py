"""Mosquitto on rendered files, with valid and invalid identities and their clients."""

import shutil
import socket
import ssl
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from broker_config.broker import Broker, BrokerFailed
from broker_config.mosquitto import ACCESS_FILE, CONF_FILE
from broker_config.processes import (
    HOST,
    IdentityFiles,
    ThrowAwayBroker,
    find_mosquitto,
    hand_over,
    unprivileged_user,
)
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
from tests.support.waiting import PATIENCE_S

ALERT_S: Final = 0.3  # TLS 1.3 lets a client finish before the broker has judged its certificate
NO_ANSWER: Final = "NO_ANSWER"


def refusal(host: str, port: int, tls: TlsSettings) -> str | None:
    """Connect as `somebody`; return the broker's reason to refuse, None if it accepts.

    The reason is that of TLS (it contains `CERTIFICATE_EXPIRED` and the like), or `NO_ANSWER`.
    """
    alert_s = ALERT_S
    while (reason := _refusal(host, port, tls, alert_s=alert_s)) == NO_ANSWER and alert_s < PATIENCE_S:
        alert_s *= 4.0  # on a busy machine the alert came too late
    return reason


def _refusal(host: str, port: int, tls: TlsSettings, *, alert_s: float) -> str | None:
    context = ssl.create_default_context(cafile=str(tls.ca))
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    with socket.create_connection((host, port), timeout=PATIENCE_S) as sock:
        try:
            with context.wrap_socket(sock, server_hostname=host) as stream:
                return _introduce(stream, alert_s)
        except ssl.SSLError as error:
            return error.reason or NO_ANSWER
        except ConnectionError:
            return NO_ANSWER


def _introduce(stream: ssl.SSLSocket, alert_s: float) -> str | None:
    # What is sent to a peer that has hung up makes the network forget the alert that says why.
    hear_out(stream, alert_s)
    stream.settimeout(PATIENCE_S)
    stream.sendall(connect_packet("somebody"))
    answer = stream.recv(4)
    return None if len(answer) == 4 and answer[0] == CONNACK and answer[3] == 0 else NO_ANSWER


INSPECTOR: Final = "trial-inspector"
"""User that a trial adds. It may do everything, so that every rule can be tried on every topic."""

RELOADED: Final = "Reloading config."
OPTIONS_WITH_ACCESS_FILE: Final = ("acl_file", "plugin_opt_acl_file")
MOVED: Final = {"cafile": "ca.pem", "certfile": "broker.pem", "keyfile": "broker.key", "crlfile": "crl.pem"}
# Replaced, or of no use in a trial.
LEFT_OUT: Final = frozenset({"user", "log_dest", "log_type", "persistence_location", "pid_file"})


@dataclass(frozen=True, slots=True)
class TrialFiles:
    """Content of a broker's files, and the certificates of a trial."""

    conf: str
    access: str
    certificates: Path | None = None  # folder with `ca.pem`, `broker.pem`, `broker.key` and `crl.pem`; None without TLS


class TrialBroker(ThrowAwayBroker):
    """Run mosquitto on rendered files, with other ports, folders and certificates.

    Only what belongs to the production machine changes: addresses, paths and the user. The ports
    in `broker` are not used.
    """

    def __init__(self, files: TrialFiles, broker: Broker) -> None:
        super().__init__(broker.model_copy(update={"port": 0}))
        self._files = files

    def set_access(self, text: str) -> None:
        """Replace the access rules, for connected clients too; raise BrokerFailed if the broker rejects them."""
        self._files = replace(self._files, access=text)
        self.reload()

    def reload(self) -> None:
        """Reload rules, certificates and revocations, and return when they are in force."""
        assert self._directory is not None
        before = self.log().count(RELOADED)
        self._write(self._directory)
        super().reload()
        # It reads them before any further packet of a client.
        if not self.await_log(RELOADED, count=before + 1):
            raise BrokerFailed("The broker does not reload its files; see its log.")

    def _prepare(self, directory: Path) -> list[str]:
        program = find_mosquitto()
        self._write(directory)
        return [str(program), "-c", str(directory / CONF_FILE)]

    def _write(self, directory: Path) -> None:
        user = unprivileged_user()
        lines = [*trial_lines(self._files, directory=directory, ports=(self.port, self.edge_port))]
        if user is not None:
            lines.append(f"user {user}")
        (directory / CONF_FILE).write_text("\n".join(lines) + "\n")
        access = directory / ACCESS_FILE
        access.write_text(f"{self._files.access}\nuser {INSPECTOR}\ntopic readwrite #\ntopic readwrite $SYS/#\n")
        access.chmod(0o640)
        if self._files.certificates is not None:
            # Copies: the user that root's mosquitto changes to may not be able to read the originals.
            for name in MOVED.values():
                shutil.copyfile(self._files.certificates / name, directory / name)
        hand_over(directory, user)


def trial_lines(files: TrialFiles, *, directory: Path, ports: Sequence[int]) -> Iterator[str]:
    """Yield the lines of the configuration as they are tried; `ports` are the listeners', in order."""
    left = iter(ports)
    for line in files.conf.splitlines():
        option, _, value = line.partition(" ")
        if option == "listener":
            yield f"listener {next(left)} {HOST}"
        elif option in OPTIONS_WITH_ACCESS_FILE:
            yield f"{option} {directory / ACCESS_FILE}"
        elif option in MOVED:
            yield f"{option} {directory / MOVED[option]}"
        elif option == "persistence":
            yield "persistence false"
        elif option not in LEFT_OUT or (option, value) == ("log_dest", "topic"):
            yield line
    yield "log_dest stderr"
    yield from (f"log_type {kind}" for kind in ("error", "warning", "notice", "information"))


DAY = timedelta(days=1)
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
