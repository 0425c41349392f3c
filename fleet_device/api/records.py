"""Records of requests that outlive their connection: their events, numbered, in memory and in a file.

A request with `background` goes on when its client disconnects, and when the device's process ends. Each of its events
is in its record before any client sees it, and so are the tokens that it comes from. Another process feeds these
through the same code, which gives the same events with the same numbers, and goes on behind them.

A file holds what people wrote: only the device's user can read it, `CACHEDIR.TAG` keeps it out of backups, and it is
erased with its record. It is not synchronized to the disk, which would cost milliseconds per event. So it survives the
end of the process, but maybe not that of the machine: a record of an earlier boot is erased.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import secrets
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

from pydantic import BaseModel, ConfigDict

from fleet_common.host import private_folder
from fleet_device.api.problems import ApiProblem, problem_of
from fleet_device.api.replies import ALIVE, HEARTBEAT_S, comment
from fleet_device.drafters.contract import TextCodec
from fleet_device.errors import SessionFailed, TextCancelled
from fleet_device.requests.generate import GeneratedText, GenerateRequest, Journal, Piece
from fleet_device.requests.queue import Delayed, Failed, Ticket
from fleet_device.session.sequence import CommittedTokens, TokenOrigin
from schemas.fields import SESSION_BYTES, TokenLogprobs
from schemas.reasons import EndReason

_log = logging.getLogger(__name__)

MAX_RECORDS: Final = 16
MAX_BYTES: Final = 8 << 20
"""Bounds of the records of one application; without keys all programs are one."""

KEEP_S: Final = 600
"""Seconds from the end of a request to the erasure of its record, as at OpenAI."""

_ALL: Final = 4  # times this much for all applications together
_MAX_STARTS: Final = 5
"""Starts of the process without a new token after which a request is given up: it may be what ends the process."""

_ATTEMPTS: Final = 16  # bits for the Opens of one process
_TAG: Final = b"Signature: 8a477f597d28d172789f06886806bc55\n# https://bford.info/cachedir/\n"
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")


class Rendering(Protocol):
    """Shapes of one stream; each item is one server-sent event."""

    def first(self) -> list[bytes]: ...

    def piece(self, piece: Piece) -> list[bytes]: ...

    def last(self, text: GeneratedText) -> list[bytes]: ...

    def failed(self, error: Exception) -> bytes: ...


class RecordHeader(BaseModel):
    """Beginning of a record: the request (`body` is its JSON, with the seed), and the names that its events have."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    path: str
    application: str | None
    created: int
    model: str
    body: str


@dataclass(slots=True, eq=False)
class StreamRecord:
    """One request with its events. `note`, `prepare` and `keep` are called on the thread that runs it.

    Attributes:
        explain: Turns a failure into the error that clients see.
        ended_at: When its last event was added (monotonic seconds); None if it still runs.
        committed: Tokens that earlier processes have committed.
        starts: Number of earlier processes.
    """

    header: RecordHeader
    rendering: Rendering
    records: "Records"
    file: BinaryIO | None = None
    explain: Callable[[Exception], ApiProblem] = problem_of
    events: list[bytes] = field(default_factory=list)
    size: int = 0
    ended_at: float | None = None
    suspended: bool = False
    cancelled: bool = False
    ticket: Ticket | None = None
    committed: list[CommittedTokens] = field(default_factory=list)
    starts: int = 0
    session: bytes = field(default_factory=lambda: secrets.token_bytes(SESSION_BYTES))
    prompt: str | None = None  # digest of what its prompt and policy became
    _comment: tuple[int, bytes] = (0, b"")
    _readers: set[Callable[[], None]] = field(default_factory=set)
    _changing: threading.Lock = field(default_factory=threading.Lock)

    def prepare(self, make: Callable[[TextCodec], GenerateRequest], codec: TextCodec) -> GenerateRequest:
        """Return the request; raise SessionFailed if it would not be the one that was begun."""
        request = make(codec)
        content = repr((request.prompt, request.policy, request.max_new_tokens)).encode()
        prompt = hashlib.sha256(content).hexdigest()
        if self.prompt is None:
            self.prompt = prompt
            self._write(prompt=prompt)
        elif prompt != self.prompt:
            raise SessionFailed(
                "The request cannot be continued: the device has restarted with other settings, or another chat "
                "template. Send it again."
            )
        attempt = self.starts << _ATTEMPTS
        return replace(request, journal=Journal(self.session, self.keep, attempt, tuple(self.committed)))

    def keep(self, tokens: CommittedTokens) -> None:
        self._write(
            ids=tokens.ids,
            origins=tokens.origins,
            logprobs=[(each.logprob, each.ids, each.values) for each in tokens.logprobs],
            target=tokens.target_id and tokens.target_id.hex(),
            end=tokens.end,
        )

    def note(self, event: Piece | Delayed | GeneratedText | Failed) -> None:
        """Add the events of what has happened, before a client sees them."""
        if self.ended_at is not None:
            return
        try:
            match event:
                case Piece():
                    self._add(self.rendering.piece(event))
                case Delayed(reason):
                    self._comment = (self._comment[0] + 1, comment(reason))
                    self._wake()
                case GeneratedText():
                    self.finish(self.rendering.last(event))
                case Failed(TextCancelled()) if not self.cancelled:
                    self._suspend()
                case Failed(error):
                    self.finish([self.rendering.failed(self.explain(error))])
        except Exception as error:
            _log.exception("A record failed for a reason that should not be possible.")
            self.fail(error)
            raise

    def fail(self, error: Exception) -> None:
        self.finish([self.rendering.failed(problem_of(error))])

    def finish(self, events: Iterable[bytes]) -> None:
        if self.ended_at is not None:
            return
        events = list(events)
        self._write(events=[each.decode() for each in (*self.events, *events)], ended_at=self.records.clock())
        self._close()
        self.events += events
        self.size += sum(map(len, events))
        self.ended_at = self.records.clock()
        self._wake()
        self.records.note_end()

    def begin(self) -> None:
        self.events += self.rendering.first()

    async def read(self, after: int, pause: Callable[[float], Awaitable[None]]) -> AsyncIterator[bytes]:
        """Return the events behind the one with the number `after`, as they come."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the server has stopped
                loop.call_soon_threadsafe(changed.set)

        with self._changing:
            self._readers.add(wake)
        try:
            place, said = after + 1, self._comment[0]
            while True:
                changed.clear()
                over = self.suspended or self.ended_at is not None
                while place < len(self.events):
                    yield b"id: %d\n" % place + self.events[place]
                    place += 1
                if over:
                    return
                number, reason = self._comment
                if number != said:
                    said = number
                    yield reason
                coming, beat = asyncio.ensure_future(changed.wait()), asyncio.ensure_future(pause(HEARTBEAT_S))
                try:
                    await asyncio.wait({coming, beat}, return_when=asyncio.FIRST_COMPLETED)
                    silent = not coming.done()
                finally:
                    coming.cancel()
                    beat.cancel()
                if silent:
                    yield ALIVE
        finally:
            with self._changing:
                self._readers.discard(wake)

    # Private

    def _add(self, events: list[bytes]) -> None:
        self.size += sum(map(len, events))
        if not self.records.make_room(self):
            self.cancelled = True
            if self.ticket is not None:
                self.ticket.cancellation.cancel()
            self.fail(SessionFailed(f"The output exceeds the {MAX_BYTES >> 20} MiB that a record may have."))
            return
        self.events += events
        self._wake()

    def _suspend(self) -> None:
        """Leave the request to the next process. This one has closed its session."""
        self._write(session=secrets.token_hex(SESSION_BYTES))
        self._close()
        self.suspended = True
        self._wake()

    def _close(self) -> None:
        file, self.file = self.file, None
        if file is not None:
            file.close()

    def _wake(self) -> None:
        with self._changing:
            readers = list(self._readers)
        for wake in readers:
            wake()

    def _write(self, **line: Any) -> None:  # noqa: ANN401 - JSON
        if self.file is None:
            return
        try:
            content = json.dumps(line, separators=(",", ":")).encode() + b"\n"
            self.size += len(content) if "events" not in line else 0  # it repeats what was counted
            self.file.write(content)
            self.file.flush()
        except (OSError, ValueError) as error:  # the latter if it was erased meanwhile
            # Without its last tokens another process would draw other ones.
            _log.warning("A request will not survive a restart: its record cannot be written: %s.", error)
            self.records.remove_file(self)


@dataclass(slots=True, eq=False)
class Records:
    """All records of a device.

    Attributes:
        folder: Folder of the files, made when it is needed; None keeps all in memory.
        clock: Monotonic seconds since the machine's boot.
        schedule: Calls a function after some seconds.
    """

    folder: Path | None
    clock: Callable[[], float]
    schedule: Callable[[float, Callable[[], None]], None]
    boot: str = field(default_factory=lambda: _BOOT.read_text().strip() if _BOOT.exists() else "")
    _records: dict[str, StreamRecord] = field(default_factory=dict)  # the oldest first
    _changing: threading.RLock = field(default_factory=threading.RLock)
    _scheduled: bool = False

    def begin(self, header: RecordHeader, rendering: Rendering) -> StreamRecord:
        """Return a new record; raise ApiProblem if the application, or the device, has no room for one."""
        record = StreamRecord(header, rendering, self, size=len(header.body))
        with self._changing:
            if not self.make_room(record):
                raise ApiProblem(
                    429,
                    f"There is no room for another request in the background: at most {MAX_RECORDS} run, with "
                    f"{MAX_BYTES >> 20} MiB; wait until one has ended, or cancel one.",
                    kind="rate_limit_error",
                    code="too_many_background_requests",
                    headers={"Retry-After": "5"},
                )
            self._records[header.name] = record
        record.begin()
        if (path := self._path(record)) is not None and self._usable(path.parent):
            try:
                record.file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
            except OSError as error:
                _log.warning("A request will not survive a restart: %s cannot be written: %s.", path, error)
        record._write(boot=self.boot, header=header.model_dump(), session=record.session.hex())  # noqa: SLF001
        return record

    def find(self, name: str, path: str, application: str | None) -> StreamRecord:
        """Return a record of an application; raise ApiProblem if it has none with this name."""
        self.purge()
        record = self._records.get(name)
        if record is None or (record.header.path, record.header.application) != (path, application):
            raise ApiProblem(
                404,
                f"There is no {name[:100]!r} here: a request in the background is erased {KEEP_S // 60} minutes after "
                "its end, or earlier if the application has many.",
                code="not_found",
            )
        return record

    def erase(self, record: StreamRecord) -> None:
        with self._changing:
            self._records.pop(record.header.name, None)
        self.remove_file(record)

    def purge(self) -> None:
        """Erase what has ended too long ago."""
        with self._changing:
            for record in list(self._records.values()):
                if record.ended_at is not None and record.ended_at + KEEP_S <= self.clock():
                    self.erase(record)

    def note_end(self) -> None:
        """Schedule the erasure of the first record that has ended; one timer serves all."""
        with self._changing:
            ends = [each.ended_at for each in self._records.values() if each.ended_at is not None]
            if ends and not self._scheduled:
                self._scheduled = True
                self.schedule(max(0.0, min(ends) + KEEP_S - self.clock()), self._on_time)

    def _on_time(self) -> None:
        self._scheduled = False
        self.purge()
        self.note_end()

    def make_room(self, record: StreamRecord) -> bool:
        """Erase ended records, the oldest first, until this one fits; return whether it does."""
        own = record.header.application
        with self._changing:
            for times, mine in ((1, True), (_ALL, False)):
                kept = [each for each in self._records.values() if not mine or each.header.application == own]
                kept = [each for each in kept if each is not record]
                ended = [each for each in kept if each.ended_at is not None]
                ended.sort(key=lambda each: each.ended_at or 0.0)
                number, size = len(kept) + 1, sum(each.size for each in kept) + record.size
                while number > times * MAX_RECORDS or size > times * MAX_BYTES:
                    if not ended:
                        return False
                    oldest = ended.pop(0)
                    self.erase(oldest)
                    number, size = number - 1, size - oldest.size
        return True

    def load(self, make: Callable[[RecordHeader], Rendering]) -> list[StreamRecord]:
        """Read what an earlier process has left; return the records of requests that are to go on."""
        if self.folder is None or not self.folder.is_dir():
            return []
        for path in sorted(self.folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime):
            try:
                record = self._read(path, make)
            except Exception as error:  # noqa: BLE001 - whatever is in a file, the device starts
                _log.warning("The record %s is erased, since it cannot be used: %s", path, type(error).__name__)
                path.unlink(missing_ok=True)
                continue
            if record is None:
                path.unlink(missing_ok=True)
                continue
            self._records[record.header.name] = record
        self.purge()
        self.note_end()
        return [record for record in self._records.values() if record.ended_at is None]

    def remove_file(self, record: StreamRecord) -> None:
        file, record.file = record.file, None
        with contextlib.suppress(OSError):
            if file is not None:
                file.close()
        if (path := self._path(record)) is not None:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    # Private

    def _path(self, record: StreamRecord) -> Path | None:
        return None if self.folder is None else self.folder / f"{record.header.name}.jsonl"

    def _usable(self, folder: Path) -> bool:
        if private_folder(folder) is None:
            return False
        with contextlib.suppress(OSError):
            if not (tag := folder / "CACHEDIR.TAG").exists():
                tag.write_bytes(_TAG)
        return True

    def _read(self, path: Path, make: Callable[[RecordHeader], Rendering]) -> StreamRecord | None:
        """Return the record in a file; None if it is of an earlier boot."""
        whole, newline, _ = path.read_bytes().rpartition(b"\n")  # the process may have ended within a line
        first, *lines = [json.loads(line) for line in whole.split(b"\n")]
        if first["boot"] != self.boot:
            return None
        header = RecordHeader.model_validate(first["header"])
        if header.name != path.stem:
            raise ValueError("a record has another name than its file")
        session = bytes.fromhex(first["session"])
        record = StreamRecord(header, make(header), self, size=len(whole), session=session)
        fruitless = 0
        for line in lines:
            match line:
                case {"ids": ids}:
                    fruitless = 0
                    record.committed.append(_tokens(ids, line))
                case {"prompt": prompt}:
                    record.prompt = prompt
                case {"session": session}:
                    record.session = bytes.fromhex(session)
                case {"start": _}:
                    fruitless += 1
                    record.starts += 1
                case {"events": events}:
                    record.events = [each.encode() for each in events]
                    record.ended_at = line["ended_at"]
                    return record
        record.file = path.open("r+b")
        record.file.truncate(len(whole + newline))
        record.file.seek(0, os.SEEK_END)
        record.starts += 1
        record._write(start=record.starts)  # noqa: SLF001
        record.begin()
        if fruitless >= _MAX_STARTS:
            record.fail(SessionFailed(f"The device's process has ended {fruitless} times without a new token."))
        return record


def _tokens(ids: list[int], line: dict[str, Any]) -> CommittedTokens:
    return CommittedTokens(
        tuple(ids),
        tuple(map(TokenOrigin, line["origins"])),
        tuple(TokenLogprobs(logprob, tuple(likely), tuple(values)) for logprob, likely, values in line["logprobs"]),
        target_id=line["target"] and bytes.fromhex(line["target"]),
        end=line["end"] and EndReason(line["end"]),
    )
