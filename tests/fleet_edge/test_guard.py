from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from fleet_edge import guard, limits
from fleet_edge.errors import DraftFault, OpenRefused
from fleet_edge.guard import MAX_TOP_K, DeviceGuard, KeptStandings, OverQuota, QuarantineBegun
from fleet_edge.limits import QuarantineSettings, QuotaSettings
from schemas.policy import SamplingPolicy
from schemas.reasons import Action, FaultCode, RefusalCode
from schemas.topics import Topic, build
from tests.support.drafts import open_message
from tests.support.memory_fleet import Clock


def topic(kind: Topic, *, device: str = "device-1") -> bytes:
    return build(kind, fleet="fleet", device=device, edge="edge-1" if kind is Topic.DRAFT else None).encode()


class Scene:
    def __init__(self, quotas: Mapping[str, object] | None = None, **quarantine: float) -> None:
        self.clock = Clock()
        self.guard = DeviceGuard(
            QuotaSettings.model_validate(quotas or {}), QuarantineSettings(**quarantine), clock=self.clock
        )

    def send(self, kind: Topic, number: int = 1, *, device: str = "device-1", size: int = 60) -> int:
        name = topic(kind, device=device)
        return sum(self.guard.accepts(name, size, retained=False) for _ in range(number))

    def shut_out(self, device: str = "device-1") -> float:
        self.send(Topic.DRAFT, 10_000, device=device)
        (begun,) = [each for each in self.guard.take_notices() if isinstance(each, QuarantineBegun)]
        assert begun.device == device
        return begun.for_s


def test_what_is_over_a_rate_is_dropped_told_once_and_counted_in_one_figure() -> None:
    scene = Scene({"drafts_per_s": 10}, strikes=1e6)
    assert scene.send(Topic.DRAFT, 500) == 20
    assert scene.guard.take_notices() == [OverQuota("device-1", Topic.DRAFT, pytest.approx(0.1))]
    assert scene.guard.take_dropped() == {"device-1": 480}
    assert scene.guard.take_dropped() == {}
    scene.clock.seconds += 1.0
    assert scene.send(Topic.DRAFT, 500) == 10


@pytest.mark.parametrize("kind", [Topic.DRAFT, Topic.OPEN, Topic.CLOSE, Topic.STATE])
def test_one_devices_flood_takes_nothing_of_anothers(kind: Topic) -> None:
    scene = Scene()
    scene.send(kind, 20_000)
    assert scene.send(kind, 5, device="device-2") == 5


def test_bytes_are_bounded_whatever_they_come_in() -> None:
    scene = Scene({"uplink_bytes_per_s": 1000}, strikes=1e6)
    assert scene.send(Topic.OPEN, 30, size=1 << 20) == 1, "one larger than the burst goes through, and leaves a debt"
    assert scene.send(Topic.CLOSE) == 0
    scene.clock.seconds += 1200
    assert scene.send(Topic.CLOSE) == 1


@pytest.mark.parametrize(
    "name",
    [b"dssd/v1/fleet/_edge/edge-1/state", b"nonsense", b"\xff\xfe", b"dssd/v1/fleet/device-1/down/verdict", b""],
)
def test_what_is_on_no_devices_topic_is_others_to_judge(name: bytes) -> None:
    scene = Scene()
    assert all(scene.guard.accepts(name, 60, retained=False) for _ in range(10_000))


def test_strikes_shut_out_and_the_time_doubles() -> None:
    scene = Scene()
    assert scene.shut_out() == 10
    assert scene.send(Topic.DRAFT, 100) == 0
    assert scene.send(Topic.STATE, 100) == 0
    assert scene.send(Topic.DRAFT, 5, device="device-2") == 5
    scene.clock.seconds += 10
    assert scene.send(Topic.DRAFT, 5) == 5
    assert scene.shut_out() == 20


def test_who_is_shut_out_is_told_so_on_an_open_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_FIRST_S", 1000.0)
    scene = Scene()
    scene.shut_out()
    scene.clock.seconds += 10
    assert scene.send(Topic.OPEN, 3000) == 1
    with pytest.raises(OpenRefused) as refused:
        scene.guard.admit_open("device-1", open_message())
    assert refused.value.code is RefusalCode.QUARANTINED
    assert refused.value.retry_s == pytest.approx(990)
    scene.clock.seconds += 10
    assert scene.send(Topic.OPEN, 3000) == 1


def test_malformed_messages_shut_out_sooner_than_unknown_sessions_and_the_edges_own_faults_never() -> None:
    needed = {}
    for code in (FaultCode.MALFORMED, FaultCode.UNKNOWN_SESSION, FaultCode.INTERNAL):
        scene = Scene()
        needed[code] = 0
        while not scene.guard.take_notices() and needed[code] < 5000:
            scene.guard.strike("device-1", code)
            needed[code] += 1
    assert needed[FaultCode.MALFORMED] < needed[FaultCode.UNKNOWN_SESSION] < needed[FaultCode.INTERNAL] == 5000


def test_a_device_behind_a_bad_line_is_never_shut_out() -> None:
    """Eight sessions with four drafts in flight, all repeated at every reconnect to an edge that restarts.

    The line breaks every second for an hour, and the edge restarts every ten seconds: worse than any usable line.
    """
    scene = Scene()
    for second in range(3600):
        scene.clock.seconds += 1.0
        scene.send(Topic.STATE, 2)  # the last will, and the state of who is back
        assert scene.send(Topic.DRAFT, 32) == 32
        if second % 10 == 0:
            for _ in range(32):
                scene.guard.strike("device-1", FaultCode.UNKNOWN_SESSION)
            for _ in range(8):
                scene.guard.strike("device-1", FaultCode.TOKENS_DIFFER)
    assert [each for each in scene.guard.take_notices() if isinstance(each, QuarantineBegun)] == []


def test_opens_over_the_quota_are_refused_with_a_time_and_granted_after_it() -> None:
    scene = Scene({"opens_per_min": 60})
    for _ in range(45):
        scene.guard.admit_open("device-1", open_message())
    with pytest.raises(OpenRefused) as refused:
        scene.guard.admit_open("device-1", open_message())
    assert refused.value.code is RefusalCode.QUOTA
    assert refused.value.retry_s is not None
    scene.clock.seconds += refused.value.retry_s
    scene.guard.admit_open("device-1", open_message())
    scene.guard.admit_open("device-2", open_message())


def test_the_time_of_prompts_is_bounded_and_what_was_not_computed_costs_nothing() -> None:
    scene = Scene({"prompt_s_per_min": 10})
    for _ in range(2):
        scene.guard.admit_open("device-1", open_message(prompt=(1,) * 4000))
    scene.guard.spend_prompts("device-1", 43.0)
    with pytest.raises(OpenRefused) as refused:
        scene.guard.admit_open("device-1", open_message(prompt=(1,)))
    assert refused.value.retry_s == pytest.approx(33.0 * 6)
    scene.guard.admit_open("device-2", open_message())


def test_by_default_one_device_may_use_all_of_an_edge() -> None:
    scene = Scene({"opens_per_min": 1e6})
    for _ in range(100):  # 4,000 tokens each, one after the other, with a 7B target on two cores
        scene.guard.admit_open("device-1", open_message(prompt=(1,) * 4000))
        scene.clock.seconds += 43.0
        scene.guard.spend_prompts("device-1", 43.0)


def test_a_refused_open_has_spent_nothing_of_the_other_quotas() -> None:
    scene = Scene({"opens_per_min": 60, "prompt_s_per_min": 1})
    scene.guard.spend_prompts("device-1", 1.5)
    for _ in range(100):
        with pytest.raises(OpenRefused, match="prompts may take"):
            scene.guard.admit_open("device-1", open_message(prompt=(1,) * 90))
    scene.clock.seconds += 30.0
    scene.guard.admit_open("device-1", open_message())


@pytest.mark.parametrize(("top_k", "allowed"), [(0, True), (MAX_TOP_K, True), (MAX_TOP_K + 1, False)])
def test_top_k_is_bounded_and_the_whole_vocabulary_is_not_meant(top_k: int, allowed: bool) -> None:
    scene = Scene()
    message = open_message(policy=SamplingPolicy(top_k=top_k, seed=1))
    if allowed:
        scene.guard.admit_open("device-1", message)
    else:
        with pytest.raises(OpenRefused, match=f"{MAX_TOP_K}"):
            scene.guard.admit_open("device-1", message)


def test_who_has_written_its_tokens_waits() -> None:
    scene = Scene({"new_tokens_per_min": 60})
    scene.guard.admit_draft("device-1")
    scene.guard.spend("device-1", 64)
    with pytest.raises(DraftFault) as fault:
        scene.guard.admit_draft("device-1")
    assert (fault.value.code, fault.value.action) == (FaultCode.QUOTA, Action.WAIT)
    assert fault.value.retry_s == pytest.approx(5.0)
    scene.clock.seconds += 5.0
    scene.guard.admit_draft("device-1")


def test_answers_and_repeats_of_one_device_are_bounded() -> None:
    scene = Scene({"uplink_bytes_per_s": 1000})
    assert sum(scene.guard.may_answer("device-1") for _ in range(1000)) == 64
    assert sum(scene.guard.may_repeat("device-1", 100) for _ in range(1000)) == 160
    assert scene.guard.may_answer("device-2")
    scene.clock.seconds += 1.0
    assert sum(scene.guard.may_answer("device-1") for _ in range(1000)) == 2


def test_others_quarantines_hold_beside_our_own_until_both_are_over() -> None:
    scene = Scene()
    scene.shut_out()
    assert scene.guard.quarantined_by_others({"device-1": 5.0, "device-2": float("inf")}) == {"device-2"}
    scene.clock.seconds += 6.0
    assert (scene.send(Topic.DRAFT), scene.send(Topic.DRAFT, device="device-2")) == (0, 0)
    assert scene.guard.quarantined_by_others({}) == set()
    assert (scene.send(Topic.DRAFT), scene.send(Topic.DRAFT, device="device-2")) == (0, 1)
    scene.guard.lift("device-1")
    assert scene.send(Topic.DRAFT) == 1


def test_names_without_end_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_MAX_STANDINGS", 1000)
    scene = Scene()
    scene.shut_out("hostile")
    for number in range(2500):
        scene.send(Topic.DRAFT, device=f"name-{number}")
    assert len(scene.guard._standings) <= 1000
    assert scene.send(Topic.DRAFT, device="hostile") == 0, "room is not made by letting in who is shut out"


@given(
    st.lists(
        st.tuples(st.sampled_from([Topic.DRAFT, Topic.OPEN, Topic.CLOSE, Topic.STATE]), st.floats(0.0, 2.0)),
        max_size=40,
    )
)
def test_a_device_that_keeps_within_its_quotas_is_never_refused(messages: list[tuple[Topic, float]]) -> None:
    scene, hostile = Scene(), 0
    for kind, pause in messages:
        scene.clock.seconds += pause + 2.0
        hostile += scene.send(kind, 50, device="hostile")
        assert scene.send(kind) == 1


def test_grammars_have_a_quota_of_the_time_that_they_take_to_compile() -> None:
    scene = Scene()
    scene.guard.admit_grammar("device-1")
    scene.guard.spend_grammar("device-1", 15.0)
    with pytest.raises(OpenRefused) as refused:
        scene.guard.admit_grammar("device-1")
    assert refused.value.code is RefusalCode.QUOTA
    assert refused.value.retry_s == pytest.approx(30.0)
    scene.guard.admit_grammar("device-2")
    scene.clock.seconds += 31.0
    scene.guard.admit_grammar("device-1")


def test_the_second_deadly_grammar_in_a_row_shuts_its_device_out() -> None:
    scene = Scene()
    scene.guard.strike_grammar("device-1")
    assert scene.guard.take_notices() == []
    scene.guard.strike_grammar("device-1")
    (begun,) = scene.guard.take_notices()
    assert isinstance(begun, QuarantineBegun)


NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


class Edge:
    """One edge, restarted; its monotonic clock begins at another time in each run."""

    def __init__(self, folder: Path) -> None:
        self.path, self.wall, self.runs = folder / "standings.json", NOON, 0
        self.start()

    def start(self) -> None:
        self.runs += 1
        self.clock = Clock()
        self.clock.seconds = 1000.0 * self.runs
        self.guard = DeviceGuard(QuotaSettings(), QuarantineSettings(), clock=self.clock)
        self.kept = KeptStandings(self.guard, self.path, lambda: self.wall)
        self.kept.read()

    def restart(self, after_s: float = 0.0) -> None:
        self.kept.write()
        self.wall += timedelta(seconds=after_s)
        self.start()

    def opens(self) -> int:
        for number in range(100):
            try:
                self.guard.admit_open("device-1", open_message())
            except OpenRefused:
                return number
        raise AssertionError("nothing bounds it")


@pytest.fixture
def edge(tmp_path: Path) -> Edge:
    return Edge(tmp_path)


def test_quotas_are_as_used_as_they_were_and_fill_meanwhile(edge: Edge) -> None:
    whole = edge.opens()
    edge.restart()
    assert edge.opens() == 0
    edge.restart(after_s=30.0)
    assert 0 < edge.opens() < whole
    edge.restart(after_s=3600.0)
    assert edge.opens() == whole


def test_strikes_count_on_and_the_next_quarantine_is_as_long_as_without_a_restart(edge: Edge) -> None:
    lengths = []
    for _ in range(3):
        edge.guard.strike_grammar("device-1")
        edge.restart(after_s=0.5)
        edge.guard.strike_grammar("device-1")
        (begun,) = edge.guard.take_notices()
        assert isinstance(begun, QuarantineBegun)
        lengths.append(begun.for_s)
        edge.restart(after_s=begun.for_s)
    assert lengths == [10.0, 20.0, 40.0]
    edge.restart(after_s=1000.0)
    while not (notices := edge.guard.take_notices()):
        edge.guard.strike("device-1", FaultCode.TOKEN)
    assert isinstance(notices[0], QuarantineBegun)
    assert notices[0].for_s == 10.0


def test_devices_that_have_used_nothing_are_not_kept(edge: Edge) -> None:
    for number in range(50):
        edge.guard.accepts(f"dssd/v1/fleet/device-{number}/up/state".encode(), 60, retained=False)
    edge.guard.strike("device-7", FaultCode.MALFORMED)
    assert list(edge.guard.kept(10)) == ["device-7"]


def test_of_too_many_those_with_strikes_are_kept(edge: Edge) -> None:
    for number in range(20):
        edge.guard.admit_open(f"device-{number}", open_message())
    edge.guard.strike("device-3", FaultCode.MALFORMED)
    assert "device-3" in edge.guard.kept(4)
    assert len(edge.guard.kept(4)) == 4


_WITHOUT_ZONE = b'{"at": "2026-11-29T12:00:00", "devices": {}}'


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"at": "now", "devices": {}}', _WITHOUT_ZONE, b"\xff"])
def test_a_damaged_file_is_as_none(edge: Edge, content: bytes) -> None:
    edge.path.write_bytes(content)
    edge.start()
    assert edge.opens() > 0


def test_a_clock_that_was_set_back_lengthens_nothing(edge: Edge) -> None:
    edge.opens()
    edge.restart(after_s=-86_400.0)
    edge.clock.seconds += 3600.0
    assert edge.opens() > 0


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(edge: Edge) -> None:
    KeptStandings(edge.guard, Path("/nowhere/at/all.json"), lambda: NOON).write()
