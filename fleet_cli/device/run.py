"""`fleet device run`: the device as a service."""

import signal
import sys

from fleet_cli.settings_flags import with_settings
from fleet_device.drafters.registry import load_drafter
from fleet_device.gateway import Asked, Gateway
from fleet_device.preflight import preflight
from fleet_device.service import DeviceService
from fleet_device.settings import DeviceSettings
from fleet_runtime.systemd import Systemd

__all__ = ["run_command"]


@with_settings(DeviceSettings)
def run_command(settings: DeviceSettings) -> None:
    """Serve the applications on this device until told to stop.

    SIGTERM lets the open text end first; SIGINT does not, nor does a second SIGTERM.
    """
    preflight(settings, serves=True)
    service = DeviceService(settings, load_drafter(settings))
    gateway = Gateway(service)
    signal.signal(signal.SIGINT, lambda *_: gateway.ask(Asked.STOP))
    signal.signal(signal.SIGTERM, lambda *_: gateway.ask(Asked.DRAIN))
    unit = Systemd.from_environment()
    try:
        gateway.start()
        broker, served = settings.broker, gateway.address or "no API"
        print(
            f"Device {settings.device} of fleet {settings.fleet}, draft model {service.drafter.name}, "
            f"broker {broker.host}:{broker.port}: {served}.",
            file=sys.stderr,
            flush=True,
        )
        unit.ready(f"Device {settings.device} of fleet {settings.fleet}: {served}.")
        unit.watch(gateway.health)
        gateway.run(on_end=unit.stopping)
    finally:
        gateway.stop()
        unit.close()
