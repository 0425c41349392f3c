"""`fleet device run`: the device as a service."""

import signal
import sys

from fleet_cli.device.options import (
    Ahead,
    ApiPort,
    Authority,
    Certificate,
    Config,
    Device,
    DrafterKind,
    DraftLength,
    Fleet,
    Host,
    Key,
    Model,
    ModelsDir,
    Port,
    Threads,
    read_settings,
)
from fleet_device.gateway import Asked, Gateway
from fleet_device.loading import load_drafter
from fleet_device.service import DeviceService
from fleet_link.systemd import Systemd

__all__ = ["run_command"]


def run_command(
    *,
    config: Config = None,
    fleet: Fleet = None,
    device: Device = None,
    host: Host = None,
    port: Port = None,
    ca: Authority = None,
    certificate: Certificate = None,
    key: Key = None,
    model: Model = None,
    models_dir: ModelsDir = None,
    drafter: DrafterKind = None,
    draft_length: DraftLength = None,
    ahead: Ahead = None,
    threads: Threads = None,
    api_port: ApiPort = None,
) -> None:
    """Serve the applications on this device until told to stop.

    SIGTERM lets the open text end first; SIGINT does not, nor does a second SIGTERM.
    """
    settings = read_settings(
        config,
        fleet=fleet,
        device=device,
        host=host,
        port=port,
        ca=ca,
        certificate=certificate,
        key=key,
        model=model,
        models_dir=models_dir,
        drafter=drafter,
        draft_length=draft_length,
        ahead=ahead,
        threads=threads,
        api_port=api_port,
    )
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
