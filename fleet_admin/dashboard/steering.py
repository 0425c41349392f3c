"""Steering at the dashboard: connected to the broker in the background, and again whenever that fails."""

import logging
import threading
from collections.abc import Callable
from typing import Final

from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.settings import DashboardSettings
from fleet_admin.steering import DeviceSettingsView, Steering, SteeringLog
from fleet_admin.steering.planning import views_of_log
from schemas.errors import FleetError

_AGAIN_S: Final = 15.0

_log = logging.getLogger(__name__)


class DashboardSteering:
    """What the dashboard steers devices with. May be used by several threads.

    Args:
        settings: With `steer`, the broker is connected to once this is started.
        make: Makes what speaks to devices, not started.

    Attributes:
        log: Labels, commands and the audit log, which need no broker.
    """

    def __init__(
        self,
        settings: DashboardSettings,
        *,
        make: Callable[[DashboardSettings], Steering] = lambda settings: Steering.open(settings, settings.db),
    ) -> None:
        self.log = SteeringLog(settings.db)
        self._settings = settings
        self._make = make
        self._steering: Steering | None = None
        self._why = (
            "The dashboard is not connected to the broker; it connects when it first can."
            if settings.steer
            else "This dashboard gives devices no settings and commands: it is started without --steer."
        )
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def absence(self) -> str:
        """Why devices cannot be reached now; empty if they can."""
        steering = self._steering
        if steering is None:
            return self._why
        return "" if steering.connected else "The broker does not answer now."

    def reach(self) -> Steering:
        """Return what reaches devices.

        Raises:
            Problem: They cannot be reached now.
        """
        if self._steering is None:
            raise Problem(503 if self._settings.steer else 409, self._why)
        return self._steering

    def settings_of(self, device: str) -> DeviceSettingsView | None:
        """Return a device's settings, wanted and reported: as the broker has them, or as the log last heard."""
        steering = self._steering
        if steering is not None and steering.connected:
            found = steering.wanted_and_reported([device])
        else:
            found = views_of_log(self.log.known(), self.log.wanted(), self.log.reported(), devices=[device])
        return found[0] if found else None

    def start(self) -> None:
        if self._settings.steer:
            self._thread = threading.Thread(target=self._connect, name="steering-connect", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._steering is not None:
            self._steering.stop()
        self.log.close()

    def _connect(self) -> None:
        while not self._ended.is_set():
            steering = self._make(self._settings)
            try:
                steering.start(records=True)
            except FleetError as error:
                if self._why != str(error):
                    _log.warning("Devices cannot be steered: %s", error)
                self._why = str(error)
                self._ended.wait(_AGAIN_S)
                continue
            self._steering = steering
            return
