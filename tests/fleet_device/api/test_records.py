import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fleet_device.api.problems import ApiProblem
from fleet_device.api.records import KEEP_S, MAX_BYTES, MAX_RECORDS, RecordHeader, Records, StreamRecord
from fleet_device.api.replies import ALIVE
from fleet_device.errors import SessionFailed, TextCancelled
from fleet_device.requests.generate import GeneratedText, GenerateRequest, Piece
from fleet_device.requests.queue import Delayed, Failed
from fleet_device.session.sequence import CommittedTokens, TokenOrigin
from schemas.fields import TokenLogprobs
from schemas.policy import SamplingPolicy
from schemas.reasons import EndReason
from tests.support.memory_device import TalkingCodec

PATH = "/v1/completions"


class Words:
    """Shapes of a stream: a word for each event."""

    def first(self) -> list[bytes]:
        return [b"data: first\n\n"]

    def piece(self, piece: Piece) -> list[bytes]:
        return [f"data: {word}\n\n".encode() for word in piece.text.split()]

    def last(self, _text: GeneratedText) -> list[bytes]:
        raise AssertionError("not used")

    def failed(self, error: Exception) -> bytes:
        return f"data: failed {error}\n\n".encode()


@dataclass
class Place:
    """A folder with records, on a clock that a test sets."""

    folder: Path | None
    now: float = 100.0
    boot: str = "boot-1"
    waiting: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    records: Records = field(init=False)
    made: list[Records] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.records = self.restarted()

    def restarted(self) -> Records:
        self.made.append(
            Records(self.folder, lambda: self.now, lambda *each: self.waiting.append(each), boot=self.boot)
        )
        return self.made[-1]

    def close(self) -> None:
        for records in self.made:
            for record in list(records._records.values()):
                records.remove_file(record)

    def begin(self, name: str = "cmpl-1", application: str | None = None) -> StreamRecord:
        return self.records.begin(header(name, application), Words())

    def names(self) -> list[str]:
        return [] if self.folder is None else sorted(path.stem for path in self.folder.glob("*.jsonl"))


def header(name: str = "cmpl-1", application: str | None = None) -> RecordHeader:
    return RecordHeader(name=name, path=PATH, application=application, created=1, model="toy", body="{}")


@pytest.fixture(params=["disk", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path / "streams" if request.param == "disk" else None)
    yield place
    place.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path / "streams")
    yield place
    place.close()


def read(record: StreamRecord, after: int = -1, *, beats: int = 0) -> list[bytes]:
    """Read a record to its end, or for some heartbeats."""
    left = [beats]

    async def pause(_seconds: float) -> None:
        if not left[0]:
            await asyncio.Event().wait()
        left[0] -= 1

    async def run() -> list[bytes]:
        found = []
        async for each in record.read(after, pause):
            found.append(each)
            if beats and found.count(ALIVE) == beats:
                break
        return found

    return asyncio.run(run())


def tokens(*ids: int, end: EndReason | None = None) -> CommittedTokens:
    likely = tuple(TokenLogprobs(-0.5, (1, 2), (-0.5, -1.25)) for _ in ids)
    return CommittedTokens(tuple(ids), (TokenOrigin.DRAFTED,) * len(ids), likely, target_id=b"12345678", end=end)


def make(seed: int = 1) -> Callable[[object], GenerateRequest]:
    return lambda _codec: GenerateRequest((1, 2), SamplingPolicy(seed=seed), 9)


CODEC = TalkingCodec(("a", "b"))


def test_a_reader_gets_what_is_behind_its_last_event_and_what_comes(place: Place) -> None:
    record = place.begin()
    record.note(Piece("one two", 2))
    assert read(record, 0, beats=1) == [b"id: 1\ndata: one\n\n", b"id: 2\ndata: two\n\n", ALIVE]
    record.note(Delayed("The edge is away."))
    record.note(Piece("three", 1))
    record.note(Failed(SessionFailed("Lost.")))
    record.note(Piece("late", 1))
    assert read(record, 2) == [b"id: 3\ndata: three\n\n", b"id: 4\ndata: failed Lost.\n\n"]
    assert read(record, 4) == []


def test_a_reader_that_waits_is_woken_and_sees_why_nothing_comes(place: Place) -> None:
    record = place.begin()

    async def run() -> list[bytes]:
        found = []
        async for each in record.read(-1, lambda _s: asyncio.Event().wait()):  # type: ignore[arg-type]
            found.append(each)
            match len(found):
                case 1:
                    await asyncio.to_thread(record.note, Delayed("Away."))
                case 2:
                    await asyncio.to_thread(record.note, Piece("one", 1))
                case 3:
                    await asyncio.to_thread(record.note, Failed(SessionFailed("Lost.")))
        return found

    assert asyncio.run(run())[1:] == [b": Away.\n\n", b"id: 1\ndata: one\n\n", b"id: 2\ndata: failed Lost.\n\n"]


def test_an_ended_record_is_erased_in_time_and_a_running_one_is_not(place: Place) -> None:
    ended, _running = place.begin("cmpl-1"), place.begin("cmpl-2")
    ended.note(Failed(SessionFailed("Lost.")))
    place.now += KEEP_S - 1
    assert place.records.find("cmpl-1", PATH, None) is ended
    [(seconds, purge)] = place.waiting
    assert seconds == KEEP_S
    place.now += 1
    purge()
    with pytest.raises(ApiProblem) as caught:
        place.records.find("cmpl-1", PATH, None)
    assert (caught.value.status, caught.value.code) == (404, "not_found")
    assert place.names() in ([], ["cmpl-2"])
    place.records.find("cmpl-2", PATH, None)


@pytest.mark.parametrize(("path", "application"), [("/v1/responses", "mine"), (PATH, "other"), (PATH, None)])
def test_a_record_is_found_only_by_its_application_and_path(place: Place, path: str, application: str | None) -> None:
    place.begin("cmpl-1", "mine")
    with pytest.raises(ApiProblem):
        place.records.find("cmpl-1", path, application)


def test_an_application_has_a_number_of_records_of_which_the_oldest_ended_goes_first(place: Place) -> None:
    for number in range(MAX_RECORDS):
        record = place.begin(f"cmpl-{number}", "mine")
        if number in (3, 5):
            place.now += 1
            record.note(Failed(SessionFailed("Lost.")))
    other = place.begin("cmpl-other", "other")
    other.note(Failed(SessionFailed("Lost.")))
    place.begin("cmpl-new", "mine")
    with pytest.raises(ApiProblem):
        place.records.find("cmpl-3", PATH, "mine")
    place.records.find("cmpl-5", PATH, "mine")
    place.begin("cmpl-newer", "mine")
    with pytest.raises(ApiProblem) as caught:
        place.begin("cmpl-newest", "mine")
    assert (caught.value.status, caught.value.code) == (429, "too_many_background_requests")
    place.records.find("cmpl-other", PATH, "other")


def test_all_applications_together_have_a_bound(place: Place) -> None:
    for number in range(4 * MAX_RECORDS):
        place.begin(f"cmpl-{number}", f"app-{number // MAX_RECORDS}")
    with pytest.raises(ApiProblem):
        place.begin("cmpl-new", "app-new")


def test_a_record_that_grows_too_large_is_ended_after_the_ended_ones_are_erased(place: Place) -> None:
    old, new = place.begin("cmpl-1"), place.begin("cmpl-2")
    old.note(Piece("x" * (MAX_BYTES // 2), 1))
    old.note(Failed(SessionFailed("Lost.")))
    new.note(Piece("x" * (MAX_BYTES // 2), 1))
    with pytest.raises(ApiProblem):
        place.records.find("cmpl-1", PATH, None)
    assert new.ended_at is None
    new.note(Piece("x" * (MAX_BYTES // 2), 1))
    assert new.ended_at is not None
    assert new.events[-1].startswith(b"data: failed")
    assert len(new.events) == 3


def test_another_process_has_the_tokens_and_gives_events_the_same_numbers(disk: Place) -> None:
    record = disk.begin(application="mine")
    first = record.prepare(make(), CODEC).journal
    assert first is not None
    record.keep(tokens(1, 2))
    record.keep(tokens(3, end=EndReason.LENGTH))
    [again] = disk.restarted().load(lambda _header: Words())
    journal = again.prepare(make(), CODEC).journal
    assert journal is not None
    assert (journal.session, journal.committed) == (first.session, (tokens(1, 2), tokens(3)))
    assert (journal.end, journal.committed[0].target_id) == (EndReason.LENGTH, b"12345678")
    assert journal.attempt > first.attempt + 1000
    assert again.header == header(application="mine")
    assert again.events == record.events
    [third] = disk.restarted().load(lambda _header: Words())
    assert third.prepare(make(), CODEC).journal.attempt > journal.attempt  # type: ignore[union-attr]


def test_another_process_does_not_continue_another_prompt(disk: Place) -> None:
    record = disk.begin()
    record.prepare(make(), CODEC)
    [again] = disk.restarted().load(lambda _header: Words())
    with pytest.raises(SessionFailed):
        again.prepare(make(seed=2), CODEC)


def test_another_process_has_the_events_of_an_ended_record_until_it_is_erased(disk: Place) -> None:
    record = disk.begin()
    record.note(Piece("one", 1))
    record.note(Failed(SessionFailed("Lost.")))
    disk.now += 5
    records = disk.restarted()
    assert records.load(lambda _header: Words()) == []
    assert read(records.find("cmpl-1", PATH, None)) == read(record)
    assert disk.waiting[-1][0] == KEEP_S - 5
    disk.now += KEEP_S
    assert disk.restarted().load(lambda _header: Words()) == []
    assert disk.names() == []


def test_a_stop_of_the_device_leaves_the_request_to_the_next_process_with_another_session(disk: Place) -> None:
    record = disk.begin()
    record.keep(tokens(1))
    record.note(Failed(TextCancelled("The device is shutting down.")))
    assert read(record) == [b"id: 0\ndata: first\n\n"]  # no end: the client connects again
    [again] = disk.restarted().load(lambda _header: Words())
    assert again.committed == [tokens(1)]
    assert again.session != record.session


def test_a_line_that_the_end_of_the_process_has_cut_is_dropped(disk: Place) -> None:
    record = disk.begin()
    record.keep(tokens(1))
    assert disk.folder is not None
    file = disk.folder / "cmpl-1.jsonl"
    with file.open("ab") as end:
        end.write(b'{"ids":[2],"ori')
    [again] = disk.restarted().load(lambda _header: Words())
    assert again.committed == [tokens(1)]
    again.keep(tokens(7))
    [third] = disk.restarted().load(lambda _header: Words())
    assert third.committed == [tokens(1), tokens(7)]


@pytest.mark.parametrize("content", [b"", b"no JSON\n", b"{}\n", b'{"boot":"boot-1","header":{},"session":"00"}\n'])
def test_a_file_that_is_no_record_is_erased(disk: Place, content: bytes) -> None:
    assert disk.folder is not None
    disk.folder.mkdir()
    (disk.folder / "cmpl-1.jsonl").write_bytes(content)
    assert disk.restarted().load(lambda _header: Words()) == []
    assert disk.names() == []


def test_a_record_of_an_earlier_boot_is_erased(disk: Place) -> None:
    disk.begin()
    disk.boot = "boot-2"
    assert disk.restarted().load(lambda _header: Words()) == []
    assert disk.names() == []


def test_a_request_that_ends_the_process_again_and_again_is_given_up(disk: Place) -> None:
    disk.begin().keep(tokens(1))
    for _ in range(5):
        [_record] = disk.restarted().load(lambda _header: Words())
    records = disk.restarted()
    assert records.load(lambda _header: Words()) == []
    assert records.find("cmpl-1", PATH, None).events[-1].startswith(b"data: failed")


def test_only_the_device_s_user_reads_a_record_and_backups_leave_it_out(disk: Place) -> None:
    record = disk.begin()
    record.keep(tokens(1))
    assert disk.folder is not None
    assert disk.folder.stat().st_mode & 0o777 == 0o700
    assert (disk.folder / "cmpl-1.jsonl").stat().st_mode & 0o777 == 0o600
    assert (disk.folder / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")
    disk.records.erase(record)
    assert disk.names() == []


def test_a_record_that_cannot_be_written_stays_in_memory_and_leaves_no_file(disk: Place) -> None:
    record = disk.begin()
    assert record.file is not None
    record.file.close()
    record.keep(tokens(1))
    record.note(Piece("one", 1))
    assert disk.names() == []
    assert read(record, 0, beats=1) == [b"id: 1\ndata: one\n\n", ALIVE]
