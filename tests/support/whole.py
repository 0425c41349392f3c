"""The whole system in one process: an edge on a thread, and devices, usually through a real mosquitto.

`parts` are further arguments of both services, such as another link and clock.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleet_device.drafters.contract import Drafter
from fleet_device.service import DeviceService
from fleet_device.settings import DeviceSettings
from fleet_edge.service import EdgeService
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import SequenceTable, Verifier
from tests.support.log_records import rows_of

FLEET = "home"


@dataclass(slots=True)
class Whole:
    port: int
    folder: Path
    verifier: Verifier | None = None
    options: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)

    @property
    def db(self) -> str:
        return f"sqlite:///{self.folder / 'fleet.sqlite3'}"

    @contextmanager
    def edge(self) -> Iterator[EdgeService]:
        """Run the edge; afterwards its log is complete."""
        assert self.verifier is not None
        fields = {"fleet": FLEET, "edge": "edge-1", "broker": {"port": self.port}, "db": self.db}
        settings = EdgeSettings.model_validate({**fields, "spool": self.folder / "spool", **self.options})
        service = EdgeService(settings, self.verifier, **self.parts)
        service.start()
        stop = threading.Event()
        thread = threading.Thread(target=service.run, args=(stop,), name="edge")
        thread.start()
        try:
            yield service
        finally:
            stop.set()
            thread.join()
            service.stop()
            # An edge leaves retained prefixes behind, and the next one numbers its own from the same start.
            for sequence in [*getattr(self.verifier, "_table", SequenceTable(context=0, vocabulary=0)).lengths]:
                self.verifier.close(sequence)

    @contextmanager
    def device(self, drafter: Drafter, name: str = "device-1", **options: Any) -> Iterator[DeviceService]:
        """Run a device. The drafter stays open."""
        fields = {"fleet": FLEET, "device": name, "broker": {"port": self.port}}
        settings = DeviceSettings.model_validate({**fields, **options})
        service = DeviceService(settings, _Kept(drafter), **self.parts)
        service.start()
        try:
            yield service
        finally:
            service.stop()

    def rows(self, query: str) -> list[dict[str, Any]]:
        return rows_of(self.db, query)


class _Kept:
    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drafter, name)

    def close(self) -> None:
        """Stay open."""
