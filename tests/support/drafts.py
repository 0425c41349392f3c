"""An edge session, messages for it and reports on its steps, made by hand."""

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

from fleet_edge.batching.steps import Batch, StepReport, StepTimes, WorkItem
from fleet_edge.sessions.admission import SessionLimits
from fleet_edge.sessions.drafts import DraftResult, ReceivedDraft
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.verifiers.contract import Item, TargetInfo
from schemas.messages import Close, Draft, Open
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import EndReason, Finish
from schemas.vocabulary import EMPTY_DIGEST, Vocabulary, extend_digest

VOCABULARY = Vocabulary.of([f"t{token}" for token in range(10)])
TOY = TargetInfo("toy", VOCABULARY, context=32, end_tokens=(0, 3)).identified(b"toy")
LIMITS = SessionLimits(max_new_tokens=20, max_draft=4, window=2, vocabulary=10, end_tokens=frozenset({0}))


def open_message(
    *,
    session: bytes = b"session1",
    attempt: int = 0,
    prompt: Sequence[int] = (1, 2, 3),
    mode: Mode = Mode.RESIDUAL,
    resume: tuple[int, ...] | None = None,
    max_new_tokens: int = 20,
    **other: object,
) -> Open:
    fields = {
        "session": session,
        "attempt": attempt,
        "vocabulary": VOCABULARY,
        "draft_model": "toy",
        "quantization": "none",
        "policy": SamplingPolicy(mode=mode, seed=1),
        "prompt": tuple(prompt),
        "max_new_tokens": max_new_tokens,
        "resume": resume,
    }
    return Open.model_validate(fields | other)


def edge_session(
    *, handle: int = 7, device: str = "device-1", limits: SessionLimits = LIMITS, **message: object
) -> EdgeSession:
    return EdgeSession.from_open(open_message(**message), handle=handle, device=device, limits=limits)  # type: ignore[arg-type]


_known_session = lru_cache(lambda handle: edge_session(handle=handle))


def step_report(
    tokens: Mapping[int, int], *, step_s: float, at: float = 0.0, background: Collection[int] = ()
) -> StepReport:
    """Return the report on a step that ends at a time, by the number of tokens of each session."""
    works = [
        WorkItem(_known_session(handle), Item(handle, (1,) * number, number), background=handle in background)
        for handle, number in tokens.items()
    ]
    return StepReport(Batch(works), StepTimes(at - step_s, at, sessions=len(works)))


def draft(
    tokens: Sequence[int] = (4, 5),
    *,
    text: Sequence[int] = (),
    handle: int = 7,
    round_: int = 0,
    epoch: int = 0,
    counted: bool = True,
    **other: object,
) -> Draft:
    """Return a draft that continues `text`, which ends in its `fix` if it has one."""
    fields = {
        "handle": handle,
        "round": round_,
        "epoch": epoch,
        "base": len(text),
        "tokens": tuple(tokens),
        "counts": (30_000,) * len(tokens) if counted else None,
        "digest": extend_digest(EMPTY_DIGEST, text),
    }
    return Draft.model_validate(fields | other)


def close(**given: object) -> Close:
    """Return the Close of a session that has done nothing but what is given."""
    counts = dict.fromkeys(("digest", "drafted", "tested", "accepted", "rounds", "uplink_bytes", "downlink_bytes"), 0)
    times = dict.fromkeys(("draft_ms", "wait_ms", "wall_ms"), 0.0)
    fields = {"session": b"session1", "handle": 7, "reason": EndReason.STOP, "tokens": 0, **counts, **times}
    return Close.model_validate(fields | given)


def result(received: ReceivedDraft, *, tested: int = 0, **other: object) -> DraftResult:
    """Return the result on a draft of which no token was accepted."""
    return DraftResult(received, 0, tested, None, None, Finish.NO, **other)  # type: ignore[arg-type]


def arrived(message: Draft, *, at: float = 0.0) -> ReceivedDraft:
    return ReceivedDraft(message, at, 40)
