"""Pacing: how many tokens to draft before sending, whether to go on before the verdict, or to have the edge write."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Final, Literal, Protocol

from fleet_device.drafters.contract import Prospect

__all__ = ["STREAMED", "Choice", "DraftOutcome", "EdgeLoad", "FixedPacing", "Pacing", "Plan", "SharedSteps"]

_TRUST_LOST: Final = 0.02
"""With each further text."""

_LEAST_TRUST: Final = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSteps:
    """What the steps of an edge take that several texts share.

    Attributes:
        texts: How many; at least 2.
        writing_s: A step if the edge wrote all of them by itself.
        step_s: One that verifies drafts, however little is in it.
        text_s: Each text in it, with its first token.
        token_s: Each further token.
        free: Further tokens of a text that cost nothing.
    """

    texts: int
    writing_s: float
    step_s: float
    text_s: float
    token_s: float
    free: int = 0

    @property
    def trust(self) -> float:
        """What a rate of drafting ahead counts for: it brings less than is reckoned, the less the more texts there are.

        Drafts that are sent one by one are not all in the next step, and texts with unequal numbers of tokens take
        passes of their own. By simulation with the step times of two cores 0.92 with 4 texts, 0.86 with 8, and between
        0.6 and 1 with 16.
        """
        return max(_LEAST_TRUST, 1.0 - _TRUST_LOST * (self.texts - 1))

    def waiting_s(self, tokens: int, *, outside_s: float, last_s: float = 0.0) -> tuple[float, float]:
        """Return what a step takes, and how long a draft waits for it, if all devices wait for each verdict.

        Either all texts are in each step, which waits for the last draft. Or of S texts those are in a step that are
        not outside meanwhile: S·x / (o + 1.5·x) for a step of x, since a draft comes in the middle of one on average
        and has to wait for the next. That is quicker, but drafts that come during one step are answered together ever
        after: it lasts only where a step is short beside the time outside, and so counts for the less the longer it is.

        Args:
            tokens: Of a draft.
            outside_s: From the end of a step to the arrival of the next draft.
            last_s: How much later the last draft comes.
        """
        each_s = self._text_s(tokens)
        together_s = self.step_s + self.texts * each_s
        linear = outside_s - 1.5 * self.step_s - self.texts * each_s
        root_s = (sqrt(linear * linear + 6.0 * self.step_s * outside_s) - linear) / 3.0
        some_s = max(root_s, self.step_s + each_s)
        wait_s = some_s / 2 * min(1.0, self.texts * some_s / (outside_s + 1.5 * some_s))
        apart = max(0.0, 1.0 - together_s / outside_s) if some_s + wait_s < together_s + last_s else 0.0
        return together_s + apart * (some_s - together_s), last_s + apart * (wait_s - last_s)

    def ahead_s(self, tokens: int, *, token_s: float, window: int, present: float) -> float:
        """Return what a step takes if all texts are drafted ahead: all that came meanwhile is in it.

        Args:
            tokens: Of a draft.
            token_s: Time to draft a token.
            window: Most drafts under way.
            present: Share of the texts that are in a step.
        """
        drafting_s = tokens * token_s
        each_s = self._text_s(tokens)
        # A step shorter than it takes to draft has only some texts in it, as many the longer it is.
        some = present * self.texts * each_s / drafting_s if drafting_s else 1.0
        step_s = max(self.step_s + each_s, self.step_s / (1.0 - some) if some < 1.0 else float("inf"))
        if step_s <= drafting_s:
            return step_s
        texts = max(1.0, present * self.texts)
        least_s = self.step_s + texts * (self.text_s - self.free * self.token_s)
        of_each = texts * self.token_s
        drafted = max(0.0, least_s) / (token_s - of_each) if token_s > of_each else float("inf")
        return self.step_s + texts * self._text_s(min(window * tokens, max(tokens, drafted)))

    def _text_s(self, tokens: float) -> float:
        """Return by how much a text makes a step longer with so many tokens of a draft."""
        return self.text_s + max(0.0, tokens - self.free) * self.token_s


PlanName = Literal["stream", "draft", "ahead"]

STREAMED: Final = 32
"""Tokens that an edge is asked to write at a time. It is asked again when half of them have come, so that it need not
pause on a line over which fewer are under way; and no more than these are written for a device that has gone."""

_INSTANT_S: Final = 1e-6

_FAIR: Final = 0.7
"""Acceptance rate of a draft model, where none is measured."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How the next draft is made.

    Attributes:
        tokens: Its length, if the text and the edge have room for it.
        ahead: Whether to draft ahead: the next draft does not wait for the verdict on this one.
        stream: Whether nothing is drafted, and the edge writes so many tokens by itself.
        may_stop: Whether the draft may end sooner, where its next token would hardly stand: see `Pacing.goes_on`.
        repeats: Whether it is made from earlier text, not by the draft model.
        least: Chance to stand that each of its tokens must have then.
    """

    tokens: int
    ahead: bool = False
    stream: bool = False
    may_stop: bool = False
    repeats: bool = False
    least: float = 0.0

    @property
    def name(self) -> PlanName:
        """Which of the three ways it is."""
        return "stream" if self.stream else "ahead" if self.ahead else "draft"


@dataclass(frozen=True, slots=True)
class Choice:
    """The plan that is followed, and why.

    Attributes:
        plan: `stream`: the edge writes by itself; `draft`: the device waits for each verdict; `ahead`: it does not.
        reason: A sentence, with what the other ways promise.
    """

    plan: PlanName
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeLoad:
    """What an edge does at present, and what its steps take; None of what it does not know.

    Attributes:
        texts: That it writes or has verified lately, this one counted in.
        writing_s: Time for a token of each if it writes all of them by itself.
        step_s: A step that verifies drafts, however little is in it.
        text_s: By how much each text makes a step longer, with its first token.
        token_s: By how much each further token of a text does.
        acceptance: Of tokens of such a draft model, the share that it has accepted lately, from all its devices.
        free: Further tokens of a text that cost nothing.
    """

    texts: int = 1
    writing_s: float | None = None
    step_s: float | None = None
    text_s: float | None = None
    token_s: float | None = None
    acceptance: float | None = None
    free: int = 0

    @property
    def alone(self) -> bool:
        """Whether there is no other text."""
        return self.texts == 1

    @property
    def shared(self) -> SharedSteps | None:
        """What steps take that several texts share, if they do and the edge has said so."""
        if self.alone or self.writing_s is None or self.step_s is None or self.text_s is None or self.token_s is None:
            return None
        return SharedSteps(
            texts=self.texts,
            writing_s=max(_INSTANT_S, self.writing_s),
            step_s=self.step_s,
            text_s=self.text_s,
            token_s=self.token_s,
            free=self.free,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftOutcome:
    """What became of a draft.

    Attributes:
        tokens: Drafted.
        ahead: Whether another draft was announced, so that the edge has drawn no token after a draft that stands.
        accepted: Of these tokens, accepted.
        token_s: Mean time to draft one of them; 0 if there is none.
        answer_s: From sending to the verdict.
        compute_s: The edge's step in which it was verified.
        opening: Whether it was the first since the session was opened: its times then hold the prompt's as well.
        chances: Of each token, the probability with which it was drawn; empty if that is not known.
        queue_s: Before it, until that step began.
        repeats: Whether it was made from earlier text beside a draft model, of which it says nothing.
        chained: Tokens of the device's other drafts of this text that the same step verified.
    """

    tokens: int
    ahead: bool
    accepted: int
    token_s: float
    answer_s: float
    compute_s: float
    opening: bool = False
    chances: tuple[float, ...] = ()
    queue_s: float = 0.0
    repeats: bool = False
    chained: int = 0

    @property
    def tested(self) -> int:
        """Tokens that were accepted or rejected, not merely flushed."""
        return min(self.tokens, self.accepted + 1)


class Pacing(Protocol):
    """Decides from what has been measured, never from tokens that are drawn and left out: that would bend the law.

    So a plan is asked for once, before a draft's first token is drawn, and whether to draw another is decided by those
    that the draft has: whatever is drawn is sent.
    """

    def plan(self, *, longest: int, window: int) -> Plan:
        """Return the plan of the next draft.

        Args:
            longest: Most tokens that the edge takes in a draft; a plan for more is cut to it.
            window: Most drafts that it lets be under way.
        """

    def weigh(self, plan: Plan, prospect: Prospect, *, longest: int, window: int) -> Plan:
        """Return a plan to draft from earlier text, if that promises more than the one that was made.

        Args:
            plan: Of the next draft.
            prospect: What earlier text says of the next tokens.
            longest: As in `plan`.
            window: Likewise.
        """

    def goes_on(self, chances: Sequence[float]) -> bool:
        """Return whether to draft another token, where the plan lets the draft end sooner.

        Args:
            chances: Of the tokens that the draft has, the probabilities with which they were drawn; at least one.
        """

    def learn(self, outcome: DraftOutcome) -> None:
        """Take note of a verdict; in the order of the drafts."""

    def streamed(self, tokens: int, seconds: float, *, step_s: float = 0.0) -> None:
        """Take note of what the edge has written by itself.

        Args:
            tokens: How many have come.
            seconds: Since the last ones, while the edge wrote without a pause.
            step_s: The edge's step that has made the last of them; 0 if that is not known.
        """

    def note_load(self, load: EdgeLoad) -> None:
        """Take note of what the edge says of its load, before what came of the draft that it says it with."""

    def choice(self) -> Choice:
        """Return the plan that is followed now, and why."""


@dataclass(frozen=True, slots=True)
class FixedPacing:
    """Always the same.

    Attributes:
        tokens: Draft length, or tokens that the edge writes before it is asked again.
        ahead: Whether to draft ahead of the verdict.
        stream: Whether the edge writes by itself.
    """

    tokens: int = 5
    ahead: bool = False
    stream: bool = False

    def plan(self, *, longest: int, window: int) -> Plan:
        """Return the plan."""
        del longest, window
        return Plan(self.tokens, self.ahead, self.stream)

    def weigh(self, plan: Plan, prospect: Prospect, *, longest: int, window: int) -> Plan:
        """Draft from earlier text where a token of it stands as often as one of a fair draft model."""
        del window
        tokens = min(plan.tokens, longest, len(prospect.stands))
        if plan.stream or not tokens or prospect.acceptance(tokens) < _FAIR:
            return plan
        return replace(plan, repeats=True)

    def goes_on(self, chances: Sequence[float]) -> bool:
        """Go on to the plan's length."""
        del chances
        return True

    def learn(self, outcome: DraftOutcome) -> None:
        """Learn nothing."""

    def streamed(self, tokens: int, seconds: float, *, step_s: float = 0.0) -> None:
        """Learn nothing."""

    def note_load(self, load: EdgeLoad) -> None:
        """Learn nothing."""

    def choice(self) -> Choice:
        """Return the plan."""
        plan = self.plan(longest=self.tokens, window=1)
        return Choice(plan.name, "The settings say so.")
