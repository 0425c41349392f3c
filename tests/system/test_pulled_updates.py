"""Releases that gateways pull: the real updater behind NAT, on slow lines that are cut, killed at any moment.

Each gateway has a network namespace behind one router, which masquerades; the file server is beyond it. Broker, edge
and the gateways' services run in this process: an updater meets its service through files alone.
"""

import os
import random
import shutil
import subprocess
import sys
import threading
import time
import tomllib
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest

from fleet_admin.releases import create_repository, publish
from fleet_admin.settings import AdminSettings
from fleet_admin.steering import Actor, Selection, Steering, SteeringError
from fleet_admin.steering.rollout import RELEASE, SHARES, roll_out, update_views
from fleet_common.identity.authority import Issued, issue
from fleet_common.identity.certificates import IdentityRole
from fleet_common.mqtt.link import publish_confirmed
from fleet_device.drafters.contract import Drafter, DrafterError
from fleet_device.gateway import Gateway
from fleet_device.service import DeviceService
from fleet_device.settings import DeviceSettings
from fleet_device.steering.remote_settings import SteeredSettings, load_steered
from fleet_device.updates.handoff import STATE, UpdateFolder, UpdateState
from fleet_device.updates.layout import UpdatePaths
from fleet_edge.session_log.database import open_store
from fleet_edge.settings import EdgeSettings
from schemas.control import encode_json
from schemas.errors import FleetError
from schemas.topics import Topic, build
from tests.support.edge_thread import NO_QUOTAS, edge_thread
from tests.support.memory_device import TalkingDrafter
from tests.support.memory_fleet import DRAFT, END, TARGET, edge_state
from tests.support.scripted_verifier import ScriptedVerifier
from tests.support.tls_fleet import FLEET, TlsFleet, tls_fleet
from tests.support.waiting import PATIENCE_S, until
from tests.system.test_firewall import ip

pytestmark = [
    pytest.mark.broker,
    pytest.mark.root,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc", "iptables"))), reason="needs root, ip, tc, iptables"
    ),
]

SERVER, ROUTER = "203.0.113.2", "203.0.113.1"
PORT = 8443
ALICE = Actor("alice", "desk")
BAD = b"BAD model"
FIRST = "0.1.0-0123abcd"


def within(namespace: str, *command: object) -> list[str]:
    return ["ip", "netns", "exec", namespace, *map(str, command)]


@dataclass
class Lines:
    """Namespaces of a server, a router and gateways, whose lines have a rate."""

    name: str

    @property
    def server(self) -> str:
        return f"{self.name}-s"

    @property
    def router(self) -> str:
        return f"{self.name}-r"

    def gateway(self, number: int) -> str:
        return f"{self.name}-{number}"

    def carried(self, count: int) -> int:
        """Return the bytes that the gateways' lines have carried to them, headers included."""
        files = [f"/sys/class/net/down{number}/statistics/tx_bytes" for number in range(count)]
        done = subprocess.run(within(self.router, "cat", *files), capture_output=True, text=True, check=True)
        return sum(map(int, done.stdout.split()))

    def cut(self, number: int, *, up: bool) -> None:
        ip("-n", self.router, "link", "set", f"down{number}", "up" if up else "down")


@contextmanager
def lines(count: int, rate: str) -> Iterator[Lines]:
    made = Lines(f"pull-{uuid.uuid4().hex[:6]}")
    with ExitStack() as stack:
        for name in (made.server, made.router, *map(made.gateway, range(count))):
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here: {error.stderr!r}")
            stack.callback(ip, "netns", "delete", name)
            ip("-n", name, "link", "set", "lo", "up")
        join(made.server, "wan", f"{SERVER}/24", made.router, "out", f"{ROUTER}/24")
        for number in range(count):
            inside = f"10.66.{number}"
            join(made.gateway(number), "wan", f"{inside}.2/24", made.router, f"down{number}", f"{inside}.1/24")
            ip("-n", made.gateway(number), "route", "add", "default", "via", f"{inside}.1")
            shape = ("tc", "qdisc", "add", "dev", f"down{number}", "root", "tbf", "rate", rate, "burst", "32kb")
            subprocess.run(within(made.router, *shape, "latency", "300ms"), check=True)
        subprocess.run(within(made.router, "sysctl", "-qw", "net.ipv4.ip_forward=1"), check=True)
        masquerade = ("iptables", "-t", "nat", "-A", "POSTROUTING", "-o", "out", "-j", "MASQUERADE")
        subprocess.run(within(made.router, *masquerade), check=True)
        yield made


def join(one: str, link: str, address: str, other: str, other_link: str, other_address: str) -> None:
    ip("link", "add", link, "netns", one, "type", "veth", "peer", "name", other_link, "netns", other)
    for namespace, name, given in ((one, link, address), (other, other_link, other_address)):
        ip("-n", namespace, "address", "add", given, "dev", name)
        ip("-n", namespace, "link", "set", name, "up")


@dataclass
class Site:
    """One gateway: its folders, its service, and its updater, which runs, is killed, and runs again."""

    number: int
    folder: Path
    fleet: TlsFleet
    lines: Lines
    rng: random.Random
    kills: int = 0
    cuts: int = 0
    disturb_every: int = 1 << 20  # bytes, at most
    _stopping: threading.Event = field(default_factory=threading.Event)
    _service: Gateway | None = None
    _restarted: str = ""
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.name = f"gw-{self.number}"
        release, venv = self.folder / "programs" / "releases" / FIRST, self.folder / "programs" / "venvs" / "0.1.0"
        for each in (release, venv, self.folder / "models", self.folder / "updates" / "inbox"):
            each.mkdir(parents=True)
        (release / "venv").symlink_to(venv)
        (release / "device.toml").write_text(f'fleet = "{FLEET}"\nmodel = ""\n')
        (self.folder / "programs" / "current").symlink_to(f"releases/{FIRST}")
        self.tls = self.fleet.enrol(self.name)
        self.exchange = UpdateFolder(self.folder / "updates")
        self.layout = UpdatePaths(self.folder / "programs", self.folder / "models")

    @property
    def state(self) -> UpdateState | None:
        return self.exchange.read(UpdateState, STATE)

    def model(self) -> Path:
        return Path(tomllib.loads((self.folder / "programs" / "current" / "device.toml").read_text())["model"])

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        if self._service is not None:
            self._service.stop()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._serve()
            process = subprocess.Popen(self._updater(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            bound = self._present() + self.rng.randint(self.disturb_every // 3, self.disturb_every)
            while process.poll() is None and not self._stopping.wait(0.1):
                self._serve()
                if self._present() > bound:
                    self._disturb(process)
                    bound += self.rng.randint(self.disturb_every // 3, self.disturb_every)
            process.kill()
            process.wait()
            self._stopping.wait(0.5)

    def _present(self) -> int:
        """Return the bytes of a download that is not complete."""
        return sum(each.stat().st_size for each in (self.folder / "models").rglob("*.part"))

    def _disturb(self, process: "subprocess.Popen[bytes]") -> None:
        """Cut the line for a while, or kill the updater as a power cut does."""
        if self.rng.random() < 0.5:
            self.cuts += 1
            self.lines.cut(self.number, up=False)
            self._stopping.wait(self.rng.uniform(0.5, 3.0))
            self.lines.cut(self.number, up=True)
        else:
            self.kills += 1
            process.kill()
            process.wait()

    def _updater(self) -> list[str]:
        assert self.tls.certificate is not None
        files = ("--ca", self.tls.ca, "--certificate", self.tls.certificate, "--key", self.tls.key)
        places = ("--folder", self.exchange.path, "--programs", self.layout.programs, "--models", self.layout.models)
        options = ("--url", f"https://{SERVER}:{PORT}", "--root", self.fleet.folder / "root.json", "--trial-s", "300")
        command = (sys.executable, "-m", "fleet_cli.main", "device", "update", *options, *files, *places)
        return within(self.lines.gateway(self.number), *command)

    def _serve(self) -> None:
        """Start or restart the service, as systemd does."""
        asked = self.exchange.path / "restart"
        wanted = asked.read_text() if asked.exists() else ""
        if self._service is not None and wanted == self._restarted:
            return
        if self._service is not None:
            self._service.stop()
        self._service, self._restarted = None, wanted
        own = DeviceSettings(
            fleet=FLEET,
            device=self.name,
            broker=self.fleet.settings(self.tls),
            api_listen="",
            requests_at_once=1,
            state_dir=self.folder / "state",
            update_dir=self.exchange.path,
        )
        remote = SteeredSettings.of(own)
        try:
            drafter = load_steered(remote, self._load)
        except FleetError:
            return
        self._service = Gateway(DeviceService(remote.settings, drafter), remote=remote)
        self._service.start()

    def _load(self, _: DeviceSettings) -> Drafter:
        model = self.model()
        if model.is_file() and model.read_bytes()[: len(BAD)] == BAD:
            raise DrafterError(f"{model} is no model.")
        return TalkingDrafter()


@contextmanager
def edge(fleet: TlsFleet) -> Iterator[None]:
    identity = fleet.enrol("edge-1", IdentityRole.EDGE)
    settings = EdgeSettings(fleet=FLEET, edge="edge-1", broker=fleet.settings(identity), quotas=NO_QUOTAS)
    link = fleet.link(identity, "edge-1", port=fleet.broker.edge_port)
    with edge_thread(settings, ScriptedVerifier(TARGET, DRAFT.words, end_tokens=(END,)), link=link):
        topic, state = build(Topic.EDGE_STATE, fleet=FLEET, edge="edge-1"), edge_state(edge="edge-1")
        publish_confirmed(link, topic, encode_json(state), retain=True, timeout_s=PATIENCE_S)
        yield


@contextmanager
def file_server(site: Lines, repository: Path, identity: Issued) -> Iterator[None]:
    files = (identity.certificate, identity.key, identity.ca)
    command = (sys.executable, "-m", "tests.support.static_server", repository, SERVER, PORT, *files)
    process = subprocess.Popen(within(site.server, *command), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    try:
        yield
    finally:
        process.terminate()
        process.communicate()


@pytest.mark.parametrize(
    ("count", "size", "rate"),
    [
        pytest.param(3, 6_000_000, "8mbit", id="small"),
        pytest.param(
            20,
            100_000_000,
            "2mbit",
            id="large",
            marks=[pytest.mark.exhaustive, pytest.mark.timeout(2400)],
        ),
    ],
)
def test_gateways_behind_nat_pull_a_model_over_bad_lines_and_a_bad_release_stops_at_the_first(
    tmp_path: Path, count: int, size: int, rate: str
) -> None:
    patience_s = 4.0 * size * 8 / (float(rate.removesuffix("mbit")) * 1e6) + 400.0
    content = random.Random(1).randbytes(size)
    repository, keys, file = tmp_path / "repository", tmp_path / "keys", tmp_path / "draft.gguf"
    with ExitStack() as stack:
        fleet = stack.enter_context(tls_fleet(tmp_path, edges=("edge-1",)))
        root = create_repository(repository, keys)
        shutil.copy(root, fleet.folder / "root.json")
        site = stack.enter_context(lines(count, rate))
        server = issue(fleet.authority, "mirror", role=IdentityRole.BROKER, hosts=[SERVER], folder=tmp_path / "mirror")
        stack.enter_context(file_server(site, repository, server))
        stack.enter_context(edge(fleet))
        url = f"sqlite:///{tmp_path / 'fleet.sqlite3'}"
        open_store(url).close()
        monitor = fleet.settings(fleet.enrol("monitor", IdentityRole.MONITOR))
        steering = stack.enter_context(Steering.open(AdminSettings(fleet=FLEET, broker=monitor), url))
        gateways = [
            Site(number, tmp_path / f"gw-{number}", fleet, site, random.Random(number), disturb_every=size // 3)
            for number in range(count)
        ]
        for gateway in gateways:
            stack.callback(gateway.stop)
            gateway.start()
        until(lambda: len(update_names(steering)) == count)

        def roll(release: int, shares: tuple[str, ...]) -> None:
            roll_out(
                steering,
                release,
                Selection(everything=True),
                shares,
                actor=ALICE,
                failures=0,
                wait_s=patience_s,
                show=print,
            )

        file.write_bytes(content)
        good = publish(repository, keys, model=file, valid=timedelta(days=1))
        assert good is not None
        before, began = site.carried(count), time.monotonic()
        roll(good, ("100%",))
        took_s, sent = time.monotonic() - began, site.carried(count) - before
        for gateway in gateways:
            assert gateway.model().read_bytes() == content
            assert not list((gateway.folder / "models").rglob("*.part"))
        kills, cuts = sum(each.kills for each in gateways), sum(each.cuts for each in gateways)
        ratio = sent / (count * size)
        print(
            f"{count} gateways, {size:,} bytes, {rate}: {took_s:.0f} s, {kills} kills, {cuts} cuts, "
            f"carried ÷ size {ratio:.3f}"
        )
        assert kills
        assert cuts
        assert ratio <= (1.1 if size >= 50_000_000 else 1.5)  # TCP's headers, and the buffers that a kill empties

        file.write_bytes(BAD + bytes(10_000))
        bad = publish(repository, keys, model=file, valid=timedelta(days=1))
        assert bad is not None
        with pytest.raises(SteeringError, match=f"stops at 1 of {count} devices"):
            roll(bad, SHARES)
        asked = [each for each in steering.wanted_and_reported() if each.wanted.get(RELEASE) == bad]
        [view] = update_views(asked)
        assert (view.stage, view.running) == ("failed", f"update-{good}")
        assert "is no model" in view.sentence
        assert {gateway.layout.running for gateway in gateways} == {f"update-{good}"}


def update_names(steering: Steering) -> set[str]:
    return {each.device for each in steering.wanted_and_reported() if each.reports}
