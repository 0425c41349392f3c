"""What a Close says of the exception that has ended its text: a code and a sentence, and nothing that is not ours."""

import pytest

from fleet_device.client.driver import with_cause
from fleet_device.errors import EdgeUnavailable, SessionFailed, SessionRefused
from schemas.codec import decode_close, encode_close
from schemas.messages import Close
from schemas.reasons import EndReason, RefusalCode
from tests.fleet_edge.store.samples import COUNTERS


def _close(reason: EndReason = EndReason.FAILED) -> Close:
    counted = {name: getattr(COUNTERS, name) for name in COUNTERS.__slots__}
    return Close.model_validate({"session": b"12345678", "handle": 1, "digest": 0, "reason": reason, **counted})


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (EdgeUnavailable("No edge answers."), "edge-unavailable", "No edge answers."),
        (SessionFailed("It was resumed 8 times."), "session-failed", "It was resumed 8 times."),
        (SessionRefused(RefusalCode.FENCED, "It is shut out."), "fenced", "It is shut out."),
        (SessionFailed("One\nline " + 600 * "x"), "session-failed", "One\N{REPLACEMENT CHARACTER}line " + 491 * "x"),
        (KeyError("a secret"), "key-error", "The device's program has failed (KeyError); its own log says more."),
    ],
)
def test_a_text_that_failed_says_why(error: Exception, code: str, sentence: str) -> None:
    close = decode_close(encode_close(with_cause(_close(), error)))
    assert (close.code, close.sentence) == (code, sentence)


def test_other_ends_say_nothing_more() -> None:
    assert with_cause(_close(EndReason.CANCELLED), KeyboardInterrupt()).code is None
    assert with_cause(_close(), None).sentence is None
