"""The log as JSON: one object a line, whatever a record holds, and no field that nobody has asked for."""

import json
import logging
import sys
from collections.abc import Iterator

import pytest

from fleet_common.json_log import JsonFormatter, write_log_as


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
    """Return a stream handler on the root logger, as the command line puts one there."""
    logger, handler = logging.getLogger(), logging.StreamHandler(sys.stderr)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_as_json_what_is_below_a_warning_is_told_too(
    root: logging.StreamHandler[object], capsys: pytest.CaptureFixture[str]
) -> None:
    root.setStream(sys.stderr)
    write_log_as("plain", device="gateway-1")
    logging.getLogger("x").info("Unheard.")
    write_log_as("json", device="gateway-1")
    logging.getLogger("x").info("Heard.")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "Heard."
    assert json.loads(line)["device"] == "gateway-1"
