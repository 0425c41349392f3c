import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from argon2 import PasswordHasher
from httpx import Response
from starlette.testclient import TestClient

from fleet_admin.dashboard.accounts import Passwords
from fleet_admin.dashboard.app import DashboardServer, create_app
from fleet_admin.dashboard.services import Services, open_services
from fleet_admin.dashboard.settings import AccountRole, DashboardSettings
from fleet_admin.steering import Actor, Steering
from fleet_admin.steering.wire import SteeringWire
from schemas.control import DesiredSettings, ReportedSettings, UpdateReport, UpdateStage, encode_json
from schemas.topics import Topic, build
from tests.fleet_admin.dashboard.fleet_log import fill
from tests.support.chromium import Chromium, Tab
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_link import MemoryLink

NOW = datetime(2026, 3, 5, 12, 0, tzinfo=UTC)
ACTOR = Actor("tests")
PASSWORD = "correct horse battery"
BASE = "http://127.0.0.1"
CSRF = re.compile(r'name="csrf" value="([0-9a-f]{64})"')


@dataclass(slots=True)
class Clock:
    now: datetime = NOW
    monotonic: float = 0.0


@dataclass(slots=True)
class Browser:
    """Keeps cookies and submits forms as a browser does; follows no redirect."""

    client: TestClient

    def get(self, path: str, **headers: str) -> Response:
        return self.client.get(path, headers=headers)

    def csrf(self, path: str) -> str:
        found = CSRF.search(self.get(path).text)
        assert found, path
        return found[1]

    def post(self, path: str, *, of: str = "/account", **fields: str | list[str]) -> Response:
        return self.client.post(path, data={"csrf": self.csrf(of), **fields}, headers={"origin": BASE})

    def log_in(self, account: str, password: str = PASSWORD, next_path: str = "") -> Response:
        return self.post("/login", of="/login", account=account, password=password, next=next_path)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dashboard") / "fleet.sqlite3"
    fill(f"sqlite:///{path}", now=NOW)
    return path


@pytest.fixture
def url(tmp_path: Path, filled: Path) -> str:
    shutil.copy(filled, tmp_path / "fleet.sqlite3")
    return f"sqlite:///{tmp_path / 'fleet.sqlite3'}"


@pytest.fixture
def make_services(url: str, clock: Clock) -> Callable[..., Services]:
    def make(**settings: object) -> Services:
        services = open_services(
            DashboardSettings(db=url, **settings),
            now=lambda: clock.now,
            clock=lambda: clock.monotonic,
            # The cheapest parameters: the cost of a check is argon2's.
            passwords=Passwords(PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)),
        )
        services.accounts.add("olga", role=AccountRole.OPERATOR, password=PASSWORD, actor=ACTOR)
        services.accounts.add("victor", role=AccountRole.VIEWER, password=PASSWORD, actor=ACTOR)
        return services

    return make


@pytest.fixture
def services(make_services: Callable[..., Services]) -> Services:
    return make_services()


@pytest.fixture
def steering(services: Services) -> None:
    """Connect the dashboard to a broker that retains settings of a device."""
    broker = MemoryBroker()
    link = MemoryLink(broker, "dashboard")
    wire = SteeringWire(link, fleet=services.settings.fleet, name="dashboard")
    link.start(timeout_s=1.0)
    desired = DesiredSettings(id="0" * 16, values={"top_k": 7}, who="ada", at=NOW)
    wire.want("gateway-1", desired)
    update = UpdateReport(
        release=3, stage=UpdateStage.FAILED, sentence="It was rolled back.", running="update-2", at=NOW
    )
    reported = ReportedSettings(id=desired.id, values={"top_k": 7, "ahead": True}, update=update, at=NOW)
    topic = build(Topic.CONFIG_REPORTED, fleet=services.settings.fleet, device="gateway-1")
    link.publish(topic, encode_json(reported), retain=True)
    broker.pump()
    services.steering._steering = Steering(services.steering.log, wire)


@pytest.fixture
def browsers(services: Services) -> Callable[[], Browser]:
    app = create_app(services)
    return lambda: Browser(TestClient(app, base_url=BASE, follow_redirects=False, raise_server_exceptions=False))


@pytest.fixture
def stranger(browsers: Callable[[], Browser]) -> Browser:
    return browsers()


@pytest.fixture
def operator(browsers: Callable[[], Browser]) -> Browser:
    browser = browsers()
    assert browser.log_in("olga").status_code == 303
    return browser


@pytest.fixture
def viewer(browsers: Callable[[], Browser]) -> Browser:
    browser = browsers()
    assert browser.log_in("victor").status_code == 303
    return browser


@pytest.fixture
def served(services: Services) -> Iterator[str]:
    settings = services.settings.model_copy(update={"listen": "127.0.0.1:0"})
    server = DashboardServer(settings, services=services)
    yield server.address.rstrip("/")
    server.stop()


@pytest.fixture
def log_in_tab(served: str, chromium: Chromium) -> Callable[..., Tab]:
    def open_tab(account: str = "olga", *, width: int = 1280, height: int = 800, dark: bool = False) -> Tab:
        tab = chromium.tab(width=width, height=height, dark=dark)
        tab.goto(f"{served}/login")
        tab.evaluate(
            f"document.querySelector('[name=account]').value = '{account}';"
            f"document.querySelector('[name=password]').value = '{PASSWORD}'"
        )
        tab.after_load(lambda: tab.evaluate("document.querySelector('form').requestSubmit()"))
        tab.complaints.clear()
        return tab

    return open_tab
