"""Commands: one at a time, once each, bounded in time and size."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fleet_device.steering import commands
from fleet_device.steering.commands import Answer, CommandAction, Commands, in_parts
from schemas.steering import MAX_PARTS, MAX_RESULT, CommandOutcome, CommandRequest, CommandResponse

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Bench:
    """Commands whose threads and timers a test turns by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **known: Callable[..., Answer]) -> None:
        self.sent: list[CommandResponse] = []
        self.threads: list[Callable[[], None]] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []
        table = {name: CommandAction(run, {"lines": (1, 10)}) for name, run in known.items()}
        monkeypatch.setattr("fleet_device.steering.commands.ACTIONS", table)
        device: Any = object()
        self.commands = Commands(
            device, self.sent.append, now=lambda: NOW, start=self.threads.append, after=self._after
        )

    def _after(self, seconds: float, work: Callable[[], None]) -> Callable[[], None]:
        timer = (seconds, work)
        self.timers.append(timer)
        return lambda: self.timers.remove(timer)

    def take(self, number: int = 1, command: str = "run", *, left_s: float = 10.0, **arguments: Any) -> None:
        deadline = NOW + timedelta(seconds=left_s)
        self.commands.take(
            CommandRequest(id=f"{number:016x}", command=command, deadline=deadline, who="bob", arguments=arguments)
        )


def well(*_: Any) -> Answer:
    return Answer(CommandOutcome.OK, "Done.", "result")


def test_a_command_is_run_once_however_often_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    bench = Bench(monkeypatch, run=lambda *given: ran.append(given) or well())
    bench.take()
    bench.take()  # while it runs
    [thread] = bench.threads
    assert bench.sent == []
    thread()
    bench.take()  # when it has ended
    assert len(ran) == len(bench.threads) == 1
    assert [each.result for each in bench.sent] == ["result", "result"]
    assert bench.timers == []


def test_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, run=well)
    bench.take(1)
    bench.take(2)
    assert [(each.outcome.value, each.sentence) for each in bench.sent] == [
        ("refused", "The command run is still running; ask again later.")
    ]
    bench.threads.pop()()
    bench.take(3)
    bench.threads.pop()()
    assert bench.sent[-1].outcome is CommandOutcome.OK


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"left_s": -30.0}, "30 s too late by this device's clock, 2026-01-01 00:00:00 UTC"),
        ({"left_s": 0.0}, "too late"),
        ({"command": "format-disk"}, "knows no command 'format-disk'; it knows run."),
        ({"lines": 11}, "must be a whole number from 1 to 10"),
        ({"lines": True}, "must be a whole number"),
        ({"lines": "5"}, "must be a whole number"),
        ({"rows": 5}, "takes no argument 'rows'; it takes lines."),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], sentence: str
) -> None:
    bench = Bench(monkeypatch, run=well)
    bench.take(**given)
    assert bench.threads == []
    assert bench.sent[0].outcome is CommandOutcome.REFUSED
    assert sentence in bench.sent[0].sentence


def test_a_command_that_takes_too_long_is_answered_and_blocks_others_until_it_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(monkeypatch, run=well)
    bench.take(1, left_s=4.0)
    [(seconds, late)] = bench.timers
    assert seconds == 4.0
    late()
    assert [each.outcome.value for each in bench.sent] == ["failed"]
    bench.take(2)
    assert bench.sent[-1].outcome is CommandOutcome.REFUSED
    bench.threads.pop()()
    assert len(bench.sent) == 2, "its own answer comes too late"
    bench.take(3)
    assert len(bench.threads) == 1


def test_no_command_is_given_longer_than_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, run=well)
    bench.take(left_s=1e9)
    assert bench.timers[0][0] == 600.0


def test_a_command_that_fails_unexpectedly_is_told_and_the_next_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Answer:
        raise KeyError("secret")

    bench = Bench(monkeypatch, run=fail)
    bench.take(1)
    bench.threads.pop()()
    assert (bench.sent[0].outcome, "secret" in bench.sent[0].sentence) == (CommandOutcome.FAILED, False)
    bench.take(2)
    assert len(bench.threads) == 1


def test_what_follows_an_answer_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    bench = Bench(monkeypatch, run=lambda *_: Answer(CommandOutcome.OK, "Well.", then=lambda: order.append("then")))
    monkeypatch.setattr(bench.commands, "_send", lambda _response: order.append("answer"))
    bench.take()
    bench.threads.pop()()
    assert order == ["answer", "then"]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, run=lambda *_: Answer(CommandOutcome.OK, "Long.", "x" * (3 * MAX_RESULT)))
    for number in range(200):
        bench.take(number)
        bench.threads.pop()()
    kept = bench.commands._answered
    assert len(kept) == 64
    assert sum(len(each.result or "") for said in kept.values() for each in said) <= 2 * 3 * MAX_RESULT
    bench.sent.clear()
    bench.take(150)
    assert [(each.sentence, each.result, each.parts) for each in bench.sent] == [("Long.", None, 1)]


def test_a_long_result_comes_in_parts_and_the_longest_is_cut() -> None:
    text = "".join(chr(97 + number % 26) for number in range(2 * MAX_RESULT + 5))
    parts = in_parts("0" * 16, Answer(CommandOutcome.OK, "s" * 900, text))
    assert [(each.part, each.parts) for each in parts] == [(0, 3), (1, 3), (2, 3)]
    assert "".join(each.result or "" for each in parts) == text
    assert len(parts[0].sentence) == 500
    cut = in_parts("0" * 16, Answer(CommandOutcome.OK, "", "y" * (MAX_RESULT * MAX_PARTS * 2)))
    assert len(cut) == MAX_PARTS
    assert (cut[-1].result or "").endswith("did not fit)")
    [empty] = in_parts("0" * 16, Answer(CommandOutcome.OK, "", ""))
    assert empty.result == ""


def test_every_command_is_on_the_page() -> None:
    page = (Path(__file__).parents[3] / "docs" / "steering.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in commands.ACTIONS)
