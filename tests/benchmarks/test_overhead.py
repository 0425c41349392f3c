import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.overhead import command
from benchmarks.overhead.measures import Answers, Saturation
from benchmarks.overhead.played import PlayedSession, play
from benchmarks.overhead.report import Share, goals_of, lines_of, rows_of
from benchmarks.shared.sampler import StackSampler, part_of
from dssd.sampling import coupled_token
from schemas.codec import decode_close, decode_draft, decode_open
from schemas.policy import Mode
from tests.support.brokers import require_mosquitto
from tests.support.scripted_language import LANGUAGE

TOKENS = 24


@pytest.fixture(scope="module")
def played() -> dict[Mode, list[PlayedSession]]:
    return {mode: play(2, mode=mode, tokens=TOKENS) for mode in Mode}


@pytest.mark.parametrize("mode", list(Mode))
def test_a_played_session_is_what_a_device_has_sent(played: dict[Mode, list[PlayedSession]], mode: Mode) -> None:
    one, two = played[mode]
    assert decode_open(one.open).policy.seed + 1 == decode_open(two.open).policy.seed
    drafts = [decode_draft(one.draft(number, 7)) for number in range(len(one.drafts))]
    assert {draft.handle for draft in drafts} == {7}
    assert [draft.round for draft in drafts] == [round_ for round_, _ in one.verdicts]
    assert all(draft.counts is None for draft in drafts) == (mode is Mode.COUPLED)
    assert any(accepted < len(draft.tokens) for draft, (_, accepted) in zip(drafts, one.verdicts, strict=True))
    assert one.verdict(0, 7)[:1] == b"\x07"
    name = bytes(range(8))
    assert decode_open(one.opening(name)).session == decode_close(one.closing(name, 9, "edge-2")).session == name
    assert decode_close(one.closing(name, 9, "edge-2")).tokens == TOKENS


def test_a_part_is_that_of_the_innermost_function_that_has_one() -> None:
    def stack(*functions: tuple[str, str]) -> Iterator[tuple[str, str]]:
        return iter(functions)

    assert part_of(stack(("numpy", "cumsum"), ("dssd.sampling", "draw"), ("fleet_edge.orchestrator", "step")), "x") == (
        "judging"
    )
    decoding = (("schemas.cbor", "load"), ("schemas.codec", "_array"), ("schemas.codec", "decode_draft"))
    assert part_of(stack(*decoding, ("fleet_edge.intake", "on_message")), "link-edge-1") == "decode"
    sending = (("fleet_link.paho_link", "publish"), ("fleet_edge.answers.publisher", "verdict"))
    assert part_of(stack(*sending), "MainThread") == "publish"
    assert part_of(stack(("paho.mqtt.client", "loop"), ("fleet_link.connection", "step")), "link-edge-1") == "link"
    assert part_of(stack(("threading", "run")), "x") == "other"


def test_processor_time_is_laid_to_the_thread_that_takes_it() -> None:
    sampler = StackSampler()
    ended = threading.Event()
    language = LANGUAGE

    def work() -> None:
        while not ended.is_set():
            coupled_token(_dist, 1, 2)

    from dssd.distribution import shape  # noqa: PLC0415
    from schemas.policy import SamplingPolicy  # noqa: PLC0415

    _dist = shape(language.logits((1,)), SamplingPolicy(seed=1))
    busy, idle = threading.Thread(target=work), threading.Thread(target=ended.wait)
    sampler.start()
    busy.start()
    idle.start()
    before = time.process_time()
    while time.process_time() - before < 0.3:
        time.sleep(0.01)
    ended.set()
    busy.join()
    idle.join()
    parts = sampler.stop()
    assert parts["judging"] > 0.5 * sum(parts.values())


def answers(echo_ms: float, verdict_ms: float) -> list[Answers]:
    return [
        Answers.from_times("echo", [echo_ms / 1e3] * 10),
        Answers.from_times("coupled", [verdict_ms / 1e3] * 10),
    ]


def saturation(verdicts: int, *, edge: float = 0.97) -> Saturation:
    return Saturation("coupled", 64, 2.0, verdicts, 9.0, 20.0, edge, 0.1, 0.2, 0)


def share(engine_s: float, link_s: float) -> Share:
    ended = {"steps": [[0.0, 1.0, 16], [1.0, 2.0, 0], [2.0, 3.0, 14]], "parts": {"engine": engine_s, "link": link_s}}
    return Share.of("target-Q8_0, coupled", 16, ended)


def test_goals_are_ratios_of_one_run() -> None:
    good = goals_of(answers(0.6, 1.5), [saturation(4000)], [share(9.0, 1.0)])
    assert [(goal.value, goal.reached) for goal in good] == [
        (pytest.approx(2.5), True),
        (2000.0, True),
        (pytest.approx(0.1), True),
    ]
    bad = goals_of(answers(0.6, 1.6), [saturation(3999)], [share(8.0, 1.0)])
    assert not any(goal.reached for goal in bad)


def test_a_verdicts_processor_time_is_told_by_part_and_by_who_limits() -> None:
    assert saturation(4000).cpu_us == pytest.approx(0.97 * 2.0 / 4000 * 1e6)
    assert saturation(4000).limit == "the edge's core"
    assert "busy" in saturation(4000, edge=0.5).limit
    found = share(9.0, 3.0)
    assert (found.verdicts, found.steps, found.parts["link"]) == (30, 2, pytest.approx(1e5))
    assert any("link 100000" in line for line in lines_of(answers(1, 2), [saturation(10)], [found]))
    assert [row["system"] for row in rows_of(answers(1, 2), [saturation(10)], [found])] == [
        "echo", "ours-coupled", "ours-coupled", "ours-coupled"
    ]  # fmt: skip


@pytest.mark.broker
def test_an_edge_without_a_model_is_measured_through_a_real_broker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, played: dict[Mode, list[PlayedSession]]
) -> None:
    require_mosquitto()
    monkeypatch.setattr(command, "play", lambda _count, *, mode, tokens: tokens and played[mode])
    report = tmp_path / "overhead.json"
    arguments = ["--no-model", "--answers", "100", "--devices", "4", "--seconds", "0.5", "--json", str(report)]
    assert command.main(arguments) in {0, 1}  # by how fast the machine is
    found = json.loads(report.read_text())
    assert [each["of"] for each in found["answers"]] == ["echo", "residual", "coupled"]
    for load in found["saturation"]:
        assert load["verdicts"] > 0
        assert load["wrong"] == 0
    for each in found["shares"]:
        assert each["verdicts"] > 0
        assert each["wrong"] == 0
        assert {"link", "decode", "judging", "encode", "scheduler"} & set(each["parts_us"])
