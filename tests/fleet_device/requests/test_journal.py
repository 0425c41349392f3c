"""Requests that another process continues: whenever the first one ends, the pieces are those of one that did not."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from fleet_device.requests.generate import (
    GeneratedText,
    GenerateRequest,
    Generation,
    Journal,
    Piece,
    RequestContext,
    ThinkingBudget,
    generate_text,
)
from fleet_device.requests.thinking import Thinking, ThinkingMarks
from fleet_device.session.sequence import CommittedTokens, TokenOrigin
from fleet_device.session.states import SessionCounters
from schemas.policy import SamplingPolicy
from schemas.reasons import EndReason
from tests.support.letter_codec import LetterCodec
from tests.support.memory_device import TalkingDrafter

THINK = Thinking(ThinkingMarks("<think>", "</think>"))
CLOSING = tuple(map(ord, "</think>"))


class KilledError(BaseException):
    pass


@dataclass
class Process:
    """Generates letters in batches of three, and ends after a number of batches that were noted."""

    outputs: Sequence[str]  # of each session
    left: int
    kept: list[CommittedTokens]
    sessions: list[tuple[bytes, int]] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)

    def note(self, tokens: CommittedTokens) -> None:
        if not self.left:
            raise KilledError
        self.left -= 1
        self.kept.append(tokens)

    def generate(self, request: GenerateRequest, context: RequestContext) -> Generation:
        journal = request.journal
        assert journal is not None
        second = request.prompt[-len(CLOSING) :] == CLOSING
        output = tuple(map(ord, self.outputs[second]))
        begun = [token for batch in journal.committed for token in batch.ids]
        assert tuple(begun) == output[: len(begun)]
        self.sessions.append((journal.session, journal.attempt))
        for at in range(len(begun), len(output), 3):
            ids = output[at : at + 3]
            end = EndReason.STOP if at + 3 >= len(output) else None
            if context.on_tokens(CommittedTokens(ids, (TokenOrigin.BONUS,) * len(ids), target_id=b"t", end=end)):
                output = output[: at + 3]
                break
        return Generation(journal.session, output, EndReason.STOP, SessionCounters(), None, 1.0, 1.0, 0, 1)

    def run(self, request: GenerateRequest, attempt: int) -> GeneratedText:
        drafter = TalkingDrafter()
        drafter.codec = LetterCodec("")
        journal = Journal(b"12345678", self.note, attempt, tuple(self.kept))
        return generate_text(
            self, drafter, replace(request, journal=journal), RequestContext(on_piece=self.pieces.append)
        )


PLAIN = GenerateRequest((1, 2), SamplingPolicy(seed=1), 200, thinking=THINK)
BUDGET, WIDE = (replace(PLAIN, budget=ThinkingBudget(tokens, CLOSING, SamplingPolicy(seed=2))) for tokens in (10, 30))


@pytest.mark.parametrize(
    ("request_", "outputs"),
    [
        (PLAIN, ["One, two, three."]),
        (PLAIN, ["<think>Well, {}.</think>It is 4."]),
        (replace(PLAIN, stop=("is",)), ["<think>Well</think>It is 4, and so on."]),
        (BUDGET, ["<think>Well, it may be anything.", "It is 4."]),
        (WIDE, ["<think>W</think>It is 4."]),
        (replace(BUDGET, max_new_tokens=12), ["<think>Well, it may be anything."]),
    ],
)
def test_the_pieces_are_those_of_one_process(request_: GenerateRequest, outputs: list[str]) -> None:
    one = Process(outputs, 1000, [])
    whole = one.run(request_, 0)
    for batches in range(len(one.kept) + 1):
        first = Process(outputs, batches, [])
        try:
            first.run(request_, 0)
        except KilledError:
            assert batches < len(one.kept)
            assert len(first.pieces) == len(first.kept)  # nothing was shown that is not kept
        second = Process(outputs, 1000, first.kept)
        text = second.run(request_, 1 << 16)
        assert second.pieces == one.pieces
        assert first.pieces == one.pieces[: len(first.pieces)]
        assert [piece.parts for piece in second.pieces] == [piece.parts for piece in one.pieces]
        assert (text.text, text.reasoning, text.tokens, text.origins, text.reason) == (
            whole.text, whole.reasoning, whole.tokens, whole.origins, whole.reason,
        )  # fmt: skip
        assert {session for session, _ in second.sessions} <= {session for session, _ in one.sessions}
        assert second.kept == one.kept
