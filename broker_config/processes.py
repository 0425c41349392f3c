"""Throw-away brokers on a loopback port: mosquitto and the embedded rumqttd.

`python -m broker_config.processes FILE` runs rumqttd. It cannot be shut down from within, so it has its own process,
which also ends when its standard input is closed: a parent that was killed leaves no broker behind.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from broker_config.broker import Broker, BrokerFailed, BrokerMissing, Tls
from broker_config.files import Profile, render_files, write_files
from broker_config.mosquitto import CONF_FILE, installed_version


def render_rumqttd(broker: Broker) -> str:
    """Return rumqttd.toml for a loopback broker, which has no access rules."""
    if broker.port == 0:
        raise ValueError("Choose the broker's port before its configuration is written.")
    return f"""\
# The broker of the fleet {broker.fleet}, for this machine alone. Generated.
id = 0

[router]
id = 0
max_connections = {broker.max_connections}
max_outgoing_packet_count = {broker.max_unanswered}
max_segment_size = {100 << 20}
max_segment_count = 10

[v5.1]
name = "fleet"
listen = "127.0.0.1:{broker.port}"
next_connection_delay_ms = 1

[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = {broker.max_packet_bytes}
max_inflight_count = {broker.max_unanswered}
dynamic_filters = true
"""


def run_rumqttd() -> None:
    """Run rumqttd with the configuration file named by the first argument, until the parent ends."""
    try:
        from iotcore.iotcore import IotCoreBroker  # noqa: PLC0415 - optional
    except ImportError:
        sys.exit("The embedded broker is not installed: install the extra 'demo' of this package, or mosquitto.")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    IotCoreBroker(config_path=sys.argv[1]).run_forever()


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


HOST: Final = "127.0.0.1"
READY_S = 60.0
STOP_S = 5.0
POLL_S = 0.02
LOG_TAIL = 2000
SYSTEM_PATHS = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")  # not in every PATH


def find_mosquitto() -> Path:
    """Return mosquitto's program; raise BrokerMissing if it is not installed."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *SYSTEM_PATHS])
    found = shutil.which("mosquitto", path=path)
    if found is None:
        raise BrokerMissing(
            "mosquitto is not installed: install the package 'mosquitto' (on Debian and Ubuntu: "
            "sudo apt install mosquitto)."
        )
    return Path(found)


class ThrowAwayBroker(ABC):
    """Run a broker in a child process; use it as a context manager, or call `start` and `stop`.

    It has its own process group, so that Ctrl-C does not reach it before its clients have said goodbye. With port 0,
    free ports are chosen at the first start and kept until `close`, whether it runs or not.
    """

    def __init__(self, broker: Broker | None = None) -> None:
        self._broker = broker if broker is not None else Broker()
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: Path | None = None
        self._ports_kept = contextlib.ExitStack()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def broker(self) -> Broker:
        return self._broker

    @property
    def host(self) -> str:
        return HOST

    @property
    def port(self) -> int:
        """Port; 0 before the first start."""
        return self._broker.port

    @property
    def edge_port(self) -> int:
        return self._broker.edge_port or self._broker.port

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Process id; 0 if it is not running."""
        return self._process.pid if self._process is not None and self.running else 0

    def start(self) -> None:
        """Start, and return when connections are accepted; does nothing if it runs.

        Raise BrokerMissing if the program is not installed, BrokerFailed with the end of its log if it does not start.
        """
        if self.running:
            return
        self.stop()  # one that has ended leaves a pipe
        if self._broker.port == 0:
            port, edge_port = (self._ports_kept.enter_context(reserved_port()) for _ in range(2))
            self._broker = self._broker.model_copy(
                update={"port": port, "edge_port": edge_port if self._broker.edge_port else 0}
            )
        else:
            for port in self._ports():
                if _accepts(port):
                    raise BrokerFailed(f"Port {port} is in use: stop what listens there, or choose another.")
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="fleet-broker-"))
        command = self._prepare(self._directory)
        with self._log_file(self._directory).open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._await_ready(self._process)

    def stop(self) -> None:
        """Terminate, or kill after a timeout. Idempotent; `start` may follow."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def reload(self) -> None:
        """Reload rules and revocations. Returns at once; the old ones may still be used once."""
        if self._process is not None:
            self._process.send_signal(signal.SIGHUP)

    def restart(self) -> None:
        """Stop and start on the same port; retained messages are lost."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Stop and remove the files. Idempotent."""
        self.stop()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
        self._ports_kept.close()

    def log(self) -> str:
        """Return the log since the first start."""
        if self._directory is None:
            return ""
        return self._log_file(self._directory).read_text(errors="replace")

    def await_log(self, words: str, *, count: int = 1, patience_s: float = READY_S) -> bool:
        """Wait until the log contains `words` at least `count` times; return whether it does."""
        deadline = time.monotonic() + patience_s
        while self.log().count(words) < count:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S / 4)
        return True

    @abstractmethod
    def _prepare(self, directory: Path) -> list[str]:
        """Write the configuration and return the command."""

    def _await_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                break
            if all(map(_accepts, self._ports())):
                return
            time.sleep(POLL_S)
        tail = self.log()[-LOG_TAIL:].strip()
        self.stop()
        raise BrokerFailed(f"The broker does not start on port {self.port}; its log ends with: {tail or '(nothing)'}")

    def _ports(self) -> set[int]:
        return {self.port, self.edge_port}

    @staticmethod
    def _log_file(directory: Path) -> Path:
        return directory / "broker.log"


class MosquittoProcess(ThrowAwayBroker):
    """A throw-away mosquitto with the fleet's access rules, on loopback and without certificates."""

    def _prepare(self, directory: Path) -> list[str]:
        program = find_mosquitto()
        # Root's mosquitto changes to that user, who must be able to read the rules at a reload.
        broker = self._broker.model_copy(update={"user": unprivileged_user()})
        files = render_files(broker, Profile.LOOPBACK, home=directory, version=installed_version(program))
        write_files(files, directory)
        hand_over(directory, broker.user)
        return [str(program), "-c", str(directory / CONF_FILE)]


class EmbeddedBroker(ThrowAwayBroker):
    """A throw-away rumqttd from the `iotcore` wheel: needs no system package, has no access rules."""

    def _prepare(self, directory: Path) -> list[str]:
        configuration = directory / "rumqttd.toml"
        configuration.write_text(render_rumqttd(self._broker))
        return [sys.executable, "-m", "broker_config.processes", str(configuration)]


def hand_over(directory: Path, user: str | None) -> None:
    """Change the owner of a folder and its content; do nothing if `user` is None."""
    if user is not None:
        group = pwd.getpwnam(user).pw_gid  # mosquitto warns about files of another group
        for path in (directory, *directory.rglob("*")):
            shutil.chown(path, user, group)


def unprivileged_user() -> str | None:
    """Return the user that root's mosquitto changes to; None if we are not root."""
    if os.geteuid() != 0:
        return None
    for name in ("mosquitto", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return "root"


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a free port of loopback on which a server that is told its number can listen.

    Linux gives it to nobody else meanwhile: the socket that is bound to it does not listen, and both allow the address
    to be used again. Other systems would refuse the server too, so there it is only free on entry.
    """
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((HOST, 0))
        port = int(sock.getsockname()[1])
        if sys.platform != "linux":
            sock.close()
        yield port


def _accepts(port: int) -> bool:
    try:
        with socket.create_connection((HOST, port), timeout=1.0):
            return True
    except OSError:
        return False


IDENTITIES: Final = "identities"


@dataclass(frozen=True, slots=True)
class IdentityFiles:
    ca: Path
    certificate: Path
    key: Path


def identity_files(directory: Path, tls: Tls, name: str) -> IdentityFiles:
    folder = directory / IDENTITIES
    return IdentityFiles(directory / tls.ca, folder / f"{name}.pem", folder / f"{name}.key")


if __name__ == "__main__":
    run_rumqttd()
