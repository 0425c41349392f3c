"""Trial session: rendered files, a broker on them, certificates for it, and links of everyone with a good one."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from broker_config.broker import Broker
from broker_config.processes import INSPECTOR, IdentityFiles, TrialBroker, TrialFiles
from fleet_cli.broker.handshake import refusal
from fleet_cli.broker.trial_identities import TrialAuthority
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings, TlsSettings

PATIENCE_S: Final = 10.0
DAY: Final = timedelta(days=1)


@dataclass(slots=True)
class Trial:
    """A trial under way.

    Attributes:
        broker: Runs the files.
        authority: Signs whatever is asked of it; None without TLS.
        folder: For certificates.
        stack: Ends what was begun, at the end of the trial.
    """

    broker: TrialBroker
    authority: TrialAuthority | None
    folder: Path
    stack: ExitStack
    _numbers: int = 0

    def connect(self, name: str, *, client_id: str | None = None, packet_bytes: int = 1 << 20) -> PahoLink:
        """Return a link that is connected as `name`.

        Args:
            name: In its certificate, or its user name without TLS.
            client_id: What it claims to be.
            packet_bytes: Largest packet on its own side.

        Raises:
            ConnectFailed: It is not let in.
        """
        files = None if self.authority is None else self.identity(name)
        username = name if files is None else None
        port = self.broker.broker.port_of(name)
        link = PahoLink(self._settings(username, _tls(files), client_id or name, port=port, packet_bytes=packet_bytes))
        link.start(timeout_s=PATIENCE_S)
        self.stack.callback(link.stop)
        return link

    def identity(self, name: str, *, begins: timedelta = timedelta(hours=-1)) -> IdentityFiles:
        """Return new files for any name at all; valid for a day.

        Args:
            name: The common name.
            begins: When they become valid, from now.
        """
        assert self.authority is not None
        self._numbers += 1
        return self.authority.client(name, file=f"identity-{self._numbers}", begins=begins)

    def refusal(self, files: IdentityFiles | None) -> str | None:
        """Return why the broker refuses a client that shows these files, or none; None if a listener lets it in."""
        assert self.authority is not None
        tls = _tls(files) or TlsSettings(self.authority.folder / "ca.pem")
        reasons = [refusal(self.broker.host, port, tls) for port in self.ports]
        return None if None in reasons else reasons[0]

    @property
    def ports(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((self.broker.port, self.broker.edge_port)))

    def bad_identities(self) -> dict[str, IdentityFiles | None]:
        """Return what no broker may accept, by what is wrong with it. It has read the revocation on return."""
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

    def _settings(
        self, username: str | None, tls: TlsSettings | None, client_id: str, *, port: int, packet_bytes: int
    ) -> LinkSettings:
        return LinkSettings(
            client_id=client_id,
            username=username,
            host=self.broker.host,
            port=port,
            tls=tls,
            packet_bytes=packet_bytes,
            min_backoff_s=0.05,
            max_backoff_s=0.1,
        )


def _tls(files: IdentityFiles | None) -> TlsSettings | None:
    return None if files is None else TlsSettings(files.ca, files.certificate, files.key)


@contextmanager
def begin_trial(conf: str, access: str, broker: Broker, folder: Path) -> Iterator[Trial]:
    """Start a broker on rendered files; afterwards everything is gone but the folder.

    Args:
        conf: Text of mosquitto.conf.
        access: Text of the ACL file.
        broker: Their description.
        folder: For certificates; empty.

    Raises:
        BrokerMissing: mosquitto is not installed.
        BrokerFailed: It does not start on these files.
    """
    authority = None
    if broker.tls is not None:
        authority = TrialAuthority(folder / "authority", datetime.now(UTC))
        authority.broker()
    files = TrialFiles(conf, access, authority.folder if authority else None)
    with ExitStack() as stack:
        running = stack.enter_context(TrialBroker(files, broker))
        yield Trial(running, authority, folder, stack)


def connect_all(trial: Trial, names: Iterable[str]) -> tuple[dict[str, PahoLink], PahoLink]:
    """Connect users and the inspector, under client ids that are not their names: the certificate decides.

    Raises:
        ConnectFailed: One is not let in.
    """
    links = {name: trial.connect(name, client_id=f"claim-{number}") for number, name in enumerate([*names, INSPECTOR])}
    inspector = links.pop(INSPECTOR)
    return links, inspector
