"""Throw-away broker on rendered files: the same words, with other ports, folders and certificates.

What is tried is the text that will run in production, so everything stays as it is written but for what belongs to the
production machine: where it listens, where its files lie, who it becomes, and whom it reports to.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from broker_config.broker import Broker
from broker_config.errors import BrokerFailed
from broker_config.processes.runner import HOST, ThrowAwayBroker, find_mosquitto, hand_over, unprivileged_user
from broker_config.rendering.mosquitto_conf import ACCESS_FILE, CONF_FILE

INSPECTOR: Final = "trial-inspector"
"""A user that a trial adds: it may do everything, so that every rule can be tried on every topic."""

RELOADED: Final = "Reloading config."
OPTIONS_WITH_ACCESS_FILE: Final = ("acl_file", "plugin_opt_acl_file")
MOVED: Final = {"cafile": "ca.pem", "certfile": "broker.pem", "keyfile": "broker.key", "crlfile": "crl.pem"}
# Said anew, or of no use for an hour's broker.
LEFT_OUT: Final = frozenset({"user", "log_dest", "log_type", "persistence_location", "pid_file"})


@dataclass(frozen=True, slots=True)
class TrialFiles:
    """Files of a broker, and the certificates to try them with.

    Attributes:
        conf: Text of mosquitto.conf.
        access: Text of the ACL file.
        certificates: A folder with `ca.pem`, `broker.pem`, `broker.key` and `crl.pem`; None for a broker without TLS.
    """

    conf: str
    access: str
    certificates: Path | None = None


class TrialBroker(ThrowAwayBroker):
    """Runs mosquitto on rendered files.

    Args:
        files: What to try.
        broker: Their description; its ports are not used.
    """

    def __init__(self, files: TrialFiles, broker: Broker) -> None:
        super().__init__(broker.model_copy(update={"port": 0}))
        self._files = files

    def set_access(self, text: str) -> None:
        """Put other access rules in force, for the clients that are connected too.

        Raises:
            BrokerFailed: The broker does not take them.
        """
        self._files = replace(self._files, access=text)
        self.reload()

    def reload(self) -> None:
        """Have it read rules, certificates and revocations anew, and return when it will.

        Raises:
            BrokerFailed: It does not.
        """
        assert self._directory is not None
        before = self.log().count(RELOADED)
        self._write(self._directory)
        super().reload()
        # It reads them before it reads anything else of a client.
        if not self.await_log(RELOADED, count=before + 1):
            raise BrokerFailed("The broker does not reload its files.")

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
        access.write_text(_inspected(self._files.access))
        access.chmod(0o640)
        if self._files.certificates is not None:
            # Copies: root's mosquitto becomes a user who need not be able to read the originals.
            for name in MOVED.values():
                shutil.copyfile(self._files.certificates / name, directory / name)
        hand_over(directory, user)


def trial_lines(files: TrialFiles, *, directory: Path, ports: Sequence[int]) -> Iterator[str]:
    """Yield the lines of the configuration as they are tried.

    Args:
        files: The files.
        directory: Where the trial keeps its own.
        ports: Where its listeners are, in their order.
    """
    left = iter(ports)
    for line in files.conf.splitlines():
        option, _, _value = line.partition(" ")
        if option == "connection":
            break  # a bridge, to the end of the file: a trial reports to nobody
        if option == "listener":
            yield f"listener {next(left)} {HOST}"
        elif option in OPTIONS_WITH_ACCESS_FILE:
            yield f"{option} {directory / ACCESS_FILE}"
        elif option in MOVED:
            yield f"{option} {directory / MOVED[option]}"
        elif option == "persistence":
            yield "persistence false"
        elif option not in LEFT_OUT:
            yield line
    yield "log_dest stderr"
    yield from (f"log_type {kind}" for kind in ("error", "warning", "notice", "information"))


def _inspected(access: str) -> str:
    return f"{access}\nuser {INSPECTOR}\ntopic readwrite #\ntopic readwrite $SYS/#\n"
