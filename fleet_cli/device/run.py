"""`fleet device run`: the device as a service."""

import signal
import sys

from fleet_cli.events_flag import with_events
from fleet_cli.settings_flags import with_settings
from fleet_device.drafters.registry import load_drafter
from fleet_device.gateway import Asked, Gateway
from fleet_device.preflight import preflight
from fleet_device.service import DeviceService
from fleet_device.settings import DeviceSettings
from fleet_runtime.events import Event, EventStream
from fleet_runtime.repetition import hold_back_repetition
from fleet_runtime.systemd import Systemd

__all__ = ["run_command"]


@with_events(outlives_reader=True)
@with_settings(DeviceSettings)
def run_command(settings: DeviceSettings, *, events: EventStream) -> None:
    """Serve the applications on this device until told to stop.

    SIGTERM lets the open text end first; SIGINT does not, nor does a second SIGTERM.
    """
    hold_back_repetition()
    preflight(settings, serves=True)
    events.write(Event.LOADING, model=settings.model)
    service = DeviceService(settings, load_drafter(settings))
    broker = settings.broker

    def tell_connection(up: bool) -> None:
        if up:
            events.write(Event.ONLINE, host=broker.host, port=broker.port)
        else:
            events.write(Event.OFFLINE)

    service.on_connection(tell_connection)
    gateway = Gateway(service)
    signal.signal(signal.SIGINT, lambda *_: gateway.ask(Asked.STOP))
    signal.signal(signal.SIGTERM, lambda *_: gateway.ask(Asked.DRAIN))
    unit = Systemd.from_environment()
    try:
        gateway.start()
        served = gateway.address or "no API"
        events.write(
            Event.SERVING,
            fleet=settings.fleet,
            device=settings.device,
            model=service.drafter.name,
            api=gateway.address,
        )
        if not events:
            print(
                f"Device {settings.device} of fleet {settings.fleet}, draft model {service.drafter.name}, "
                f"broker {broker.host}:{broker.port}: {served}.",
                file=sys.stderr,
                flush=True,
            )
        unit.ready(f"Device {settings.device} of fleet {settings.fleet}: {served}.")
        unit.watch(gateway.health)
        gateway.run(on_end=unit.stopping, on_drain=lambda texts: events.write(Event.DRAINING, texts=texts))
    finally:
        gateway.stop()
        unit.close()
    events.write(Event.STOPPED)
