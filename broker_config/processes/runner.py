"""Throw-away brokers: started on a free loopback port for a demo or a test, gone afterwards."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from broker_config.broker import Broker
from broker_config.errors import BrokerFailed, BrokerMissing
from broker_config.files import Profile, render_files, write_files
from broker_config.processes.rumqttd import render_rumqttd
from broker_config.rendering.mosquitto_conf import CONF_FILE
from broker_config.rendering.version import installed_version

HOST: Final = "127.0.0.1"
READY_S = 10.0
STOP_S = 5.0
POLL_S = 0.02
LOG_TAIL = 2000
SYSTEM_PATHS = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")  # not on every user's PATH


def find_mosquitto() -> Path:
    """Return mosquitto's program.

    Raises:
        BrokerMissing: It is not installed.
    """
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *SYSTEM_PATHS])
    found = shutil.which("mosquitto", path=path)
    if found is None:
        raise BrokerMissing(
            "mosquitto is not installed: install the package 'mosquitto' (on Debian and Ubuntu: "
            "sudo apt install mosquitto)."
        )
    return Path(found)


class ThrowAwayBroker(ABC):
    """A broker in a child process. Use it as a context manager, or call `start` and `stop`.

    It is in its own process group, so that Ctrl-C in a terminal reaches whoever started it and not the broker
    itself, which has to outlive the clients' goodbyes.

    Args:
        broker: What to run; with port 0 free ones are chosen at the first start and kept.
    """

    def __init__(self, broker: Broker | None = None) -> None:
        self._broker = broker if broker is not None else Broker()
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: Path | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def broker(self) -> Broker:
        """What runs, with the port that was chosen."""
        return self._broker

    @property
    def host(self) -> str:
        return HOST

    @property
    def port(self) -> int:
        """Where it listens; 0 before the first start."""
        return self._broker.port

    @property
    def edge_port(self) -> int:
        """Where it listens for edges and monitors: a port of their own, if it has one."""
        return self._broker.edge_port or self._broker.port

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process's number, 0 if it is not running."""
        return self._process.pid if self._process is not None and self.running else 0

    def start(self) -> None:
        """Start, and return when connections are accepted. Nothing happens if it already runs.

        Raises:
            BrokerMissing: The program is not installed.
            BrokerFailed: It ends at once, or accepts no connection in time; the sentence has the end of its log.
        """
        if self.running:
            return
        self.stop()  # one that ended by itself leaves a pipe
        if self._broker.port == 0:
            port, edge_port = _free_ports(2)
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
            self._process = self._spawn(command, log)
        self._await_ready(self._process)

    def stop(self) -> None:
        """Ask it to end, and see to it. Idempotent; `start` may follow."""
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
        """End it without a word, as a power failure would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def reload(self) -> None:
        """Have it read its rules and its revocations anew. Returns at once; what was read before may still act once."""
        if self._process is not None:
            self._process.send_signal(signal.SIGHUP)

    def restart(self) -> None:
        """Stop and start on the same port; what it retained is forgotten."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Stop and remove its files. Idempotent."""
        self.stop()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def log(self) -> str:
        """Return what it has written since it was first started."""
        if self._directory is None:
            return ""
        return self._log_file(self._directory).read_text(errors="replace")

    def await_log(self, words: str, *, count: int = 1, patience_s: float = READY_S) -> bool:
        """Wait until its log has `words` at least `count` times; return whether it came to that."""
        deadline = time.monotonic() + patience_s
        while self.log().count(words) < count:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S / 4)
        return True

    @abstractmethod
    def _prepare(self, directory: Path) -> list[str]:
        """Write the configuration and return the command."""

    def _spawn(self, command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

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
        # Root's mosquitto becomes that user, who must be able to read the rules again at a reload.
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
        return [sys.executable, "-m", "broker_config.processes.rumqttd", str(configuration)]


def hand_over(directory: Path, user: str | None) -> None:
    """Give a folder and what lies in it to the user that mosquitto becomes; nothing happens for None."""
    if user is not None:
        group = pwd.getpwnam(user).pw_gid  # mosquitto warns of a file that is another group's
        for path in (directory, *directory.rglob("*")):
            shutil.chown(path, user, group)


def unprivileged_user() -> str | None:
    """Return whom root's mosquitto becomes by itself; None if we are not root."""
    if os.geteuid() != 0:
        return None
    for name in ("mosquitto", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return "root"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [int(probe.getsockname()[1]) for probe in probes]


def _accepts(port: int) -> bool:
    try:
        with socket.create_connection((HOST, port), timeout=1.0):
            return True
    except OSError:
        return False
