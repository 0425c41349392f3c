import hashlib
from collections.abc import Callable

import pytest

from dssd.verification import Judgement
from fleet_edge.answers.recorder import GenerationRecorder, token_bytes
from fleet_edge.sessions.drafts import kinds_of_decoded
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.store.records import StoreText, TextWritten
from fleet_edge.store.spool import MAX_LINE_BYTES, to_line
from fleet_edge.verifiers.contract import VerifierError
from tests.fleet_edge.store.samples import START
from tests.support.drafts import arrived, draft, edge_session


def piece(token: int) -> bytes:
    return f"<{token}>".encode()


def texts(
    store: StoreText, read: Callable[[int], bytes] | None = piece
) -> tuple[GenerationRecorder, list[TextWritten]]:
    written: list[TextWritten] = []
    return GenerationRecorder(written.append, store, read), written


def committed(number: int, **message: object) -> EdgeSession:
    """Return a session with `number` tokens from 100 on, of which every third was corrected."""
    session = edge_session(**message)
    session.tokens += range(100, 100 + number)
    session.kinds += bytes(ord("c" if place % 3 == 2 else "d") for place in range(number))
    return session


def judge(session: EdgeSession, judgement: Judgement) -> None:
    session.settle(session.chain(100), judgement)


class TestKinds:
    def test_drafted_and_bonus_tokens_are_told_apart(self) -> None:
        session = edge_session()
        session.admit(arrived(draft((4, 5))))
        judge(session, Judgement(2, rejected=False, token=6))
        assert session.kinds == b"ddb"

    def test_a_correction_is_one_whoever_draws_it(self) -> None:
        session = edge_session()
        session.admit(arrived(draft((4, 5))))
        judge(session, Judgement(1, rejected=True, token=9))
        assert session.kinds == b"dc"

    def test_forced_tokens_are_told_apart_over_all_drafts_of_a_judgement(self) -> None:
        session = edge_session()
        session.admit(arrived(draft((4, 5), round_=0, more=True)))
        session.admit(arrived(draft((6, 7), text=(4, 5), round_=1)))
        judge(session, Judgement(4, rejected=False, token=8, forced=(1, 2, 4)))
        assert session.kinds == b"dffdf"

    def test_a_forced_correction_stays_a_correction(self) -> None:
        session = edge_session()
        session.admit(arrived(draft((4, 5))))
        judge(session, Judgement(1, rejected=True, token=9, forced=(1,)))
        assert session.kinds == b"dc"

    def test_what_the_edge_writes_beyond_what_is_asked_for_is_no_token(self) -> None:
        assert kinds_of_decoded(2, forced=(1, 2, 3)) == b"sf"


def test_by_default_nothing_is_stored() -> None:
    store, written = texts(StoreText.NONE, None)
    session = committed(1000)
    store.grew(session, segment=1, at=START)
    store.ended(session, tokens=1000, segment=1, at=START)
    assert written == []


def test_each_token_is_stored_once_in_pieces() -> None:
    store, written = texts(StoreText.FULL)
    session = committed(300)
    for _ in range(3):
        store.grew(session, segment=1, at=START)
    assert [(record.start, len(record.kinds)) for record in written] == [(0, 256)]
    store.ended(session, tokens=300, segment=1, at=START)
    assert [(record.start, len(record.kinds)) for record in written] == [(0, 256), (256, 44)]
    assert ",".join(record.ids or "" for record in written) == ",".join(map(str, range(100, 400)))
    assert "".join(record.kinds for record in written) == session.kinds.decode()
    read = b"".join(bytes.fromhex(each) for record in written for each in (record.pieces or "").split(","))
    assert read == b"".join(map(piece, range(100, 400)))


def test_what_the_device_did_not_take_is_not_stored() -> None:
    store, written = texts(StoreText.FULL)
    store.ended(committed(10), tokens=4, segment=1, at=START)
    assert [(record.start, record.ids) for record in written] == [(0, "100,101,102,103")]


def test_of_a_resumed_text_only_what_is_new_is_stored() -> None:
    store, written = texts(StoreText.FULL)
    session = committed(3, resume=(50, 51))
    store.ended(session, tokens=5, segment=1, at=START)
    assert [(record.start, record.ids, record.kinds) for record in written] == [(2, "100,101,102", "ddc")]


def test_of_a_hash_no_token_can_be_read() -> None:
    store, written = texts(StoreText.HASH)
    session = committed(300, resume=(50,))
    store.grew(session, segment=1, at=START)
    assert written == []
    store.ended(session, tokens=301, segment=1, at=START)
    (record,) = written
    assert (record.start, record.ids, record.pieces, len(record.kinds)) == (1, None, None, 300)
    said = f"{session.session.hex()}\n".encode() + piece(50) + b"".join(map(piece, range(100, 400)))
    assert record.hash == hashlib.sha256(said).hexdigest()


@pytest.mark.parametrize("size", [0, 40, 30_000])
def test_a_piece_fits_a_line_of_the_spool_whatever_tokens_read(size: int) -> None:
    store, written = texts(StoreText.FULL, lambda _token: b"x" * size)
    session = committed(300)
    store.ended(session, tokens=300, segment=1, at=START)
    assert sum(len(record.kinds) for record in written) == 300
    assert all(len(record.kinds) == len((record.pieces or "").split(",")) for record in written)
    assert max(len(to_line(record)) for record in written) < MAX_LINE_BYTES


def test_a_target_whose_tokens_are_not_known_is_stored_by_ids_and_cannot_be_hashed() -> None:
    class Silent:
        """A verifier that does not tell what its tokens read."""

    assert token_bytes(Silent(), StoreText.FULL) is None  # type: ignore[arg-type]
    with pytest.raises(VerifierError, match="full"):
        token_bytes(Silent(), StoreText.HASH)  # type: ignore[arg-type]
    store, written = texts(StoreText.FULL, None)
    store.ended(committed(2), tokens=2, segment=1, at=START)
    assert [(record.ids, record.pieces) for record in written] == [("100,101", None)]
