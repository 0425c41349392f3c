import csv
import io
import json
import re
import shlex
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import anyio
import pytest
from mcp import Client, StdioServerParameters

from fleet_admin.columns import csv_cell
from fleet_cli import tables
from fleet_cli.admin.sessions import follow
from fleet_cli.admin.usage import equal_parts, read_period
from fleet_edge.session_log.alerts import alerts as book
from fleet_edge.session_log.database import open_store
from fleet_edge.session_log.event_codes import Severity
from fleet_edge.session_log.log import SessionLog
from fleet_edge.session_log.records import LeaveReason, segment_number
from fleet_edge.session_log.steering import add_labels
from schemas.control import Presence
from schemas.reasons import EndReason
from tests.fleet_edge.store import samples
from tests.support.command import Run, as_json, refused

PAGE = Path(__file__).resolve().parents[3] / "docs" / "administration.md"
NOW = datetime.now(UTC)
FAILED, MOVED, WHOLE = "aa00000000000001", "bb00000000000002", "cc00000000000003"

# They need a broker or an authority, or do not end; other tests cover them.
ELSEWHERE = {"command", "unmatched", "settings"}


def _session(name: str, at: datetime, *, device: str, **opened: Any) -> list[Any]:
    key = {"session": name, "segment": segment_number(at), "device": device}
    measured = {"first_token_ms": 350.0, "gap_p95_ms": 90.0}
    return [samples.opened(**key, at=at, **opened), samples.progress(**key, at=at + timedelta(seconds=2), **measured)]


def _end(name: str, at: datetime, *, device: str, **fields: Any) -> Any:
    key = {"session": name, "segment": segment_number(at), "device": device}
    return samples.closed(**key, at=at + timedelta(seconds=3), **fields)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = f"sqlite:///{tmp_path_factory.mktemp('log') / 'fleet.sqlite3'}"
    lately, before = NOW - timedelta(minutes=5), NOW - timedelta(days=9)
    fresh = NOW + timedelta(hours=1)  # however long the tests take
    moved = {"session": MOVED, "segment": segment_number(lately), "device": "gateway-8"}
    event = {"session": None, "edge": "edge-1", "at": lately, "last_at": lately}
    with open_store(url) as store:
        store.apply(
            [
                samples.device_seen(device="gateway-7", software="0.2.0", at=lately, presence_since=before),
                samples.device_seen(device="gateway-8", at=before, certificate_until=NOW + timedelta(days=3)),
                samples.device_told(device="gateway-7", at=fresh),
                samples.device_told(device="gateway-8", at=fresh),
                samples.device_seen(device="gateway-9", at=before, presence=Presence.OFFLINE, presence_since=before),
                samples.edge_seen(at=lately),
                samples.edge_load(at=fresh, kv_usage=0.5),
                *_session(FAILED, lately, device="gateway-7", app="chat"),
                _end(
                    FAILED,
                    lately,
                    device="gateway-7",
                    reason=EndReason.FAILED,
                    code="drafter-error",
                    sentence="The draft model is gone.",
                ),
                *_session(MOVED, lately, device="gateway-8", app="=HYPERLINK(1)"),
                samples.left(**moved, reason=LeaveReason.HANDED_OVER, at=lately + timedelta(seconds=3)),
                *_session(MOVED, lately + timedelta(seconds=9), device="gateway-8", edge="edge-2"),
                *_session(WHOLE, before, device="gateway-8"),
                samples.judged(session=WHOLE, segment=segment_number(before), device="gateway-8", at=before),
                _end(WHOLE, before, device="gateway-8"),
                samples.event(**event, id="1", device="gateway-7", kind="refused", code="busy", count=4),
                samples.event(**event, id="2", device="gateway-7", code="internal", severity=Severity.ERROR),
                samples.event(**event, id="3", device="gateway-8", kind="session", code="handed-over"),
                samples.event(**event, id="4", device="gateway-8", kind="device", code="model-changed"),
                samples.event(**event, id="5", device=None, kind="config", code="wanted", who="ada"),
            ]
        )
        with store.engine.begin() as connection:
            add_labels(connection, {"gateway-8": ["hall_a", "north"]}, who="ada", now=NOW)
            assert book.take_lease(connection, holder="edge-1", now=fresh, for_s=30.0)
            book.note_evaluation(connection, now=fresh)
    return url


def _said(admin: Run, command: str) -> str:
    code, output, complaint = admin(*shlex.split(command))
    assert (code, complaint) == (0, ""), command
    return output


def _questions() -> list[tuple[str, str]]:
    rows = re.findall(r"^\| (.+?) \| (.*`fleet admin .+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [(question, command) for question, cell in rows for command in re.findall(r"`fleet admin ([^`]+)`", cell)]


def test_the_page_answers_24_questions() -> None:
    assert len({question for question, _ in _questions()}) == 24


@pytest.mark.parametrize("command", [command for _, command in _questions()])
def test_what_the_page_names_can_be_run(admin: Run, command: str) -> None:
    name = command.split(maxsplit=1)[0]
    if name in ELSEWHERE or "--follow" in command:
        assert "Usage:" in _said(admin, f"{name} --help")
        return
    assert _said(admin, command.replace("SESSION", FAILED[:4]))


@pytest.mark.parametrize(
    ("command", "expected", "absent"),
    [
        ("sessions model=nobodys", ["No row matches"], [MOVED]),
        (f"session {FAILED}", ["The draft model is gone. (drafter-error)", "350 ms", "90 ms"], []),
        ("edges", ["edge-1", "50.0 %", "4,093"], []),
        ("versions", ["0.2.0", "0.1.0"], []),
        ("usage --by label", ["hall_a", "north", "—"], ["gateway-8"]),
        ("usage --by app,device", ["chat", "gateway-7"], []),
        ("usage --per month", [f"{NOW:%Y-%m} "], []),
        ("usage --per day --since 20d", ["75.0 %", "first token p95"], []),
        ("usage --between 14d..7d,7d", ["+100.0 %", "sessions failed"], []),
        ("events --count kind,code severity=error", ["fault", "internal"], ["busy"]),
        ("events --count device kind=refused", ["gateway-7"], ["gateway-8"]),
    ],
)
def test_answers_hold_what_was_asked_for(admin: Run, command: str, expected: list[str], absent: list[str]) -> None:
    output = _said(admin, command)
    assert [word for word in expected if word not in output] == [], output
    assert [word for word in absent if word in output] == [], output


def test_a_period_of_usage_begins_and_ends_where_named_ones_begin(admin: Run) -> None:
    def tokens(options: str) -> int:
        return sum(each["counted"]["tokens"] for each in json.loads(_said(admin, f"usage --json {options}")))

    month = f"{NOW - timedelta(days=400):%Y-%m}"
    assert tokens(f"--since {month}") == tokens("") > 0
    assert tokens(f"--until {month}") == 0
    assert tokens("--since 12d --until 7d") + tokens("--since 7d") == tokens("")


def _numbers(output: str) -> list[str]:
    return [word for word in output.split() if any(character.isdigit() for character in word)]


@pytest.mark.parametrize("command", [command for _, command in _questions()])
def test_a_narrow_terminal_cuts_no_number(admin: Run, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = command.split(maxsplit=1)[0]
    if name in {*ELSEWHERE, "export"} or any(flag in command for flag in ("--follow", "--csv", "--columns")):
        return
    command = command.replace("SESSION", FAILED[:4])
    for _ in range(5):  # ages change from one call to the next on a slow machine
        whole = _numbers(_said(admin, command))
        with monkeypatch.context() as patch:
            patch.setattr(tables, "terminal_width", lambda: 60)
            narrow = _said(admin, command)
        if _numbers(_said(admin, command)) == whole:
            break
    # Times to the minute, and enough digits of an id to be unique.
    starts = tuple(each.rpartition(":")[0] for each in whole if each.count(":") == 2)
    ids = tuple(each[:8] for each in whole if len(each) >= 16)
    unknown = [each for each in _numbers(narrow) if each not in (*whole, *starts, *ids, "columns", "column")]
    hidden = [line.split()[0] for line in narrow.splitlines() if "hidden:" in line]
    assert [each for each in unknown if each not in hidden] == [], narrow
    tables_alone = [line for line in narrow.splitlines() if not line.endswith((".", "tokens")) and "─" in narrow]
    assert all(len(line) <= 60 for line in tables_alone), narrow


def test_of_two_periods_equal_parts_are_compared() -> None:
    wednesday = datetime(2026, 11, 25, 12, tzinfo=UTC)
    last, this = (read_period(name, now=wednesday) for name in ("last-week", "this-week"))
    assert (last.hours, this.hours) == (168.0, 60.0)
    for one, other in (equal_parts(last, this), equal_parts(this, last)[::-1]):
        assert (one.since, one.until) == (last.since, last.since + timedelta(hours=60))
        assert other == this
    over = [read_period(name, now=wednesday) for name in ("2026-09", "2026-10")]
    assert list(equal_parts(*over)) == over, "both are whole"


@pytest.mark.parametrize(
    ("command", "first"),
    [
        ("devices --sort certificate", "gateway-8"),
        ("devices --sort -round_trip", "gateway-7"),
        ("usage --by device --sort -sessions --since 30d", "gateway-8"),
        ("usage --by device --sort -errors --since 1h", "gateway-7"),
    ],
)
def test_what_is_to_be_looked_at_first_comes_first(admin: Run, command: str, first: str) -> None:
    assert json.loads(_said(admin, f"{command} --json"))[0]["device"] == first


def test_all_sessions_are_sorted_and_not_only_those_that_are_shown(tmp_path: Path, fleet: Run) -> None:
    db = f"sqlite:///{tmp_path / 'fleet.sqlite3'}"
    with open_store(db) as store:
        for number in range(60):
            at, name = NOW - timedelta(hours=60 - number), f"{number:016x}"
            key = {"session": name, "segment": segment_number(at), "device": "gateway-1"}
            store.apply([samples.opened(**key, at=at), samples.progress(**key, at=at, tokens=600 - number)])
    found = as_json(fleet("admin", "sessions", "--sort", "-tokens", "--limit", "3", "--json", "--db", db))
    assert [each["session"] for each in found] == [f"{number:016x}" for number in range(3)]


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("devices --sort size", "Devices have no column 'size'; there are device, state"),
        ("sessions --columns size,tokens", "Sessions have no column 'size'; there are session, device"),
        ("sessions size=5", "Sessions have no column 'size'"),
        ("sessions reason=bored", "reason is one of stop, length"),
        ("devices state=silent", "state is one of online"),
        ("sessions tokens=many", "tokens is compared with a number such as 5, not with 'many'"),
        ("sessions 'tokens>nan'", "tokens is compared with a number such as 5, not with 'nan'"),
        ("sessions 'tokens<'", "'tokens<' needs a value"),
        ("sessions tokens~5", "tokens is no text"),
        ("sessions 'opened>yesterday'", "opened: 'yesterday' is neither an age"),
        ("sessions labels~hall", "by labels=NAME only"),
        ("usage edge~1", "by edge=NAME only"),
        ("sessions tokens", "The filter 'tokens' cannot be read"),
        ("usage --by country", "--by takes app, device, edge, model, target, label, not 'country'"),
        ("usage --by day", "for times see --per"),
        ("usage --per week", "--per takes hour, day or month, not 'week'"),
        ("usage --since next-week", "'next-week' is no period: take today"),
        ("usage --edge edge-1", "write the filter edge=edge-1"),
        ("usage --between 7d", "--between takes two periods"),
        ("usage --between 14d,7d --by app", "--between goes with --edge and --json alone"),
        ("events severity=dreadful", "severity is one of info, warning, error, not 'dreadful'"),
        ("events --count moon", "--count takes kind, code"),
        ("events --count kind --follow", "--follow goes with filters"),
        ("events --until 1h --follow", "--follow goes with filters"),
        ("usage --between yesterday,tomorrow", "'tomorrow' is no period: take today"),
        ("usage --between 2020-13,7d", "'2020-13' is no period"),
        ("usage --between 7d..9d,7d", "is empty or has not begun"),
        ("export sessions --to /nowhere/at/all.csv", "The file /nowhere/at/all.csv cannot be written"),
    ],
)
def test_what_cannot_be_answered_is_one_sentence_and_exit_code_2(admin: Run, command: str, sentence: str) -> None:
    assert sentence in refused(admin(*shlex.split(command)))


def test_a_label_from_a_device_is_no_formula_to_a_spreadsheet(admin: Run) -> None:
    rows = list(csv.DictReader(io.StringIO(_said(admin, "usage --by app --csv"))))
    assert "'=HYPERLINK(1)" in {row["app"] for row in rows}
    rows = list(csv.DictReader(io.StringIO(_said(admin, "export segments"))))
    assert {row["app"] for row in rows} == {"chat", "'=HYPERLINK(1)", ""}
    assert {float(row["first_token_ms"]) for row in rows} == {350.0}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("@SUM(1)", "'@SUM(1)"),
        ("-1+2", "'-1+2"),
        ("\t=1", "'\N{REPLACEMENT CHARACTER}=1"),
        ("two\nlines", "two\N{REPLACEMENT CHARACTER}lines"),
        ("a=b", "a=b"),
        (-1.5, -1.5),
        (None, None),
    ],
)
def test_cells_are_one_line_and_no_formula(value: object, expected: object) -> None:
    assert csv_cell(value) == expected


@pytest.mark.parametrize("what", ["sessions", "segments", "rounds", "events"])
def test_every_kind_is_exported(admin: Run, what: str) -> None:
    (headings, *rows) = csv.reader(io.StringIO(_said(admin, f"export {what}")))
    assert all(len(row) == len(headings) for row in rows)


def test_events_are_followed_each_once_the_earliest_first(url: str) -> None:
    log = SessionLog(url)
    looks = iter(range(3))

    def pause() -> None:
        if next(looks) == 0:
            log.record_event(kind="command", code="sent", sentence="A self-test was asked for.", who="ada")
        elif next(looks) > 1:
            raise KeyboardInterrupt

    seen = []
    with pytest.raises(KeyboardInterrupt):
        seen += [seen.append(event) for event in follow(log, since=NOW - timedelta(hours=1), pause=pause)]
    codes = [event.code for event in seen]
    assert sorted(codes) == sorted(["busy", "internal", "handed-over", "model-changed", "wanted", "sent"])
    assert codes[-1] == "sent"


ASKED: Final = (
    ("table", {"name": "devices"}, lambda said: len(said["rows"]), 3),
    ("table", {"name": "devices", "filters": ["state=offline"]}, lambda said: said["rows"][0]["device"], "gateway-9"),
    ("table", {"name": "edges"}, lambda said: said["rows"][0]["edge"], "edge-1"),
    ("table", {"name": "sessions", "filters": ["reason=failed"]}, lambda said: said["rows"][0]["session"], FAILED),
    ("table", {"name": "sessions", "limit": 1}, lambda said: (len(said["rows"]), said["more"]), (1, True)),
    ("table", {"name": "events", "filters": ["kind=refused"]}, lambda said: said["rows"][0]["code"], "busy"),
    ("table", {"name": "alerts"}, lambda said: said["rows"], []),
    ("usage", {"by": ["device"], "sort": "device"}, lambda said: said["rows"][0]["device"], "gateway-7"),
    ("device", {"name": "gateway-7"}, lambda said: said["events"][0]["device"], "gateway-7"),
    ("edge", {"name": "edge-1"}, lambda said: said["edge"]["edge"], "edge-1"),
    ("session", {"prefix": FAILED[:6]}, lambda said: said["session"]["session"], FAILED),
)
WRONG: Final = (
    ("device", {"name": "nobody"}, "nobody"),
    ("table", {"name": "passwords"}, "passwords"),
    ("table", {"name": "devices", "filters": ["colour=blue"]}, "colour"),
    ("table", {"name": "sessions", "since": "soon"}, "soon"),
    ("usage", {"by": ["moon"]}, "moon"),
)


def test_an_assistant_is_answered_over_standard_input_and_output(url: str) -> None:
    program = StdioServerParameters(command=sys.executable, args=["-m", "fleet_cli.main", "admin", "mcp", "--db", url])

    async def ask() -> None:
        async with Client(program, read_timeout_seconds=120.0) as client:
            tools = (await client.list_tools()).tools
            assert {each.name for each in tools} == {name for name, *_ in ASKED}
            assert all(each.annotations is not None and each.annotations.read_only_hint for each in tools)
            for name, given, figure, expected in ASKED:
                answer = await client.call_tool(name, given)
                assert not answer.is_error, answer
                assert answer.structured_content is not None
                assert figure(answer.structured_content) == expected, (name, given)
            for name, given, word in WRONG:
                answer = await client.call_tool(name, given)
                assert answer.is_error
                assert word in str(answer.content)

    anyio.run(ask)
