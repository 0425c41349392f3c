"""`fleet device run`: the device as a service."""

import logging
import signal
import sys

from fleet_cli.events_flag import with_events
from fleet_cli.settings_flags import with_settings
from fleet_common.host import Systemd
from fleet_common.logs import Event, EventStream, hold_back_repetition, write_log_as
from fleet_device.device import preflight
from fleet_device.drafters.contract import Drafter
from fleet_device.drafters.model_file import load_drafter
from fleet_device.gateway import Asked, Gateway
from fleet_device.service import DeviceService
from fleet_device.settings import DeviceSettings
from fleet_device.steering.commands import LogTail
from fleet_device.steering.remote_settings import SteeredSettings, apply_log_level, load_steered

_log = logging.getLogger(__name__)


@with_events(outlives_reader=True)
@with_settings(DeviceSettings)
def run_command(settings: DeviceSettings, *, events: EventStream) -> None:
    """Serve the applications on this device until told to stop.

    SIGTERM lets the open text end first; SIGINT does not, nor does a second SIGTERM.
    """
    write_log_as(settings.log_format, fleet=settings.fleet, device=settings.device)
    hold_back_repetition()
    tail, usual = LogTail(), logging.getLogger().level
    logging.getLogger().addHandler(tail)
    unit, watched = Systemd.from_environment(), list[Gateway]()
    unit.watch(lambda: [each.health() for each in watched])
    try:
        while _run_once(settings, tail, usual, unit=unit, watched=watched, events=events):
            events.write(Event.STOPPED)
    finally:
        unit.close()
        logging.getLogger().removeHandler(tail)
    events.write(Event.STOPPED)


def _run_once(
    own: DeviceSettings, tail: LogTail, usual: int, *, unit: Systemd, watched: list[Gateway], events: EventStream
) -> bool:
    """Serve until the end; return whether the device is to begin anew, as its administrator has asked from afar."""
    remote = SteeredSettings.of(own)

    def load(settings: DeviceSettings) -> Drafter:
        preflight(settings, serves=True)
        events.write(Event.LOADING, model=settings.model)
        return load_drafter(settings)

    drafter = load_steered(remote, load)
    settings = remote.settings
    apply_log_level(settings, usual)
    remote.on_change(lambda _changed: apply_log_level(settings, usual))
    service = DeviceService(settings, drafter)
    broker = settings.broker

    def tell_connection(up: bool) -> None:
        if up:
            events.write(Event.ONLINE, host=broker.host, port=broker.port)
        else:
            events.write(Event.OFFLINE)

    service.on_connection(tell_connection)
    gateway = Gateway(service, remote=remote, log_tail=tail)
    signal.signal(signal.SIGINT, lambda *_: gateway.ask(Asked.STOP))
    signal.signal(signal.SIGTERM, lambda *_: gateway.ask(Asked.DRAIN))
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
        sentence = (
            f"Device {settings.device} of fleet {settings.fleet}, draft model {service.drafter.name}, "
            f"broker {broker.host}:{broker.port}: {served}."
        )
        if settings.log_format == "json":
            _log.info(sentence)
        elif not events:
            print(sentence, file=sys.stderr, flush=True)
        unit.ready(f"Device {settings.device} of fleet {settings.fleet}: {served}.")
        watched[:] = [gateway]
        gateway.run(
            on_end=lambda: _tell_end(gateway, unit), on_drain=lambda texts: events.write(Event.DRAINING, texts=texts)
        )
    finally:
        gateway.stop()
        # Until there is another one to ask, a signal ends the process, as before the first.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return gateway.reloads


def _tell_end(gateway: Gateway, unit: Systemd) -> None:
    if not gateway.reloads:
        unit.stopping()
