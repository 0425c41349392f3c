"""`fleet edge run`: the edge as a service."""

import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from fleet_edge.service import EdgeService
from fleet_edge.settings import EdgeSettings
from fleet_edge.store.engine import parse_url, shown
from fleet_edge.verifiers.contract import Verifier
from fleet_runtime.settings import load_settings
from fleet_runtime.systemd import Systemd

__all__ = ["run_command"]


def run_command(
    config: Annotated[Path | None, typer.Option(help="TOML file.", envvar="FLEET_EDGE_CONFIG")] = None,
    fleet: Annotated[str | None, typer.Option(help="Fleet's name.")] = None,
    edge: Annotated[str | None, typer.Option(help="This edge's name.")] = None,
    host: Annotated[str | None, typer.Option(help="Broker's host.")] = None,
    port: Annotated[int | None, typer.Option(help="Broker's port.")] = None,
    ca: Annotated[Path | None, typer.Option(help="Who vouches for the broker (PEM); turns TLS on.")] = None,
    certificate: Annotated[Path | None, typer.Option(help="This edge's own certificate (PEM).")] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    target: Annotated[str | None, typer.Option(help="Large model: folder, Hugging Face repo id or GGUF file.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    threads: Annotated[int | None, typer.Option(help="Torch threads; 0 leaves it to torch.")] = None,
    db: Annotated[str | None, typer.Option(help="SQLAlchemy URL of the session log.")] = None,
    spool: Annotated[Path | None, typer.Option(help="Folder for records while the database is away.")] = None,
    form: Annotated[str | None, typer.Option(help="Downlink form: auto, sparse, samples or dense.")] = None,
) -> None:
    """Verify the drafts of a fleet until told to stop. SIGTERM lets open sessions end first; SIGINT does not.

    A second SIGTERM ends it at once too. What is open then goes on at another edge, or here when this one is back.
    """
    settings = load_settings(
        EdgeSettings,
        config=config,
        flags={
            "fleet": fleet,
            "edge": edge,
            "broker": {"host": host, "port": port, "ca": ca, "certificate": certificate, "key": key},
            "target": target,
            "dtype": dtype,
            "threads": threads,
            "db": db,
            "spool": spool,
            "form": form,
        },
    )
    _say(f"Loading the target model {settings.target} …")
    service = EdgeService(settings, _load_verifier(settings))
    stop, drain = threading.Event(), threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    signal.signal(signal.SIGTERM, lambda *_: (stop if drain.is_set() else drain).set())
    service.start()
    info, unit = service.verifier.info, Systemd.from_environment()
    online = (
        f"Edge {settings.edge} of fleet {settings.fleet} is online at {settings.broker.host}:{settings.broker.port}"
    )
    database = shown(parse_url(settings.db))
    _say(f"{online}: target {info.name}, {info.vocabulary}, context {info.context}, sessions in {database}.")
    unit.ready(f"{online}.")
    try:
        service.run(stop, drain=drain, on_step=unit.alive, on_end=unit.stopping)
    finally:
        service.stop()


def _load_verifier(settings: EdgeSettings) -> Verifier:
    import torch

    from fleet_edge.verifiers.packed.target import load_target
    from fleet_edge.verifiers.packed.verifier import PackedVerifier

    if settings.threads:
        torch.set_num_threads(settings.threads)
    target = load_target(settings.target, dtype=settings.dtype, device=settings.torch_device)
    return PackedVerifier(target, budget_bytes=settings.kv_bytes)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
