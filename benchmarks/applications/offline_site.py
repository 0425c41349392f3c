"""Site of the suite `offline`: broker, relay, edge process, and a device with its local API in this process."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from benchmarks.processes import BenchError
from broker_config.broker import Broker
from broker_config.processes import MosquittoProcess
from dssd.distribution import Dist
from fleet_common.logs import Event, read_events
from fleet_device.api.app import listen
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.gateway import Gateway
from fleet_device.service import DeviceService
from fleet_device.settings import DeviceSettings
from schemas.policy import SamplingPolicy
from tests.support.relay import Relay
from tests.support.scripted_language import draft_language

FLEET: Final = "offline"
DEVICE: Final = "device-1"

AFTER_S: Final = 1.0
"""`offline_s` of the device."""

ANSWER_S: Final = 2.5
"""`answer_s` of the device."""

WAYS: Final = ("killed", "stopped", "cut", "dead")
"""How the edge goes away: its process dies, or hangs; the device's line is refused, or takes and brings nothing."""

_TOKEN_S: Final = 0.004
_PATIENCE_S: Final = 60.0


class PacedDrafter(ScriptedDrafter):
    """A draft model that takes its time for a token, as a real one does."""

    def next(self, policy: SamplingPolicy) -> Dist:
        time.sleep(_TOKEN_S)
        return super().next(policy)


class Site:
    """The site; use it as a context manager.

    Args:
        folder: For the session log, the spool and what the device keeps.
    """

    def __init__(self, folder: Path) -> None:
        self.database = folder / "log.sqlite3"
        self._folder = folder
        self._stack = ExitStack()
        self._edge: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        try:
            self._broker = self._stack.enter_context(MosquittoProcess(Broker(fleet=FLEET)))
            self._relay = self._stack.enter_context(Relay(self._broker.port))
            self._stack.callback(self._end_edge)
            self._start_edge()
            script = draft_language()
            settings = DeviceSettings.model_validate(
                {
                    "fleet": FLEET,
                    "device": DEVICE,
                    "broker": {"port": self._relay.port},
                    "mode": "coupled",
                    "draft_length": 4,
                    "context": 4096,
                    "offline_s": AFTER_S,
                    "answer_s": ANSWER_S,
                    "offline_log": str(self._folder / "unverified.db"),
                    "api_port": 0,
                }
            )
            self._gateway = Gateway(DeviceService(settings, PacedDrafter(script, script.words)))
            self._gateway.serve(listen(0))
            self._gateway.start()
            self._stack.callback(self._gateway.stop)
            self.wait_until_there()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def address(self) -> str:
        assert self._gateway.address is not None
        return self._gateway.address

    def pull(self, way: str) -> None:
        assert self._edge is not None
        match way:
            case "killed":
                self._edge.kill()
                self._edge.communicate()
            case "stopped":
                self._edge.send_signal(signal.SIGSTOP)
            case "cut":
                self._relay.isolate()
            case "dead":
                self._relay.stall()

    def put_back(self, way: str) -> None:
        assert self._edge is not None
        match way:
            case "killed":
                self._start_edge()
            case "stopped":
                self._edge.send_signal(signal.SIGCONT)
            case "cut":
                self._relay.reunite()
            case "dead":
                self._relay.release()

    def wait_until_there(self) -> None:
        """Wait until the device can write again."""
        _until(lambda: self._gateway.absence() is None, "The device does not find its edge again.")

    def wait_until_told(self) -> None:
        """Wait until the edge has confirmed every text that was written without it."""
        self.wait_until_there()
        _until(lambda: self._gateway.unreported == 0, "The device does not get rid of its reports.")
        time.sleep(1.0)  # what the edge has answered is in the log; what is repeated may still come

    def _start_edge(self) -> None:
        config = self._folder / "edge.toml"
        config.write_text(
            f'fleet = "{FLEET}"\nedge = "edge-1"\ndb = "sqlite:///{self.database}"\n'
            f'spool = "{self._folder}/spool"\nlease_s = 30.0\n[broker]\nport = {self._broker.port}\n',
            encoding="utf-8",
        )
        command = [sys.executable, "-m", "tests.support.scripted_edge_process", str(config)]
        self._edge = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._edge.stdout is not None
        for event in read_events(self._edge.stdout):
            if event["event"] == Event.ONLINE:
                return
        raise BenchError("The edge did not start; its complaint is above.")

    def _end_edge(self) -> None:
        if self._edge is not None:
            self._edge.send_signal(signal.SIGCONT)
            self._edge.terminate()
            self._edge.communicate(timeout=_PATIENCE_S)


def _until(true: Callable[[], bool], otherwise: str) -> None:
    until = time.monotonic() + _PATIENCE_S
    while not true():
        if time.monotonic() > until:
            raise BenchError(otherwise)
        time.sleep(0.02)
