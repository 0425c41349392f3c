"""Drafts of a session: waiting for verification, answered or rejected, and the results of one judgement."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from fleet_edge.errors import tokens_differ
from fleet_edge.session_log.counters import SegmentCounters
from fleet_edge.sessions.admission import SessionLimits
from sampling.distribution import Dist
from sampling.verification import Judgement
from schemas.fields import TokenLogprobs
from schemas.messages import Draft
from schemas.reasons import Finish
from schemas.vocabulary import extend_digest


@dataclass(frozen=True, slots=True)
class ReceivedDraft:
    """A draft with its arrival (monotonic seconds) and its size (bytes)."""

    draft: Draft
    at: float
    size: int = 0


@dataclass(slots=True)
class WaitingDrafts:
    """Undecided drafts of a session by the position they start at, in whatever order they arrived."""

    _by_base: dict[int, ReceivedDraft] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._by_base)

    def __contains__(self, round_: int) -> bool:
        return any(arrived.draft.round == round_ for arrived in self._by_base.values())

    @property
    def latest(self) -> int:
        return max((arrived.draft.round for arrived in self._by_base.values()), default=-1)

    def at(self, base: int) -> ReceivedDraft | None:
        return self._by_base.get(base)

    def add(self, arrived: ReceivedDraft) -> None:
        """Queue a draft, unless one is queued at its position."""
        self._by_base.setdefault(arrived.draft.base, arrived)

    def remove(self, arrived: ReceivedDraft) -> None:
        del self._by_base[arrived.draft.base]

    def void(self) -> None:
        """Drop all drafts: they start from rejected tokens."""
        self._by_base.clear()

    def chain(self, *, base: int, digest: int, most: int) -> tuple[ReceivedDraft, ...]:
        """Return the drafts that can be verified at once, each starting at the end of the one before.

        `base` counts the committed tokens, `digest` is theirs. The drafts hold at most `most` tokens, but always the
        first draft. Raises `DraftFault` if the first draft starts from other tokens; it is dropped.
        """
        chain: list[ReceivedDraft] = []
        left = most
        while (arrived := self.at(base)) is not None:
            draft = arrived.draft
            if draft.digest != digest:
                if chain:
                    break
                self.remove(arrived)
                raise tokens_differ("The draft starts from other tokens than the edge has.")
            if chain and len(draft.tokens) > left:
                break
            chain.append(arrived)
            left -= len(draft.tokens)
            base += len(draft.tokens)
            digest = extend_digest(digest, draft.tokens)
            if not draft.more or not draft.tokens:
                break
        return tuple(chain)


# A repeat comes within a few round trips; twice the window of unanswered drafts covers it.
_REMEMBERED_PER_WINDOW: Final = 2


@dataclass(slots=True)
class Rounds:
    """Rounds that were counted and answered, kept while repeats may arrive."""

    window: int
    _last_answered: int = -1
    _verdicts: OrderedDict[int, bytes] = field(default_factory=OrderedDict)
    _counted: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def verdict(self, round_: int) -> bytes | None:
        return self._verdicts.get(round_)

    def passed(self, round_: int) -> bool:
        return round_ <= self._last_answered

    def remember(self, round_: int, payload: bytes) -> None:
        self._verdicts[round_] = payload
        while len(self._verdicts) > self._most:
            self._verdicts.popitem(last=False)
        self.mark_answered(round_)

    def mark_answered(self, round_: int) -> None:
        self._last_answered = max(self._last_answered, round_)

    def first_seen(self, round_: int) -> bool:
        """Count a round's draft; return whether it arrived for the first time, in whatever order."""
        at_limit = len(self._counted) >= self._most
        if round_ in self._counted or (at_limit and round_ < next(iter(self._counted))):
            return False
        self._counted[round_] = None
        if at_limit:
            self._counted.popitem(last=False)
        return True

    @property
    def _most(self) -> int:
        return _REMEMBERED_PER_WINDOW * self.window


@dataclass(frozen=True, slots=True)
class DraftResult:
    """One draft's part of a judgement, and parts of the time that its verdict took.

    `tested` tokens were decided on; after the accepted ones comes `token`, drawn by the edge, or at a rejection the
    target distribution `p`. `logprobs` are those of `tokens` and of the rejection, if requested.

    `queue_ms` lasts from the draft's arrival to the start of the step, without `prefill_ms`: steps that computed the
    session's own prompt, which would make an idle edge look overloaded. `batch` counts sessions in the step; 0 if
    nothing was verified. `chained` counts tokens of the session's other drafts in the step.
    """

    arrived: ReceivedDraft
    accepted: int
    tested: int
    token: int | None
    p: Dist | None
    finish: Finish
    logprobs: tuple[TokenLogprobs, ...] = ()
    batch: int = 0
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    compute_ms: float = 0.0
    background: bool = False
    chained: int = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        head = self.arrived.draft.tokens[: self.accepted]
        return head if self.token is None else (*head, self.token)

    @property
    def rejected(self) -> bool:
        return self.p is not None or self.tested > self.accepted

    def add_times_to(self, counters: SegmentCounters) -> None:
        counters.queue_ms += self.queue_ms
        counters.prefill_ms += self.prefill_ms
        counters.compute_ms += self.compute_ms
        counters.batch_sum += self.batch


@dataclass(slots=True)
class PendingCorrection:
    """A rejected draft token whose correction the device draws.

    Attributes:
        p: Target distribution at the rejected position.
        logprobs: Log-probabilities of the correction, as far as the edge knows them.
        requests: Number of requests for further samples.
    """

    p: Dist
    logprobs: tuple[TokenLogprobs, ...] = ()
    requests: int = 0


def split_judgement(
    chain: Sequence[ReceivedDraft], judgement: Judgement, *, limits: SessionLimits, committed: int
) -> list[DraftResult]:
    """Split the judgement on a chain, decided as one draft, into a result for each draft.

    Drafts after a rejection or after the end of the generation are void and get no result. `committed` is the number of
    tokens before the chain.
    """
    settled = []
    left, used = judgement.accepted, 0
    for place, arrived in enumerate(chain):
        drafted = arrived.draft.tokens
        head = drafted[:left]
        left -= len(head)
        rejected = len(head) < len(drafted)
        last = rejected or place == len(chain) - 1
        token = judgement.token if last and not limits.ends(head) else None
        p = judgement.p if rejected else None
        new = head if token is None else (*head, token)
        committed += len(new)
        finish = limits.finish(new, committed=committed)
        rows = judgement.logprobs[used : used + len(new) + (p is not None)]
        used += len(rows)
        settled.append(DraftResult(arrived, len(head), len(head) + rejected, token, p, finish, rows))
        if rejected or finish is not Finish.NO:
            break
    return settled
