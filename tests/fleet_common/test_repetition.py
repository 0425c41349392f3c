import logging
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from fleet_common.repetition import Repetition


class Time:
    """A clock, and what waits for it."""

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
    """A logger of its own with the filter on its handler; `lines` is what was written."""

    def __init__(self, name: str = "fleet.test", **settings: int) -> None:
        self.time = Time()
        self.lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: self.lines.append(record.getMessage())  # type: ignore[method-assign]
        self.repetition = Repetition(handler.handle, clock=self.time, later=self.time.later, **settings)
        handler.addFilter(self.repetition)
        self.logger = logging.Logger(name)  # noqa: LOG001 - one that no other test has
        self.logger.addHandler(handler)


def test_a_flood_is_a_few_lines_and_one_that_tells_how_many_there_were() -> None:
    log = Log(at_most=3)
    for number in range(54_498):
        log.logger.warning("device %d sends nonsense", number)
    assert log.lines == [f"device {number} sends nonsense" for number in range(3)]
    log.time.advance(60.0)
    assert log.lines[3:] == ["device 3 sends nonsense … 54,495 times more in the last minute, of this kind."]


def test_what_is_rare_is_written_as_it_comes() -> None:
    log = Log(at_most=3)
    for number in range(30):
        log.logger.warning("line %d", number)
        log.time.advance(25.0)
    assert log.lines == [f"line {number}" for number in range(30)]
    assert not log.time.waiting


def test_kinds_are_told_apart_by_logger_level_and_template() -> None:
    log = Log(at_most=1)
    for _ in range(2):
        log.logger.warning("a %d", 1)
        log.logger.warning("b %d", 1)
        log.logger.error("a %d", 1)
    assert log.lines == ["a 1", "b 1", "a 1"]
    log.time.advance(60.0)
    assert len(log.lines) == 6


def test_the_next_minute_begins_anew() -> None:
    log = Log(at_most=1)
    for number in range(180):
        log.logger.warning("second %d", number)
        log.time.advance(1.0)
    shown = [line for line in log.lines if "…" not in line]
    told = [line for line in log.lines if "…" in line]
    assert shown == ["second 0", "second 60", "second 120"]
    assert [line.split(" … ")[1] for line in told] == ["59 times more in the last minute, of this kind."] * 3
    assert [line.split(" … ")[0] for line in told] == ["second 1", "second 61", "second 121"]


def test_what_was_held_back_is_told_although_nothing_more_is_logged_and_by_one_timer() -> None:
    log = Log(at_most=1)
    for template in ("a", "b"):
        for _ in range(3):
            log.logger.warning(template)
        assert len(log.time.waiting) == 1
        log.time.advance(10.0)
    log.time.advance(600.0)
    assert log.lines == [
        "a",
        "b",
        "a … 2 times more in the last minute, of this kind.",
        "b … 2 times more in the last minute, of this kind.",
    ]
    assert not log.time.waiting


def test_nothing_is_lost_at_the_end() -> None:
    log = Log(at_most=1)
    log.logger.warning("a")
    log.logger.warning("a")
    log.time.advance(7.0)
    log.repetition.tell(all_of_it=True)
    log.repetition.tell(all_of_it=True)
    assert log.lines == ["a", "a … once more in the last 7 s, of this kind."]


def test_what_somebody_asked_to_see_passes() -> None:
    log = Log(at_most=1)
    for _ in range(10):
        log.logger.info("a session begins")
    assert len(log.lines) == 10


def test_kinds_without_end_take_no_memory_without_end_and_every_record_is_written_or_counted() -> None:
    log, filler = Log(at_most=1, kinds=10), "x" * 10_000
    for template in (f"kind {number} {filler}" for number in range(1000)):
        log.logger.warning(template)
    assert len(log.repetition._kinds) <= 11
    # Ten of kinds of their own, one of those that share one.
    assert len(log.lines) == 11
    log.time.advance(60.0)
    assert log.lines[11].endswith(" … 989 times more in the last minute, of this kind.")
    assert len(log.lines[11]) < 600
    log.logger.warning("kind 2000")
    assert log.lines[-1] == "kind 2000"


@pytest.mark.parametrize("message", [ValueError("no template"), "%d of %s"])
def test_a_message_that_is_no_template_or_cannot_be_written_breaks_nothing(message: object) -> None:
    log = Log(at_most=0)
    log.logger.warning(message, "one argument")
    log.time.advance(60.0)
    assert "once more in the last minute" in log.lines[0]


def test_every_record_of_many_threads_is_written_or_counted() -> None:
    log = Log(at_most=5)

    def flood() -> None:
        for _ in range(2000):
            log.logger.warning("flood")

    threads = [threading.Thread(target=flood) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.time.advance(60.0)
    assert log.lines == ["flood"] * 5 + ["flood … 15,995 times more in the last minute, of this kind."]


def test_a_program_tells_the_rest_when_it_ends() -> None:
    program = (
        "import logging\n"
        "from fleet_common.repetition import hold_back_repetition\n"
        "logging.basicConfig(format='%(levelname)s %(name)s %(message)s')\n"
        "hold_back_repetition()\n"
        "hold_back_repetition()\n"
        "for _ in range(1000): logging.getLogger('fleet').warning('flood')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr.splitlines() == ["WARNING fleet flood"] * 5 + [
        "WARNING fleet flood … 995 times more in the last 1 s, of this kind."
    ]
