"""Each report, filtered, as CSV and JSON of the command line, and as CSV and page of the dashboard."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import quote_plus

import pytest
from starlette.testclient import TestClient

from fleet_admin import reports
from fleet_admin.columns import Column
from fleet_admin.dashboard.app import create_app
from fleet_admin.dashboard.rendering import filled
from fleet_admin.dashboard.services import open_services
from fleet_admin.dashboard.settings import AccountRole, DashboardSettings
from fleet_admin.report import Report, ReportError
from fleet_admin.usage import DIMENSIONS, usage_report
from fleet_edge.session_log import SessionLog
from fleet_edge.session_log.alerts import alerts as book
from fleet_edge.session_log.database import open_store
from fleet_edge.session_log.steering import add_labels
from schemas.printable import printable
from tests.fleet_admin.dashboard.conftest import ACTOR, BASE, PASSWORD, Browser
from tests.fleet_admin.dashboard.fleet_log import DEVICES, EVIL, fill
from tests.fleet_edge.store import samples
from tests.support.command import Run

PAGES = {"devices": "/devices", "edges": "/edges", "sessions": "/sessions", "alerts": "/alerts", "audit": "/audit"}
PAGES |= {f"usage --by {name}": f"/usage?by={name}" for name in ("device", "edge", "model", "app")}


def session(number: int) -> str:
    return f"{number:016x}"


OF_GATEWAY_2 = {session(100 + hour) for hour in range(1, 24, 5)}
CASES = [
    ("devices", "", {*DEVICES, "evil"}),
    ("devices", "device~GATEWAY", set(DEVICES)),
    ("devices", "device=gateway-1 device=gateway-4", {"gateway-1", "gateway-4"}),
    ("devices", "device!=evil release!~0.1 labels=", {"gateway-3", "gateway-4"}),
    ("devices", "labels=hall_a", {"gateway-1"}),
    ("devices", "state=online", {*DEVICES, "evil"}),
    ("devices", "state!=online", set()),
    ("devices", "sessions>5", {"gateway-1"}),
    ("devices", "seen>2h", {*DEVICES, "evil"}),
    ("devices", "throttled!=", set()),
    ("edges", "spool>=40", {"edge-2"}),
    ("edges", "tokens=", {"edge-2"}),
    ("sessions", "device=gateway-2", OF_GATEWAY_2),
    ("sessions", "device=gateway-2 opened>2h", {session(101)}),
    ("sessions", "device=gateway-1 edge=edge-1", {session(6), session(16)}),
    ("sessions", "app~img", {EVIL}),
    ("sessions", "model~img reason=failed", {EVIL}),
    ("sessions", "draft~img", {EVIL}),
    ("sessions", "reason=running", {session(999)}),
    ("sessions", "labels=hall_a reason!=running", {session(hour) for hour in range(1, 24, 5)}),
    ("sessions", "device=gateway-2 tokens>43", {session(111), session(116)}),
    ("sessions", "why!=", {EVIL}),
    ("alerts", "state=critical", {"edge-2"}),
    ("alerts", "rule=device-offline", {"evil"}),
    ("audit", "who=ada", {"gateway-3"}),
    ("audit", "action~retire who!=ada", set()),
    ("usage --by device", "tokens>0 device~gateway", set(DEVICES)),
    ("usage --by device", "edge=edge-1", {"evil", *DEVICES}),
    ("usage --by edge", "device=gateway-1 device=gateway-2", {"edge-1", "edge-2"}),
    ("usage --by edge", "label=hall_a", {"edge-1", "edge-2"}),
    ("usage --by edge", "label=nothing", set()),
    ("events", "code~img", {"evil"}),
    ("events", "severity!=info who= device!=", {"evil"}),
    ("quarantined", "device!=gateway-4", {"nobody"}),
    ("quarantined", "until=lifted", {"nobody"}),
    ("labels", "number<2", {"hall_a"}),
    ("versions", "devices>0 software~0.", {"0.0.0", "0.1.0", "0.2.0", "0.3.0"}),
]
NAMED = {"alerts": "subject", "audit": "subject", "events": "device"}
"""Column to tell rows by, where it is not the first."""


@dataclass
class Fleet:
    url: str
    browser: Browser


@pytest.fixture(scope="module")
def fleet_of_today(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    now = datetime.now(UTC)
    url = f"sqlite:///{tmp_path_factory.mktemp('reports') / 'fleet.sqlite3'}"
    fill(url, now=now)
    with open_store(url) as store, store.engine.begin() as connection:
        add_labels(connection, {"gateway-1": ["hall_a"]}, who="ada", now=now)
    services = open_services(DashboardSettings(db=url))
    services.accounts.add("victor", role=AccountRole.VIEWER, password=PASSWORD, actor=ACTOR)
    services.steering.log.retire("gateway-3", actor=type(ACTOR)("ada"))
    services.steering.log.retire("gateway-3", undo=True, actor=type(ACTOR)("ada"))
    services.log.quarantine("gateway-4", reason="It floods.", duration="2h", who="eve")
    services.log.unquarantine("gateway-4", who="eve")
    services.log.quarantine("nobody", who="eve")
    browser = Browser(TestClient(create_app(services), base_url=BASE, follow_redirects=False))
    browser.log_in("victor")
    yield Fleet(url, browser)
    services.steering.stop()


@pytest.fixture
def fleet_log(fleet_of_today: Fleet) -> Fleet:
    """Return a fleet whose edge has just reported: by the wall clock, it is silent a minute later."""
    now = datetime.now(UTC)
    with open_store(fleet_of_today.url) as store:
        store.apply([samples.edge_load(at=now)])
        with store.engine.begin() as connection:
            book.note_evaluation(connection, now=now)
    return fleet_of_today


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize(("report", "words", "expected"), CASES)
def test_a_report_is_the_same_in_each_format(
    fleet_log: Fleet, fleet: Run, report: str, words: str, expected: set[str]
) -> None:
    def run(*options: str) -> str:
        code, output, complaint = fleet("admin", *report.split(), *words.split(), *options, "--db", fleet_log.url)
        assert (code, complaint) == (0, ""), complaint
        return output

    saved = rows_of(run("--csv"))
    key = NAMED.get(report) or next(iter(csv.reader(io.StringIO(run("--csv")))))[0]
    assert {row[key] for row in saved} == expected
    assert len(json.loads(run("--json"))) == len(saved)
    table = run()
    assert all(printable(value) in table for value in expected)
    assert len(rows_of(run("--csv", "--limit", "1", "--columns", "all"))) == min(1, len(saved))
    if page := PAGES.get(report):
        path = f"{page}{'&' if '?' in page else '?'}filter={quote_plus(words)}"
        of_page = rows_of(fleet_log.browser.get(f"{path}&format=csv&columns=all").text)
        assert sorted(row[key] for row in of_page) == sorted(row[key] for row in saved)
        shown = fleet_log.browser.get(path)
        assert shown.status_code == 200
        if report != "alerts":  # its table has those that are over
            assert len(re.findall(r"<tr>\s*<td", shown.text.rpartition("<tbody>")[2])) == max(len(saved), 1)


def test_each_column_can_be_named_in_a_filter(fleet_log: Fleet) -> None:
    with SessionLog(fleet_log.url) as log:
        made = [reports.devices, reports.edges, reports.sessions, reports.events, reports.releases, reports.quarantines]
        found = [make(log, datetime.now(UTC)) for make in made] + [
            usage_report(log, list(DIMENSIONS), "day", now=datetime.now(UTC))
        ]  # type: ignore[operator]
        for report in found:
            keys = [column.key for column in report.columns]
            assert len({*keys}) == len(keys)
            assert [len(report.filters([f"{key}="])) for key in keys] == [1] * len(keys)
            assert report.rows(report.filters([f"{key}=" for key in keys])).rows == []


@dataclass(frozen=True)
class Row:
    name: str | None
    share: float | None = None
    tokens: int = 0


NAME: Column[Row] = Column("name", "name")
SHARE: Column[Row] = Column("share", "share", "percent")
TOKENS: Column[Row] = Column("tokens", "tokens", "count", rank=3)
ROWS = [Row("beta", 0.5, 3), Row("Alpha", 0.25, 20), Row("gamma", None, 1)]
REPORT: Report[Row] = Report("rows", (NAME, SHARE, TOKENS), lambda **_: ROWS, "name")


def test_a_column_of_sentences_that_no_row_has_is_left_out() -> None:
    why: Column[Row] = Column("why", lambda row: row.name if row.share is None else None, "sentence")
    assert filled((NAME, why), ROWS) == [NAME, why]
    assert filled((NAME, why), ROWS[:2]) == [NAME]


@pytest.mark.parametrize(
    ("words", "sort", "expected"),
    [
        ("", "", ["Alpha", "beta", "gamma"]),
        ("", "-share", ["beta", "Alpha", "gamma"]),  # those without a value come last
        ("", "share", ["Alpha", "beta", "gamma"]),
        ("share=50", "", ["beta"]),
        ("share>49.9", "", ["beta"]),
        ("share<50", "", ["Alpha"]),
        ("share=", "", ["gamma"]),
        ("share!=50", "", ["Alpha", "gamma"]),
        ("tokens>=3 tokens<20", "", ["beta"]),
        ("name~a name~e", "-tokens", ["Alpha", "beta", "gamma"]),
    ],
)
def test_rows_are_filtered_and_sorted(words: str, sort: str, expected: list[str]) -> None:
    assert [row.name for row in REPORT.rows(REPORT.filters(words.split()), sort=sort).rows] == expected


@pytest.mark.parametrize(
    "asked",
    [
        lambda report: report.filters(["secret=1"]),
        lambda report: report.rows(sort="secret"),
        lambda report: report.chosen(["a; drop table devices"]),
        lambda report: report.filters(["name<"]),
    ],
)
def test_what_a_report_does_not_have_is_refused(asked: Callable[[Report[Row]], object]) -> None:
    with pytest.raises(ReportError):
        asked(REPORT)


def test_what_the_database_does_not_filter_is_found_among_many() -> None:
    """Pages of the log hold the rows that meet a filter of Python, and no page is skipped."""
    read = list[tuple[int, int]]()

    def numbers(*, limit: int, skip: int, **_: object) -> list[int]:
        read.append((limit, skip))
        return list(range(1000))[skip : skip + limit]

    column: Column[int] = Column("number", lambda row: row, "count")
    report = Report("numbers", [column], numbers, "number", paged=True)
    found = report.rows(report.filters(["number>=990"]), limit=6, skip=6)
    assert (list(found.rows), found.more, found.found) == ([996, 997, 998, 999], False, 10)
    assert report.rows(limit=10, skip=990).more is False
    assert read[-1] == (11, 990)
    assert [line[0] for line in report.lines([column])] == list(range(1000))
