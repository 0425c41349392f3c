"""Binary messages of a session, up and down.

A session is opened, drafted and judged round by round, and closed:

    device                                   edge
    Open(prompt, policy)           ─────▶
                                   ◀─────    Opened(handle, limits) | Refused
    Draft(round, tokens, counts)   ─────▶
                                   ◀─────    Verdict(accepted, next) | Fault
    Close(counters)                ─────▶
                                   ◀─────    Closed(counters)

`base` counts the new tokens committed so far, the prompt left out; so does every `position`.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from schemas.downlink import DownlinkForm, UnknownForm
from schemas.fields import (
    MAX_DRAFT,
    MAX_TOKENS,
    MAX_TOP_LOGPROBS,
    MAX_WINDOW,
    U16,
    U32,
    AppName,
    Code,
    Count,
    EdgeLoad,
    Label,
    Logprobs,
    Milliseconds,
    Position,
    Seconds,
    Sentence,
    SessionId,
    TargetId,
    TokenId,
    Tokens,
)
from schemas.names import Name
from schemas.policy import SamplingPolicy
from schemas.reasons import Action, EndReason, FaultCode, Finish, RefusalCode, unknown_as
from schemas.vocabulary import Vocabulary

PROTOCOL = 1
"""Version of the session messages; an edge refuses an Open of another."""


class _Message(BaseModel):
    # A newer peer may send unknown fields, which are ignored.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Open(_Message):
    """Requests a session.

    Attributes:
        protocol: `PROTOCOL` of the sender.
        session: Random name of the session, chosen by the device and kept across resumes.
        attempt: Incremented with each Open of the session that is not a mere repetition of the last.
        vocabulary: Of the draft model.
        draft_model: Its name, for the log.
        quantization: Of its weights, for the log.
        policy: Sampling, with the seed.
        prompt: Token ids.
        max_new_tokens: Most tokens to generate.
        resume: All tokens committed so far, if the session was opened before.
        target_id: Identity of the target model that `resume` is of, or that the prompt is rendered for; an edge with
            another one refuses. None if any target model may serve the request.
        logprobs: Requests the target's log-probabilities of all tokens, and of this number of most likely tokens at
            each position.
        app: Application of the device that the request is for, for the log.
        echo: Requests the log-probabilities of the prompt's tokens too, like `logprobs`. They come with the first
            tokens of edge-only decoding.
        wait_s: Seconds for which the application waits; None if it has set no limit. An edge whose first token would
            come later refuses.
    """

    kind: Literal["open"] = "open"
    protocol: U16 = PROTOCOL
    session: SessionId
    attempt: U32 = 0
    vocabulary: Vocabulary
    draft_model: Label
    quantization: Label
    policy: SamplingPolicy
    prompt: Tokens
    max_new_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS, strict=True)]
    resume: Tokens | None = None
    target_id: TargetId | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS, strict=True)] | None = None
    app: AppName | None = None
    echo: Annotated[bool, Field(strict=True)] | None = None
    wait_s: Seconds | None = None


class Opened(_Message):
    """Grants a session.

    Attributes:
        session: From Open.
        attempt: From Open.
        handle: Short name of the session in drafts and verdicts, per device.
        edge: Destination of drafts.
        target: Name of the large model.
        target_id: Its identity.
        position: Tokens accepted from `resume`.
        max_new_tokens: Granted; less than requested if the context is short.
        max_draft: Most tokens in one draft.
        window: Most drafts without a verdict.
        lease_s: Seconds of silence after which the edge forgets the session.
        end_tokens: Ids that end the generation.
        logprobs: As requested; None if the edge sends no log-probabilities.
        load: Load of the edge, and durations of its steps.
    """

    kind: Literal["opened"] = "opened"
    session: SessionId
    attempt: U32 = 0
    handle: U16
    edge: Name
    target: Label
    target_id: TargetId
    position: Position
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS, strict=True)]
    max_draft: Annotated[int, Field(ge=0, le=MAX_DRAFT, strict=True)]
    window: Annotated[int, Field(ge=1, le=MAX_WINDOW, strict=True)]
    lease_s: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
    end_tokens: Annotated[tuple[TokenId, ...], Field(fail_fast=True)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS, strict=True)] | None = None
    load: EdgeLoad | None = None


class Refused(_Message):
    """Declines an Open.

    Attributes:
        session: From Open.
        code: Reason.
        sentence: Reason and remedy for people.
        retry_s: Seconds after which the same Open may be granted; None if unknown.
    """

    kind: Literal["refused"] = "refused"
    session: SessionId
    code: Annotated[RefusalCode, unknown_as(RefusalCode.OTHER)]
    sentence: Sentence
    retry_s: Seconds | None = None


class Draft(_Message):
    """Proposes tokens (hot).

    Attributes:
        handle: From Opened.
        round: Number of this draft in the session, ascending; (session, round) identifies one decision.
        epoch: Rejections seen since Opened. Drafts of an older epoch than the edge's are void.
        base: Tokens committed before this draft, including `fix` and drafts without a verdict.
        fix: Correction that the device drew after the last rejection; the token at `base - 1`.
        tokens: The proposal.
        counts: For each token, its draft probability in 1/65,536; residual mode only.
        more: Whether another draft follows at once, so that no bonus token is needed.
        digest: CRC-32 over the committed tokens up to `base`.
        tried: Requests further samples at the last rejection: the number tried without success.
        write: Requests edge-only decoding of up to this number of tokens from `base` on; 0 stops it.
    """

    handle: U16
    round: U32
    epoch: U32
    base: Position
    fix: TokenId | None = None
    tokens: Annotated[tuple[TokenId, ...], Field(max_length=MAX_DRAFT)] = ()
    counts: Annotated[tuple[Count, ...], Field(max_length=MAX_DRAFT)] | None = None
    more: Annotated[bool, Field(strict=True)] = False
    digest: U32
    tried: Annotated[int, Field(ge=1, lt=1 << 20, strict=True)] | None = None
    write: Annotated[int, Field(ge=0, le=MAX_TOKENS, strict=True)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.counts is not None and len(self.counts) != len(self.tokens):
            raise ValueError("tokens and counts differ in number")
        if self.tried is not None and (self.tokens or self.fix is not None or self.more):
            raise ValueError("a request for samples has no draft")
        if self.write is not None and (self.tokens or self.more or self.tried is not None):
            raise ValueError("a request for edge-only decoding has no draft")
        return self


class Verdict(_Message):
    """Answers a draft (hot).

    Attributes:
        handle: From the draft.
        round: From the draft; no round is used twice, so the epoch is not repeated.
        accepted: Number of accepted tokens.
        next: The token after them (bonus token, or the target's own token in coupled mode); or p at the rejected
            position, from which the device draws; or None if nothing is needed.
        finish: Whether the generation ends here.
        queue_ms: From arrival to the step that verified it, or to the answer if there was nothing to verify; without
            the time for computing the session's own prompt or recomputing its tokens.
        compute_ms: Duration of that step.
        base: In edge-only decoding, the position of the first of `written`.
        written: In edge-only decoding, the tokens generated from `base` on; None in the answer to a draft.
        load: Load of the edge, if it has changed since it was last sent to the device.
        chained: Tokens of the session's other drafts that were verified in the same step; None if there were none.
            They, and no other session, account for what the step took beyond an empty draft.
        logprobs: If requested: of the accepted tokens and of `next`, or of `written`.
        prompt: If requested by `echo`, with `base` 0: log-probabilities of the prompt's tokens after the first.
    """

    handle: U16
    round: U32
    accepted: Annotated[int, Field(ge=0, le=MAX_DRAFT, strict=True)]
    next: TokenId | DownlinkForm | SkipJsonSchema[UnknownForm] | None = None
    finish: Annotated[Finish, unknown_as(Finish.LENGTH)] = Finish.NO
    queue_ms: Milliseconds = 0.0
    compute_ms: Milliseconds = 0.0
    base: Position | None = None
    written: Tokens | None = None
    load: EdgeLoad | None = None
    chained: Annotated[int, Field(ge=1, le=MAX_DRAFT * MAX_WINDOW, strict=True)] | None = None
    logprobs: Logprobs | None = None
    prompt: Logprobs | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.base is None) != (self.written is None):
            raise ValueError("edge-only tokens need a position, and nothing else has one")
        if self.written is not None and (self.accepted or self.next is not None):
            raise ValueError("a verdict answers a draft or has edge-only tokens, not both")
        return self


class Fault(_Message):
    """Answers a draft that cannot be verified; nothing has changed at the edge.

    Attributes:
        handle: From the draft, if it could be read.
        round: Likewise.
        code: What was wrong.
        action: What to do about it.
        sentence: The same for people.
        retry_s: Seconds to wait. With `WAIT`, before the draft is sent again; with `GIVE_UP`, as for a quarantined
            device, before any session is requested.
    """

    kind: Literal["fault"] = "fault"
    handle: U16 | None = None
    round: U32 | None = None
    code: Annotated[FaultCode, unknown_as(FaultCode.OTHER)]
    action: Annotated[Action, unknown_as(Action.GIVE_UP)]
    sentence: Sentence
    retry_s: Seconds | None = None


class Close(_Message):
    """Ends a session from the device, with its counters.

    Attributes:
        session: From Open.
        handle: From Opened; None if there was none.
        edge: Likewise: the edge of the session. All edges receive the Close, and only this one answers. None also if
            the edge went away before it answered: then any edge records the end.
        reason: How it ended.
        tokens: Committed.
        fix: The last correction, if no draft contains it.
        digest: CRC-32 over all committed tokens.
        drafted: Tokens proposed.
        tested: Proposed tokens that were accepted or rejected, not merely flushed.
        accepted: Of these, accepted.
        rounds: Drafts with a verdict.
        uplink_bytes: Payload of all drafts sent, including repeats.
        downlink_bytes: Payload of all verdicts received, including repeats.
        draft_ms: Time in the draft model.
        wait_ms: Time waiting for verdicts.
        wall_ms: From Open to Close.
        quota_wait_ms: Part of `wait_ms` that edges asked for because a quota was used up. None for none.
        unverified: Tokens at the end that do not follow the distribution of the target model that the request began
            with: generated on the device without an edge, by another target model, or after such tokens. None for none.
        age_s: Seconds since the request ended, if this is sent later.
        code: Reason of a failure, for programs.
        sentence: The same for people; without anything of the text or its prompt.
        app: Application of the device, if no Open has named it to an edge.
    """

    kind: Literal["close"] = "close"
    session: SessionId
    handle: U16 | None
    edge: Name | None = None
    reason: Annotated[EndReason, unknown_as(EndReason.FAILED)]
    tokens: Position
    fix: TokenId | None = None
    digest: U32
    drafted: U32
    tested: U32
    accepted: U32
    rounds: U32
    uplink_bytes: U32
    downlink_bytes: U32
    draft_ms: Milliseconds
    wait_ms: Milliseconds
    wall_ms: Milliseconds
    quota_wait_ms: Milliseconds | None = None
    unverified: U32 | None = None
    age_s: Seconds | None = None
    code: Code | None = None
    sentence: Sentence | None = None
    app: AppName | None = None


class Closed(_Message):
    """Confirms or reports the end of a session, with the edge's counters.

    Attributes:
        session: From Open.
        attempt: Of the Open that this ends, to distinguish the end of a part that was resumed elsewhere from the
            session's; None if the edge does not know the session.
        reason: How it ended.
        tokens: Committed at the edge.
        rounds: Verdicts sent.
        mean_batch: Mean number of sessions verified in one step, including this one, over the rounds with verification.
        queue_ms: Sum over rounds.
        compute_ms: Sum over rounds.
        reused: Tokens of the prompt, and of a resumed generation, that the edge had computed before; None if unknown.
    """

    kind: Literal["closed"] = "closed"
    session: SessionId
    attempt: U32 | None = None
    reason: Annotated[EndReason, unknown_as(EndReason.FAILED)]
    tokens: Position
    rounds: U32
    mean_batch: Annotated[float, Field(ge=0.0, allow_inf_nan=False, strict=True)]
    queue_ms: Milliseconds
    compute_ms: Milliseconds
    reused: U32 | None = None


class Progress(_Message):
    """How far the edge is with what a session waits for; sent while it computes and sends nothing else.

    A device that receives it knows that the edge works, and waits on.

    Attributes:
        handle: Of the session.
        computed: Tokens of the session that are computed.
        tokens: Tokens of the session that are to be computed before its next verdict, those included.
        ahead: Tokens of other sessions that are computed before.
        tokens_per_s: Rate at which the edge computes them; None before it is measured.
    """

    kind: Literal["progress"] = "progress"
    handle: U16
    computed: Position
    tokens: Position
    ahead: U32
    tokens_per_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False, strict=True)] | None = None

    @property
    def left_s(self) -> float | None:
        """Seconds until the session is computed; None if unknown."""
        left = self.ahead + max(0, self.tokens - self.computed)
        return None if self.tokens_per_s is None else left / self.tokens_per_s


SessionReply = Annotated[Opened | Refused | Closed | Fault | Progress, Field(discriminator="kind")]
"""Messages on `down/session`."""
