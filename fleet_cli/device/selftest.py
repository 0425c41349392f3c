"""`fleet device selftest`: what a rollout gates on."""

import json
from typing import Annotated

import typer

from fleet_cli.checks import ignore_check, show_check
from fleet_cli.device.options import (
    ApiPort,
    Authority,
    Certificate,
    Config,
    Device,
    DrafterKind,
    Fleet,
    Host,
    Key,
    Model,
    ModelsDir,
    Port,
    Threads,
    read_settings,
)
from fleet_device.selftest import SelfTest

__all__ = ["selftest_command"]

UNFIT = 1


def selftest_command(
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
    threads: Threads = None,
    api_port: ApiPort = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
) -> None:
    """Check configuration, model, broker, edge and a real text, one after the other.

    Exit code 0 if all is well, 1 if a check failed, 2 if the configuration cannot be read. Not while the device
    runs as a service.
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
        threads=threads,
        api_port=api_port,
    )
    report = SelfTest(settings, on_check=ignore_check if as_json else show_check).run()
    if as_json:
        print(json.dumps(report.json(), ensure_ascii=False, indent=2))
    if not report.ok:
        raise typer.Exit(UNFIT)
