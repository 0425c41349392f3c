import pytest
from hypothesis import given, strategies as st

from fleet_device.drafters.without_model import WordCodec
from fleet_device.requests.generate import (
    GeneratedText,
    GenerateRequest,
    Piece,
    RequestContext,
    StopStrings,
    TokenText,
    generate_text,
)
from fleet_device.session.sequence import TokenOrigin
from schemas.policy import SamplingPolicy
from schemas.reasons import EndReason
from tests.support.memory_device import ScriptedAgent, TalkingDrafter

POLICY = SamplingPolicy(seed=1)


def request(prompt: int = 2, limit: int = 10, stop: tuple[str, ...] = ()) -> GenerateRequest:
    return GenerateRequest((1,) * prompt, POLICY, limit, stop)


def generated(
    agent: ScriptedAgent, drafter: TalkingDrafter | None = None, stop: tuple[str, ...] = ()
) -> tuple[GeneratedText, list[Piece]]:
    pieces: list[Piece] = []
    context = RequestContext(on_piece=pieces.append)
    return generate_text(agent, drafter or TalkingDrafter(), request(stop=stop), context), pieces


def test_each_token_of_a_piece_says_what_it_adds_and_where_it_comes_from() -> None:
    text, pieces = generated(ScriptedAgent())
    assert [piece.parts for piece in pieces] == [
        (TokenText(1, TokenOrigin.DRAFTED, "t1 "), TokenText(2, TokenOrigin.BONUS, "t2 ")),
        (TokenText(3, TokenOrigin.DRAFTED, "t3 "),),
    ]
    assert text.origins == (TokenOrigin.DRAFTED, TokenOrigin.BONUS, TokenOrigin.DRAFTED)


def test_what_a_token_adds_leaves_out_the_stop_string_and_what_may_become_one() -> None:
    text, pieces = generated(ScriptedAgent(batches=[(1, 2, 3), (4, 5)]), stop=("t2 x", "t4"))
    assert [[part.text for part in piece.parts] for piece in pieces] == [["t1 ", "", "t2 t3 "], [""]]
    assert all(piece.text == "".join(part.text for part in piece.parts) for piece in pieces)
    assert text.text == "t1 t2 t3 "


def test_a_stop_string_ends_the_session_and_is_not_in_the_text() -> None:
    agent = ScriptedAgent(batches=[(1, 2), (3, 4), (5,)], reason=EndReason.LENGTH)
    text, _ = generated(agent, stop=("t3",))
    assert text.text == "t1 t2 "
    assert text.stopped
    assert text.reason is EndReason.STOP


@pytest.mark.parametrize("batches", [[(1, 2), (3, 4), (5,)], [(1, 2, 3)], [(1, 2, 3, 4, 5)], [(1,), (2,), (3,), (4,)]])
def test_a_text_ends_at_its_stop_string_however_many_tokens_arrive_with_it(batches: list[tuple[int, ...]]) -> None:
    text, pieces = generated(ScriptedAgent(batches=batches), stop=("t3",))
    assert text.tokens == (1, 2, 3)
    assert len(text.origins) == sum(piece.tokens for piece in pieces) == 3


def test_what_waits_for_a_stop_string_that_never_comes_is_given_out_at_the_end() -> None:
    text, pieces = generated(ScriptedAgent(), stop=("t3 x",))
    assert text.text == "".join(piece.text for piece in pieces) == "t1 t2 t3 "


class HalfCharacters(WordCodec):
    """Tokens 1 and 2 are the halves of "é"; token 3 is a byte that begins nothing; token 4 is "x"."""

    def piece(self, token: int) -> bytes:
        return {1: b"\xc3", 2: b"\xa9", 3: b"\xff", 4: b"x"}[token]


def halves(*batches: tuple[int, ...], reason: EndReason, stop: tuple[str, ...] = ()) -> str:
    drafter = TalkingDrafter()
    drafter.codec = HalfCharacters(("a", "b"))
    text, pieces = generated(ScriptedAgent(batches=batches, reason=reason), drafter, stop)
    assert "".join(piece.text for piece in pieces) == text.text
    return text.text


@pytest.mark.parametrize("reason", [EndReason.LENGTH, EndReason.STOP, EndReason.CANCELLED])
def test_a_text_that_is_cut_inside_a_character_ends_before_it(reason: EndReason) -> None:
    assert halves((4,), (1, 2), (4, 1), reason=reason) == "xéx"
    assert halves((1,), reason=reason, stop=("y",)) == ""


def test_bytes_that_are_no_character_are_marked_where_they_stand() -> None:
    assert halves((4, 3, 4), (1, 4), reason=EndReason.LENGTH) == "x\ufffdx\ufffdx"
    assert halves((4, 3), reason=EndReason.LENGTH) == "x\ufffd"


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_any_cut_yields_the_text_up_to_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    watch = StopStrings(stops)
    out = "".join([watch.feed(piece) for piece in pieces]) + watch.finish()
    # The stop string that ends first is found first, although a longer one may begin before it.
    assert text.startswith(out)
    assert not any(stop in out for stop in stops)
    if any(stop in text for stop in stops):
        assert watch.found
        assert any(text[len(out) :].startswith(stop) for stop in stops)
    else:
        assert out == text
