import random

import pytest

from benchmarks.hostile.payloads import (
    close_of,
    huge_open,
    open_of,
    random_bytes,
    random_draft,
    state_of,
    unique,
)
from schemas.codec import MAX_OPEN_BYTES, decode_close, decode_draft, decode_open
from schemas.control import DeviceState, decode_json
from schemas.vocabulary import Vocabulary

VOCABULARY = Vocabulary.of([f"t{token}" for token in range(64)])


def test_each_open_is_well_formed_and_of_another_session() -> None:
    payloads = unique(open_of(VOCABULARY))
    opens = [decode_open(next(payloads)) for _ in range(3)]
    assert len({each.session for each in opens}) == 3
    assert all(each.vocabulary == VOCABULARY for each in opens)


def test_each_close_is_well_formed_and_of_another_session() -> None:
    payloads = unique(close_of())
    assert len({decode_close(next(payloads)).session for _ in range(3)}) == 3


@pytest.mark.slow
def test_the_largest_open_is_well_formed_and_nearly_a_megabyte() -> None:
    payload = next(unique(huge_open(VOCABULARY)))
    assert MAX_OPEN_BYTES - 2048 < len(payload) <= MAX_OPEN_BYTES
    decode_open(payload)


def test_a_random_draft_is_well_formed() -> None:
    draft = decode_draft(random_draft(random.Random(1), vocabulary=64, handle=3, epoch=9))
    assert (draft.handle, draft.epoch, len(draft.tokens)) == (3, 9, 5)


def test_a_state_is_well_formed() -> None:
    decode_json(DeviceState, state_of(random.Random(1)))


def test_random_bytes_are_of_all_lengths_up_to_the_bound() -> None:
    rng = random.Random(1)
    assert {len(random_bytes(rng, most=4)) for _ in range(100)} == {1, 2, 3, 4}
