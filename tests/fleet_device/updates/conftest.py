import os
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fleet_admin.releases import create_repository, publish
from fleet_common.identity.authority import Authority
from fleet_common.mqtt.settings import TlsSettings
from fleet_device.updates import repository
from fleet_device.updates.handoff import TESTED, WANTED, TrialResult, UpdateFolder, UpdateState, WantedUpdate
from fleet_device.updates.layout import UpdatePaths
from fleet_device.updates.repository import Repository
from fleet_device.updates.updater import Updater
from tests.support.static_server import StaticServer, static_server
from tests.support.tls_fleet import enrol, of_server

FIRST = "0.1.0-0123abcd"
TRIAL_S = 60.0
LONG = timedelta(days=30)


@dataclass
class Site:
    """A repository with its server, and the identity of a device."""

    folder: Path
    keys: Path
    server: StaticServer
    tls: TlsSettings

    @property
    def repository(self) -> Path:
        return self.server.folder

    def publish(
        self,
        *,
        model: bytes | None = None,
        name: str = "draft.gguf",
        valid: timedelta = LONG,
        bundles: list[Path] | None = None,
    ) -> int:
        file = None
        if model is not None:
            file = self.folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(model)
        number = publish(self.repository, self.keys, model=file, bundles=bundles or [], valid=valid)
        return number or 0

    @property
    def root(self) -> bytes:
        return (self.repository / "metadata" / "1.root.json").read_bytes()

    def client(self, folder: Path, clock: Callable[[], float] = lambda: 0.0) -> Repository:
        """Return a client for which no time passes, however busy this machine is."""
        return Repository(self.server.url, self.root, folder / "metadata", self.tls, clock=clock)


@dataclass
class Gateway:
    """A gateway with a running release, whose service is `serve`: it is called when the updater waits.

    `crashes` are restarts of the service as systemd counts them: since a command restarted it. `tick_s` passes with
    each look at the clock.
    """

    site: Site
    folder: Path
    serve: Callable[["Gateway"], None] = lambda _gateway: None
    hour: int = 12
    slept_s: float = 0.0
    tick_s: float = 0.0
    crashes: int | None = 99

    def __post_init__(self) -> None:
        release = self.folder / "programs" / "releases" / FIRST
        for each in (
            release,
            self.folder / "programs" / "venvs" / "0.1.0",
            self.folder / "models",
            self.shared / "inbox",
        ):
            each.mkdir(parents=True)
        (release / "venv").symlink_to(self.folder / "programs" / "venvs" / "0.1.0")
        (release / "device.toml").write_text(
            'fleet = "home"\nmodel = "/old.gguf"\n\n[broker]\nhost = "broker"\nport = 8883\n'
        )
        (self.folder / "programs" / "current").symlink_to(f"releases/{FIRST}")
        (self.folder / "programs" / "updater").symlink_to(f"releases/{FIRST}")

    @property
    def shared(self) -> Path:
        return self.folder / "updates"

    @property
    def layout(self) -> UpdatePaths:
        return UpdatePaths(self.folder / "programs", self.folder / "models")

    @property
    def exchange(self) -> UpdateFolder:
        return UpdateFolder(self.shared)

    @property
    def running(self) -> str:
        return self.layout.running

    def configured_model(self) -> str:
        """Return the setting `model` of the running release."""
        return str(tomllib.loads((self.folder / "programs" / "current" / "device.toml").read_text())["model"])

    def model(self) -> bytes:
        """Return the content of the running release's model."""
        return Path(self.configured_model()).read_bytes()

    def want(self, release: int | None, **limits: Any) -> None:
        self.exchange.write(WANTED, WantedUpdate(release=release, **limits))

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds
        with suppress(FileNotFoundError):
            (self.shared / "restart").unlink()
            self.crashes = self.crashes and 0
        self.serve(self)

    def clock(self) -> float:
        self.slept_s += self.tick_s
        return self.slept_s

    def now(self) -> datetime:
        return datetime(2026, 5, 4, self.hour, tzinfo=UTC) + timedelta(seconds=self.slept_s)

    def updater(self, client: Repository | None = None) -> Updater:
        return Updater(
            self.exchange,
            self.layout,
            client or self.site.client(self.shared),
            trial_s=TRIAL_S,
            show=lambda _: None,
            clock=self.clock,
            now=self.now,
            sleep=self.sleep,
            restarts=lambda: self.crashes,
        )

    def update(self) -> UpdateState:
        state = self.updater().run()
        assert state is not None
        return state


def passes(gateway: Gateway) -> None:
    """Be a service whose self-test passes."""
    answer(gateway, ok=True)


def fails(gateway: Gateway) -> None:
    answer(gateway, ok=False)


def crashes(gateway: Gateway) -> None:
    """Be a service that ends as soon as it is started."""
    if gateway.exchange.trial() is not None and gateway.crashes is not None:
        gateway.crashes += 1


def answer(gateway: Gateway, *, ok: bool) -> None:
    if (trial := gateway.exchange.trial()) is not None:
        sentence = "24 tokens." if ok else "The edge does not know this vocabulary."
        gateway.exchange.write(TESTED, TrialResult(trial=trial, ok=ok, sentence=sentence))


def content(size: int, seed: int = 1) -> bytes:
    return Random(seed).randbytes(size)


def wheel(folder: Path, version: str) -> Path:
    """Make a bundle with a program `fleet` that prints its version, for this Python."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"dssd_fleet-{version}"
    files = {
        "toy_fleet.py": f"def main():\n    print('{version}')\n",
        f"{name}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: dssd-fleet\nVersion: {version}\n",
        f"{name}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}.dist-info/entry_points.txt": "[console_scripts]\nfleet = toy_fleet:main\n",
    }
    record = f"{name}.dist-info/RECORD"
    path = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, body in files.items():
            archive.writestr(file, body)
        archive.writestr(record, "".join(f"{file},,\n" for file in [*files, record]))
    return path


def this_kind() -> str:
    return f"{os.uname().machine}-cp{sys.version_info.major}{sys.version_info.minor}"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(repository, "_TIMEOUT_S", 300.0)
    certificate, ca = of_server(tmp_path)
    tls = enrol(Authority.open(tmp_path / "ca", actor="tester"), "gw-1", tmp_path / "identities")
    folder, keys = tmp_path / "repository", tmp_path / "keys"
    create_repository(folder, keys)
    with static_server(folder, certificate=certificate, key=certificate, ca=ca) as server:
        yield Site(tmp_path, keys, server, tls)


@pytest.fixture
def gateway(site: Site, tmp_path: Path) -> Gateway:
    return Gateway(site, tmp_path / "gateway")
