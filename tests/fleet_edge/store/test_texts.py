from dataclasses import replace

from fleet_edge.store import housekeeping, queries
from fleet_edge.store.database import Store
from fleet_edge.store.models import TextRow
from fleet_edge.store.records import LeaveReason, Record, TokenKind, segment_number
from fleet_edge.store.spool import MAX_LINE_BYTES, from_line, to_line
from fleet_edge.store.texts import StoredText, read_text
from schemas.reasons import EndReason
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.rows import all_rows
from tests.fleet_edge.store.samples import SESSION, after

LATER = {"segment": segment_number(after(60)), "at": after(61)}


def hexed(*pieces: bytes | str) -> str:
    return ",".join((piece.encode() if isinstance(piece, str) else piece).hex() for piece in pieces)


def read(store: Store, *records: Record) -> StoredText | None:
    store.apply(records)
    with store.engine.connect() as connection:
        session = queries.session(connection, SESSION)
        segments = queries.segments(connection, SESSION, device=session.device)
        return read_text(connection, session, segments)


def kinds(stored: StoredText | None) -> str:
    return "".join(token.kind for token in stored.tokens)


def test_a_text_is_read_back_token_by_token(store: Store) -> None:
    stored = read(store, samples.opened(), samples.text_written(), samples.text_written(), samples.closed(tokens=4))
    assert stored.text == "The sky is blue"
    assert [(token.kind, token.id, token.text) for token in stored.tokens][2:] == [
        (TokenKind.CORRECTED, 13, " is"),
        (TokenKind.BONUS, 14, " blue"),
    ]


def test_a_text_of_which_nothing_is_stored_is_none(store: Store) -> None:
    assert read(store, samples.opened(), samples.closed()) is None


def test_what_the_device_did_not_have_when_it_resumed_is_not_part_of_the_text(store: Store) -> None:
    stored = read(
        store,
        samples.opened(),
        samples.text_written(),
        samples.left(reason=LeaveReason.RESUMED),
        samples.opened(segment=LATER["segment"], at=after(60), edge="edge-2", resumed_tokens=3),
        samples.text_written(**LATER, start=3, kinds="ss", ids="21,22", pieces=hexed(" grey", ".")),
        samples.closed(segment=LATER["segment"], at=after(62), tokens=5),
    )
    assert kinds(stored) == "ddcss"
    assert stored.text == "The sky is grey."


def test_of_a_text_that_went_on_where_nothing_is_stored_the_rest_is_a_gap(store: Store) -> None:
    stored = read(
        store,
        samples.opened(),
        samples.text_written(),
        samples.opened(segment=LATER["segment"], at=after(60), edge="edge-2", resumed_tokens=2),
        samples.closed(segment=LATER["segment"], at=after(62), tokens=5),
    )
    assert kinds(stored) == "dd???"


def test_what_an_edge_has_not_stored_is_a_gap(store: Store) -> None:
    stored = read(
        store,
        samples.opened(),
        samples.opened(segment=LATER["segment"], at=after(60), resumed_tokens=3),
        samples.text_written(**LATER, start=3, kinds="s", ids="21", pieces=hexed("x")),
    )
    assert kinds(stored) == "???s"
    assert stored.text is None


def test_what_the_device_has_cut_off_or_written_alone_is_not_the_edges(store: Store) -> None:
    counters = replace(samples.COUNTERS, unverified=2)
    end = samples.closed(tokens=5, counters=counters, reason=EndReason.LENGTH)
    assert kinds(read(store, samples.opened(), samples.text_written(), end)) == "ddcuu"


def test_a_character_of_several_tokens_belongs_to_the_last_of_them(store: Store) -> None:
    pieces = hexed(b"\xf0\x9f", b"\x8e\x89", b"\xff", "!")
    stored = read(store, samples.opened(), samples.text_written(pieces=pieces))
    assert [token.text for token in stored.tokens] == ["", "\N{PARTY POPPER}", "\ufffd", "!"]


def test_of_a_hash_the_kinds_are_known_and_the_latest_holds(store: Store) -> None:
    early = samples.text_written(ids=None, pieces=None, hash="aa")
    late = samples.text_written(**LATER, start=4, kinds="s", ids=None, pieces=None, hash="bb")
    resumed = samples.opened(segment=LATER["segment"], at=after(60), resumed_tokens=4)
    stored = read(store, samples.opened(), early, resumed, late)
    assert (kinds(stored), stored.hash, stored.text) == ("ddcbs", "bb", None)


def test_a_text_goes_with_its_session_and_by_its_own_age(store: Store) -> None:
    read(store, samples.opened(), samples.text_written(), samples.text_written(start=4, at=after(500)))
    assert housekeeping.purge(store.engine, TextRow, before=after(100), chunk=10) == 1
    assert [row["start"] for row in all_rows(store)["texts"]] == [4]
    housekeeping.purge_sessions(store.engine, before=after(10_000), chunk=10)
    rows = all_rows(store)
    assert (rows["sessions"], rows["texts"]) == ([], [])


def test_a_piece_waits_in_the_spool_as_it_is() -> None:
    record = samples.text_written(kinds="d" * 256, pieces=hexed(*[b"\0" * 32] * 256))
    line = to_line(record)
    assert len(line) < MAX_LINE_BYTES
    assert from_line(line) == record
