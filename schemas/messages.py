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

from schemas.bounds import (
    MAX_DRAFT,
    MAX_TOKENS,
    MAX_WINDOW,
    U16,
    U32,
    AppName,
    Code,
    Count,
    Label,
    Milliseconds,
    Position,
    Seconds,
    Sentence,
    SessionId,
    Tokens,
)
from schemas.downlink import DownlinkForm, TokenId, UnknownForm
from schemas.edge_load import EdgeLoad
from schemas.logprobs import MAX_TOP_LOGPROBS, Logprobs
from schemas.names import Name
from schemas.policy import SamplingPolicy
from schemas.reasons import Action, EndReason, FaultCode, Finish, RefusalCode, unknown_as
from schemas.vocabulary import Vocabulary

PROTOCOL = 1
"""Version of the session messages; an edge refuses an Open of another."""


class _Message(BaseModel):
    # A newer peer may send more than we know; what we do not know, we do not read.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Open(_Message):
    """Asks for a session.

    Attributes:
        protocol: `PROTOCOL` of the sender.
        session: Chosen by the device at random; the session's name for good, across resumes.
        attempt: Rises with each Open of the session that is not a mere repetition of the last.
        vocabulary: The draft model's.
        draft_model: Its name, for the log.
        quantization: Of its weights, for the log.
        policy: Sampling, with the seed.
        prompt: Token ids.
        max_new_tokens: Most tokens to write.
        resume: All tokens committed so far, if the session was opened before.
        logprobs: Asks for the target's log-probabilities of all tokens, and of so many of the likeliest at each place.
        app: Application of the device that the text is for, for the log.
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
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS, strict=True)] | None = None
    app: AppName | None = None


class Opened(_Message):
    """Grants a session.

    Attributes:
        session: As asked.
        attempt: As asked.
        handle: The session's short name in drafts and verdicts, per device.
        edge: Where to send drafts.
        target: The large model's name.
        position: Tokens taken over from `resume`.
        max_new_tokens: Granted; less than asked where the context is short.
        max_draft: Most tokens in one draft.
        window: Most drafts under way at once.
        lease_s: Seconds of silence after which the edge forgets the session.
        end_tokens: Ids that end the text.
        logprobs: As asked; None where the edge tells no log-probabilities.
        load: What the edge does at present, and what its steps take.
    """

    kind: Literal["opened"] = "opened"
    session: SessionId
    attempt: U32 = 0
    handle: U16
    edge: Name
    target: Label
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
        code: Why.
        sentence: The same for a person, with what to do.
        retry_s: Seconds after which the same Open may be granted; None if the edge cannot tell.
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
        round: Number of this draft in the session, rising; (session, round) names one decision.
        epoch: Rejections seen since Opened. Drafts of an older epoch than the edge's are void.
        base: Tokens committed before this draft, `fix` and drafts still under way counted in.
        fix: The correction that the device drew after the last rejection; the token at `base - 1`.
        tokens: The proposal.
        counts: For each token, its draft probability in 1/65,536; residual mode only.
        more: Whether another draft follows without waiting, so that no bonus token is due.
        digest: CRC-32 over the committed tokens up to `base`.
        tried: Asks for further samples at the last rejection: the number tried in vain.
        write: Asks the edge to write by itself: so many tokens from `base` on, at most; 0 asks it to stop.
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
            raise ValueError("a request for samples carries no draft")
        if self.write is not None and (self.tokens or self.more or self.tried is not None):
            raise ValueError("a request to write carries no draft")
        return self


class Verdict(_Message):
    """Answers a draft (hot).

    Attributes:
        handle: As in the draft.
        round: As in the draft; no round is used twice, so the epoch needs no mention.
        accepted: Length of the accepted head.
        next: The token after it (bonus token, or the target's own token in coupled mode); or p at the
            rejected position, from which the device draws; or None, when nothing is due.
        finish: Whether the text ends here.
        queue_ms: From arrival to the step that verified it, or to the answer if nothing was to be verified; without the
            time in which the session's own prompt was computed meanwhile, or its text anew.
        compute_ms: That step's time.
        base: Where the edge writes by itself: position of the first of `written`.
        written: The text from `base` on, as far as it is written; None in the answer to a draft.
        load: What the edge does at present, where it has changed since the device was told last.
        chained: Tokens of the session's other drafts that were verified in the same step; None if there were none. What
            the step took beyond that for an empty draft is theirs as well, and not another text's.
        logprobs: Where they were asked for: of the accepted head and of `next`, or of `written`.
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

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.base is None) != (self.written is None):
            raise ValueError("what the edge writes by itself has a place, and only that")
        if self.written is not None and (self.accepted or self.next is not None):
            raise ValueError("a verdict answers a draft or carries what the edge has written, not both")
        return self


class Fault(_Message):
    """Answers a draft that cannot be judged; nothing has changed at the edge.

    Attributes:
        handle: As in the draft, where it could be read.
        round: Likewise.
        code: What was wrong.
        action: What to do about it.
        sentence: The same for a person.
        retry_s: Seconds to wait: where the action is to wait, before the draft is sent again; where it is to give up,
            as for a device that is shut out, before any session is worth asking for.
    """

    kind: Literal["fault"] = "fault"
    handle: U16 | None = None
    round: U32 | None = None
    code: Annotated[FaultCode, unknown_as(FaultCode.OTHER)]
    action: Annotated[Action, unknown_as(Action.GIVE_UP)]
    sentence: Sentence
    retry_s: Seconds | None = None


class Close(_Message):
    """Ends a session from the device, with what it counted.

    Attributes:
        session: From Open.
        handle: From Opened; None if it never was.
        edge: Likewise: whose session it is. All edges hear the Close, and only that one answers. None, too, if it went
            away before it answered: then any that hears of it writes the end down.
        reason: How it ended.
        tokens: Committed.
        fix: The last correction, if no draft carried it any more.
        digest: CRC-32 over all committed tokens.
        drafted: Tokens proposed.
        tested: Proposed tokens that were accepted or rejected, not merely flushed.
        accepted: Of these, accepted.
        rounds: Drafts judged.
        uplink_bytes: Payload of all drafts sent, repeats counted in.
        downlink_bytes: Payload of all verdicts received, repeats counted in.
        draft_ms: Spent in the draft model.
        wait_ms: Spent waiting for verdicts.
        wall_ms: From Open to Close.
        unverified: Tokens at the end of the text that do not follow the target's law: the device has written on without
            an edge, or an edge behind that. None of a text that was verified whole.
        age_s: Seconds since the text ended, if this is told later than that.
        code: Why it has failed, as programs read it, if it has.
        sentence: The same for a person; nothing of the text, nor of its prompt.
        app: Application of the device that the text was for, if no edge has been told of it by an Open.
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
    unverified: U32 | None = None
    age_s: Seconds | None = None
    code: Code | None = None
    sentence: Sentence | None = None
    app: AppName | None = None


class Closed(_Message):
    """Confirms the end, or tells of it, with what the edge counted.

    Attributes:
        session: From Open.
        attempt: Of the Open whose end this is, so that the end of a part long resumed elsewhere is told from
            the session's; None if the edge does not know the session.
        reason: How it ended.
        tokens: Committed at the edge.
        rounds: Verdicts given.
        mean_batch: Mean number of sessions verified in one step, this one counted in, over the rounds that verified.
        queue_ms: Sum over rounds.
        compute_ms: Sum over rounds.
        reused: Tokens of the prompt, and of a text that was resumed, that the edge had computed before; None if the
            edge does not tell.
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


SessionReply = Annotated[Opened | Refused | Closed | Fault, Field(discriminator="kind")]
"""What arrives on `down/session`."""
