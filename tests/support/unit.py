"""systemd's notification socket for a process under test."""

import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.waiting import PATIENCE_S


class Unit:
    def __init__(self, path: Path, *, watchdog_us: int = 100_000) -> None:
        self.environment: Mapping[str, str] = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": str(watchdog_us)}
        self.heard: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._listen, name="unit", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
            own.sendto(b"", self.environment["NOTIFY_SOCKET"])
        self._thread.join(PATIENCE_S)
        self._socket.close()

    @property
    def stopping(self) -> bool:
        return "STOPPING=1" in self.heard

    def heartbeats_since_stopping(self) -> int:
        return self.heard[self.heard.index("STOPPING=1") :].count("WATCHDOG=1")

    def _listen(self) -> None:
        while message := self._socket.recv(4096):
            self.heard.append(message.decode())
