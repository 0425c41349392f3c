import io
import json
import os

import pytest

from fleet_common.events import Event, EventStream, read_events, wait_for_event
from schemas.errors import FleetError


def test_an_event_is_one_line_of_json_whatever_it_says() -> None:
    out = io.StringIO()
    EventStream(out).write(Event.TOKENS, number=2, text="first line\nsecond, è")
    assert out.getvalue().count("\n") == 1
    assert json.loads(out.getvalue()) == {"event": "tokens", "number": 2, "text": "first line\nsecond, è"}


def test_without_a_stream_nothing_is_written() -> None:
    events = EventStream(None)
    events.write(Event.ONLINE)
    assert not events


def test_an_error_is_told_sentence_by_sentence_and_passed_on() -> None:
    out = io.StringIO()
    with pytest.raises(FleetError), EventStream(out).telling_errors():
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
    assert wait_for_event(lines, Event.ONLINE) == {"event": "online"}
    assert wait_for_event(lines, Event.STOPPED) is None
