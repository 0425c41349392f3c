import pytest

from fleet_device.client.driver import with_cause
from fleet_device.errors import EdgeUnavailable, SessionFailed, SessionRefused
from fleet_device.requests.generate import Cancellation
from schemas.codec import decode_close, encode_close
from schemas.control import Presence
from schemas.messages import Draft, Open
from schemas.reasons import EndReason, RefusalCode
from tests.support.drafts import close
from tests.support.scripted_edge import PATIENCE, Answers, LoneDevice, ScriptedEdge, accepted, opened


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (EdgeUnavailable("No edge answers."), "edge-unavailable", "No edge answers."),
        (SessionFailed("It was resumed 8 times."), "session-failed", "It was resumed 8 times."),
        (SessionRefused(RefusalCode.QUARANTINED, "It is shut out."), "quarantined", "It is shut out."),
        (SessionFailed("One\nline " + 600 * "x"), "session-failed", "One\N{REPLACEMENT CHARACTER}line " + 491 * "x"),
        (KeyError("a secret"), "key-error", "The device's program has failed (KeyError); its own log says more."),
    ],
)
def test_a_text_that_failed_says_why(error: Exception, code: str, sentence: str) -> None:
    told = decode_close(encode_close(with_cause(close(reason=EndReason.FAILED), error)))
    assert (told.code, told.sentence) == (code, sentence)


def test_whoever_waits_is_woken_when_the_text_is_cancelled() -> None:
    cancellation, woken = Cancellation(), list[str]()
    with cancellation.waking(lambda: woken.append("woken")):
        assert (woken, cancellation.requested) == ([], False)
        cancellation.cancel()
        assert (woken, cancellation.requested) == (["woken"], True)


def test_an_edge_that_is_back_is_asked_again_at_once() -> None:
    device, asked_at = LoneDevice(), list[float]()

    def on_open(message: Open) -> Answers:
        asked_at.append(device.clock())
        return [opened(message)] if asked_at[1:] else [Presence.OFFLINE, Presence.ONLINE]

    ScriptedEdge(device.broker, on_open=on_open, on_draft=lambda _message, draft: [accepted(draft)])
    assert device.generate(most=4).reason is EndReason.LENGTH
    assert asked_at == [asked_at[0]] * 2


def test_a_verdict_that_the_device_reads_late_counts_whatever_else_is_read_before() -> None:
    device = LoneDevice()

    def on_draft(message: Open, draft: Draft) -> Answers:
        device.clock.seconds += 3.0 * PATIENCE.verdict_s
        return [opened(message), accepted(draft, next=1)]

    edge = ScriptedEdge(device.broker, on_draft=on_draft)
    ScriptedEdge(device.broker, name="edge-other").stop_opens()
    assert device.generate(most=4).reason is EndReason.LENGTH
    assert len(edge.opens) == 1
