"""Replay of a text through `sampling`, decision by decision; a coupled one is also held against the target's own."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fleet_device.session.sequence import SentDraft, VerdictEffect
from sampling.distribution import Dist, QuantizedDist, quantize, shape
from sampling.downlink import FormName, choose_form, correct
from sampling.drawing import propose
from sampling.verification import judge
from schemas.downlink import Dense, Samples, Sparse
from schemas.messages import Draft, Open, Verdict
from schemas.policy import Mode
from schemas.reasons import Finish
from schemas.vocabulary import EMPTY_DIGEST, extend_digest
from tests.support.markov import MarkovScript
from tests.support.memory_fleet import DRAFT, END, TARGET, lossless_text


@dataclass(slots=True)
class Replay:
    """Replays verdicts through `sampling`; fails at the first difference.

    Attributes:
        target: The target of the edge that has sent the verdict.
        first: The target that the text began with.
        mixed: Whether another one has continued it.
    """

    request: Open
    text: list[int] = field(default_factory=list)
    target: MarkovScript = TARGET
    first: MarkovScript | None = None
    mixed: bool = False
    _lossless: list[int] = field(default_factory=list)
    _rejected: tuple[Dist, QuantizedDist] | None = None
    _handle: int = -1  # of the session at the edge that has rejected

    def note_target(self, target: MarkovScript, tokens: int) -> None:
        """Record the target of the next effect, and that of its tokens."""
        self.target = target
        if not tokens:
            return
        if self.first is None:
            self.first = target
            if self.request.policy.mode is Mode.COUPLED:
                self._lossless = lossless_text(self.request, target)
        self.mixed = self.mixed or target is not self.first

    def take(self, effect: VerdictEffect) -> None:
        decided = effect.decided
        if effect.edge_only:
            self._written(effect.tokens)
            return
        assert decided is not None
        draft = decided.draft
        assert draft.base == len(self.text), "a draft was decided on that stands on another text"
        assert draft.digest == extend_digest(EMPTY_DIGEST, self.text), "a draft was sent with another text's digest"
        expected = self._judged(decided) if draft.tried is None else self._corrected(decided.verdict)
        assert effect.tokens == expected, (effect.tokens, expected)
        self.text.extend(effect.tokens)
        if self.request.policy.mode is Mode.COUPLED and not self.mixed:
            assert self.text == self._lossless[: len(self.text)], "the text is not the target's own"

    def _written(self, tokens: Sequence[int]) -> None:
        policy = self.request.policy
        for token in tokens:
            counts = () if policy.mode is Mode.RESIDUAL else None
            base = len(self.text)
            judgement = judge(lambda _: self._row(self.text), (), counts, policy=policy, base=base, bonus=True)
            assert token == judgement.token, (token, judgement)
            self.text.append(token)
        self._rejected = None if tokens else self._rejected

    def check_whole(self) -> None:
        text = self.text
        assert len(text) == self.request.max_new_tokens or (text and text[-1] == END), text
        assert END not in text[:-1], text
        if self.request.policy.mode is Mode.COUPLED and not self.mixed:
            assert text == self._lossless

    def _row(self, script_text: Sequence[int]) -> Dist:
        return shape(self.target.logits((*self.request.prompt, *script_text)), self.request.policy)

    def _judged(self, decided: SentDraft) -> tuple[int, ...]:
        """Judge a draft again; return the tokens to append."""
        draft, verdict, policy = decided.draft, decided.verdict, self.request.policy
        self._check_proposals(draft)
        # A migrated session drafts again from its last token: the same numbers, so the same rejection.
        resumed = draft.handle != self._handle
        assert self._rejected is None or resumed, "a draft was decided on before the last rejection was corrected"
        self._rejected = None
        end = draft.base + len(draft.tokens)
        ended = draft.tokens[-1:] == (END,)
        judgement = judge(
            lambda offset: self._row((*self.text, *draft.tokens[:offset])),
            draft.tokens,
            draft.counts,
            policy=policy,
            base=draft.base,
            bonus=not draft.more and end < self.request.max_new_tokens and not ended,
        )
        head = draft.tokens[: judgement.accepted]
        assert verdict.accepted == judgement.accepted, (verdict, judgement)
        if judgement.p is not None:
            position = draft.base + judgement.accepted
            prefix = (*self.request.prompt, *self.text, *head)
            self._rejected = judgement.p, quantize(shape(DRAFT.logits(prefix), policy))
            self._handle = draft.handle
            return head + self._corrected(verdict, position=position)
        assert verdict.next == judgement.token, (verdict, judgement)
        new = head if judgement.token is None else (*head, judgement.token)
        self._check_finish(verdict, new, draft.base + len(new))
        return new

    def _check_proposals(self, draft: Draft) -> None:
        policy = self.request.policy
        for offset, token in enumerate(draft.tokens):
            prefix = (*self.request.prompt, *self.text, *draft.tokens[:offset])
            q = shape(DRAFT.logits(prefix), policy)
            proposal = propose(q, policy=policy, position=draft.base + offset)
            assert proposal.token == token
            assert draft.counts is None or draft.counts[offset] == proposal.count

    def _corrected(self, verdict: Verdict, *, position: int | None = None) -> tuple[int, ...]:
        """Draw the correction of the last rejection, and check the edge's message against it."""
        policy = self.request.policy
        assert self._rejected is not None, "samples were sent although nothing was rejected"
        p, q = self._rejected
        following, position = verdict.next, len(self.text) if position is None else position
        assert isinstance(following, Sparse | Samples | Dense), following
        tried = following.start if isinstance(following, Samples) else 0
        form = FormName(following.kind)
        expected = choose_form(
            p,
            policy=policy,
            position=position,
            vocabulary_size=self.target.size,
            max_bytes=1 << 20,
            form=form,
            tried=tried,
        )
        token = correct(following, q, policy=policy, position=position)
        if isinstance(following, Samples):
            assert isinstance(expected, Samples)
            assert following.ids == expected.ids[: len(following.ids)]
        else:
            assert token == correct(expected, q, policy=policy, position=position)
        if token is None:
            return ()
        self._rejected = None
        return (token,)

    def _check_finish(self, verdict: Verdict, new: Sequence[int], length: int) -> None:
        expected = Finish.NO
        if new[-1:] == (END,):
            expected = Finish.STOP
        elif length >= self.request.max_new_tokens:
            expected = Finish.LENGTH
        assert verdict.finish is expected, (verdict, expected)
