import io
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from fleet_common.logs import Event, EventStream, JsonFormatter, Repetition, read_events, write_log_as
from schemas.errors import FleetError
from tests.support.waiting import PATIENCE_S


@pytest.fixture
def formatter() -> JsonFormatter:
    return JsonFormatter({"fleet": "north", "edge": "edge-1"})


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("fleet_edge.x", logging.WARNING, __file__, 1, message, args, None)
    made.__dict__.update(extra)
    made.created = 1_750_000_000.25
    return made


def test_a_line_has_time_level_logger_message_and_who(formatter: JsonFormatter) -> None:
    line = formatter.format(record("Session %s has ended.", "5e55", session="5e55", device="gateway-1", tokens=40))
    assert json.loads(line) == {
        "time": "2025-06-15T15:06:40.250+00:00",
        "level": "warning",
        "logger": "fleet_edge.x",
        "message": "Session 5e55 has ended.",
        "fleet": "north",
        "edge": "edge-1",
        "session": "5e55",
        "device": "gateway-1",
        "tokens": 40,
    }


@pytest.mark.parametrize(
    "hostile", ['a\nb"}{"level":"critical', "\x1b[31m\u202e\x9b", "\ud800", "x" * 100_000, "\u2028\r\x00"]
)
def test_whatever_a_record_quotes_it_is_one_line_and_steers_no_terminal(formatter: JsonFormatter, hostile: str) -> None:
    line = formatter.format(record("%s", hostile, device=hostile))
    assert json.loads(line)["level"] == "warning"
    assert not {"\n", "\r", "\x1b", "\x9b", "\u202e", "\x00"} & set(line)
    assert len(line) < 100_000
    line.encode()


def test_what_is_not_on_the_list_is_left_out(formatter: JsonFormatter) -> None:
    line = formatter.format(record("Connected.", password="hunter2", token="t0p", device=object()))
    assert "hunter2" not in line
    assert "t0p" not in line
    assert set(json.loads(line)) == {"time", "level", "logger", "message", "fleet", "edge"}


def test_arguments_that_do_not_fit_lose_no_line(formatter: JsonFormatter) -> None:
    assert "do not fit" in json.loads(formatter.format(record("%d %d", "x")))["message"]


def test_a_traceback_is_a_field(formatter: JsonFormatter) -> None:
    try:
        raise ValueError("Bad\nnews")  # noqa: TRY301
    except ValueError:
        made = record("It failed.")
        made.exc_info = sys.exc_info()
    assert json.loads(formatter.format(made))["exception"].endswith("ValueError: Bad\nnews")


@pytest.fixture
def root() -> Iterator[logging.StreamHandler[object]]:
    logger, handler = logging.getLogger(), logging.StreamHandler(sys.stderr)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_json_has_all_levels(root: logging.StreamHandler[object], capsys: pytest.CaptureFixture[str]) -> None:
    root.setStream(sys.stderr)
    write_log_as("plain", device="gateway-1")
    logging.getLogger("x").info("Unheard.")
    write_log_as("json", device="gateway-1")
    logging.getLogger("x").info("Heard.")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "Heard."
    assert json.loads(line)["device"] == "gateway-1"


class Time:
    def __init__(self) -> None:
        self.now = 0.0
        self.waiting: list[tuple[float, Callable[[], None]]] = []

    def __call__(self) -> float:
        return self.now

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        self.waiting.append((self.now + delay_s, action))

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [each for each in self.waiting if each[0] <= end]:
            at, action = min(due, key=lambda each: each[0])
            self.waiting.remove((at, action))
            self.now = max(self.now, at)
            action()
        self.now = end


class Log:
    def __init__(self) -> None:
        self.time = Time()
        self.lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: self.lines.append(record.getMessage())  # type: ignore[method-assign]
        self.repetition = Repetition(handler.handle, clock=self.time)
        self.repetition._report_later = lambda: self.time.later(60.0, self.repetition.report)  # type: ignore[method-assign]
        handler.addFilter(self.repetition)
        self.logger = logging.Logger("fleet.test")  # noqa: LOG001 - one that no other test has
        self.logger.addHandler(handler)


@pytest.fixture
def log() -> Log:
    return Log()


def test_a_flood_is_a_few_lines_and_then_their_number(log: Log) -> None:
    for number in range(54_500):
        log.logger.warning("device %d sends nonsense", number)
    assert log.lines == [f"device {number} sends nonsense" for number in range(5)]
    log.time.advance(60.0)
    assert log.lines[5:] == ["device 5 sends nonsense … 54,495 more of this kind in the last 60 s."]


def test_kinds_differ_by_logger_level_and_template(log: Log) -> None:
    for _ in range(6):
        log.logger.warning("a %d", 1)
        log.logger.warning("b %d", 1)
        log.logger.error("a %d", 1)
    assert len(log.lines) == 15
    assert len(log.time.waiting) == 1
    log.time.advance(60.0)
    assert len(log.lines) == 18


def test_the_next_minute_begins_again(log: Log) -> None:
    for number in range(180):
        log.logger.warning("second %d", number)
        log.time.advance(1.0)
    log.repetition.report()
    assert sum("…" not in line for line in log.lines) >= 15
    held_back = [int(line.split(" … ")[1].split()[0]) for line in log.lines if "…" in line]
    assert sum(held_back) + sum("…" not in line for line in log.lines) == 180


def test_what_somebody_asked_to_see_passes(log: Log) -> None:
    for _ in range(10):
        log.logger.info("a session begins")
    assert len(log.lines) == 10


def test_kinds_without_end_take_no_memory_without_end_and_every_record_is_written_or_counted(log: Log) -> None:
    filler = "x" * 10_000
    for template in (f"kind {number} {filler}" for number in range(2000)):
        log.logger.warning(template)
    assert len(log.repetition._kinds) == 501
    assert len(log.lines) == 505
    log.time.advance(60.0)
    assert log.lines[505].endswith(" … 1,495 more of this kind in the last 60 s.")
    assert len(log.lines[505]) < 600


@pytest.mark.parametrize("message", [ValueError("no template"), "%d of %s"])
def test_a_message_that_is_no_template_or_cannot_be_written_breaks_nothing(log: Log, message: object) -> None:
    for _ in range(5):
        log.repetition.filter(logging.LogRecord("fleet.test", logging.WARNING, __file__, 0, message, None, None))
    log.logger.warning(message, "one argument")
    log.time.advance(60.0)
    assert "1 more" in log.lines[0]


def test_every_record_of_many_threads_is_written_or_counted(log: Log) -> None:
    def flood() -> None:
        for _ in range(2000):
            log.logger.warning("flood")

    threads = [threading.Thread(target=flood) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.time.advance(60.0)
    assert log.lines == ["flood"] * 5 + ["flood … 15,995 more of this kind in the last 60 s."]


def test_a_program_reports_the_rest_when_it_ends() -> None:
    program = (
        "import logging\n"
        "from fleet_common.logs import hold_back_repetition\n"
        "logging.basicConfig(format='%(levelname)s %(name)s %(message)s')\n"
        "hold_back_repetition()\n"
        "hold_back_repetition()\n"
        "for _ in range(1000): logging.getLogger('fleet').warning('flood')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=PATIENCE_S
    )
    assert done.stderr.splitlines() == ["WARNING fleet flood"] * 5 + [
        "WARNING fleet flood … 995 more of this kind in the last 1 s."
    ]


def test_an_event_is_one_line_of_json_whatever_it_says() -> None:
    out = io.StringIO()
    EventStream(out).write(Event.TOKENS, number=2, text="first line\nsecond, è")
    assert out.getvalue().count("\n") == 1
    assert json.loads(out.getvalue()) == {"event": "tokens", "number": 2, "text": "first line\nsecond, è"}


def test_an_error_is_told_sentence_by_sentence_and_passed_on() -> None:
    out = io.StringIO()
    with pytest.raises(FleetError), EventStream(out).reporting_errors():
        raise FleetError("The first cannot work.\nNor can the second.")
    assert [(event["event"], event["sentence"]) for event in read_events(out.getvalue().splitlines())] == [
        ("error", "The first cannot work."),
        ("error", "Nor can the second."),
    ]


def test_a_service_goes_on_when_its_reader_has_gone_and_a_command_does_not() -> None:
    for outlives_reader in (True, False):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w") as stream:  # noqa: PTH123 - a file descriptor
            events = EventStream(stream, outlives_reader=outlives_reader)
            if outlives_reader:
                events.write(Event.ONLINE)
                events.write(Event.STOPPED)
                assert not events
            else:
                with pytest.raises(BrokenPipeError):
                    events.write(Event.ONLINE)
                os.dup2(os.open(os.devnull, os.O_WRONLY), writer)


def test_a_reader_passes_over_what_is_no_event() -> None:
    lines = ["", "Traceback", "[1]", '{"other": 1}', '{"event": 5}', '{"event": "new", "x": 1}', '{"event": "online"}']
    assert [event["event"] for event in read_events(lines)] == ["new", "online"]
