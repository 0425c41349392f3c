"""Random valid messages."""

from typing import Any

from hypothesis import strategies as st

from schemas.downlink import Dense, Samples, Sparse
from schemas.fields import MAX_DRAFT, MAX_VOCABULARY, MAX_WINDOW, EdgeLoad, Logprobs
from schemas.messages import Close, Closed, Draft, Fault, Open, Opened, Progress, Refused, Verdict
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import Action, EndReason, FaultCode, Finish, RefusalCode
from schemas.vocabulary import Vocabulary

U16 = st.integers(0, (1 << 16) - 1)
U32 = st.integers(0, (1 << 32) - 1)
POSITION = st.integers(0, (1 << 20) - 1)
TOKEN = st.integers(0, MAX_VOCABULARY - 1)
SESSION = st.binary(min_size=8, max_size=8)
MILLISECONDS = st.floats(0, 1e9, allow_nan=False)
LABEL = st.text(st.characters(codec="utf-8"), max_size=40)
NAME = st.from_regex(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,20}[A-Za-z0-9])?", fullmatch=True)
POLICIES = st.builds(
    SamplingPolicy,
    mode=st.sampled_from(Mode),
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 1_000_000),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 2**64 - 1),
)
VOCABULARIES = st.builds(
    Vocabulary, size=st.integers(2, MAX_VOCABULARY), fingerprint=st.binary(min_size=32, max_size=32)
)


@st.composite
def drafts(draw: st.DrawFn) -> Draft:
    head = {
        "handle": draw(U16),
        "round": draw(U32),
        "epoch": draw(U32),
        "base": draw(POSITION),
        "digest": draw(U32),
    }
    if draw(st.booleans()):
        return Draft(**head, tried=draw(st.integers(1, (1 << 20) - 1)))
    if draw(st.booleans()):
        counts = draw(st.none() | st.just(()))
        return Draft(**head, fix=draw(st.none() | TOKEN), counts=counts, write=draw(st.integers(0, 1 << 17)))
    tokens = draw(st.lists(TOKEN, max_size=MAX_DRAFT))
    counts = draw(st.none() | st.lists(st.integers(1, 1 << 16), min_size=len(tokens), max_size=len(tokens)))
    return Draft(
        **head,
        fix=draw(st.none() | TOKEN),
        tokens=tuple(tokens),
        counts=None if counts is None else tuple(counts),
        more=draw(st.booleans()),
    )


@st.composite
def sparse_forms(draw: st.DrawFn) -> Sparse:
    size = 1 << draw(st.integers(0, 6))
    ids = draw(st.lists(TOKEN, min_size=size, max_size=size, unique=True))
    return Sparse(ids=tuple(ids), probs=(1.0 / size,) * size)


@st.composite
def sample_forms(draw: st.DrawFn) -> Samples:
    ids = draw(st.lists(TOKEN, min_size=1, max_size=40))
    probs = draw(st.lists(st.floats(2.0**-20, 1, width=32), min_size=len(ids), max_size=len(ids)))
    return Samples(start=draw(st.integers(0, (1 << 20) - 1)), ids=tuple(ids), probs=tuple(probs))


@st.composite
def dense_forms(draw: st.DrawFn) -> Dense:
    size = 1 << draw(st.integers(1, 6))
    return Dense(probs=(b"\x00\x00\x00\x00" * (size - 1)) + b"\x00\x00\x80\x3f")


@st.composite
def logprobs(draw: st.DrawFn) -> Logprobs:
    number, most = draw(st.integers(1, 17)), draw(st.integers(0, 20))
    several = number * most
    values = st.floats(-9999, 0, width=32)
    return Logprobs(
        own=tuple(draw(st.lists(values, min_size=number, max_size=number))),
        ids=tuple(draw(st.lists(TOKEN, min_size=several, max_size=several))),
        values=tuple(draw(st.lists(values, min_size=several, max_size=several))),
    )


def loads(times: st.SearchStrategy[float]) -> st.SearchStrategy[EdgeLoad]:
    known: dict[str, Any] = dict.fromkeys(("writing_ms", "step_ms", "request_ms", "token_ms"), st.none() | times)
    known |= {"acceptance": st.none() | st.floats(0, 1, width=16), "free": st.integers(0, MAX_DRAFT)}
    return st.builds(EdgeLoad, requests=st.integers(1, (1 << 16) - 1), **known)


def verdicts() -> st.SearchStrategy[Verdict]:
    # Times are sent in half precision, so only such values are unchanged.
    times = st.floats(0, 65504, width=16)
    written = st.builds(
        Verdict,
        handle=U16,
        round=U32,
        accepted=st.just(0),
        finish=st.sampled_from(Finish),
        queue_ms=times,
        compute_ms=times,
        base=POSITION,
        written=st.lists(TOKEN, max_size=50).map(tuple),
        load=st.none() | loads(times),
        chained=st.none() | st.integers(1, MAX_DRAFT * MAX_WINDOW),
        logprobs=st.none() | logprobs(),
        prompt=st.none() | logprobs(),
    )
    return written | st.builds(
        Verdict,
        handle=U16,
        round=U32,
        accepted=st.integers(0, MAX_DRAFT),
        next=st.none() | TOKEN | sparse_forms() | sample_forms() | dense_forms(),
        finish=st.sampled_from(Finish),
        queue_ms=times,
        compute_ms=times,
        load=st.none() | loads(times),
        chained=st.none() | st.integers(1, MAX_DRAFT * MAX_WINDOW),
        logprobs=st.none() | logprobs(),
    )


def opens() -> st.SearchStrategy[Open]:
    tokens = st.lists(TOKEN, max_size=50).map(tuple)
    return st.builds(
        Open,
        session=SESSION,
        attempt=U32,
        vocabulary=VOCABULARIES,
        draft_model=LABEL,
        quantization=LABEL,
        policy=POLICIES,
        prompt=tokens,
        max_new_tokens=st.integers(0, 1 << 17),
        resume=st.none() | tokens,
        target_id=st.none() | SESSION,
        logprobs=st.none() | st.integers(0, 20),
        echo=st.none() | st.booleans(),
        app=st.none() | NAME.map(lambda name: name[:40]),
    )


def closes() -> st.SearchStrategy[Close]:
    counts = ("digest", "drafted", "tested", "accepted", "rounds", "uplink_bytes", "downlink_bytes")
    return st.builds(
        Close,
        session=SESSION,
        handle=st.none() | U16,
        edge=st.none() | NAME,
        reason=st.sampled_from(EndReason),
        tokens=POSITION,
        fix=st.none() | TOKEN,
        draft_ms=MILLISECONDS,
        wait_ms=MILLISECONDS,
        wall_ms=MILLISECONDS,
        quota_wait_ms=st.none() | MILLISECONDS,
        unverified=st.none() | U32,
        age_s=st.none() | MILLISECONDS,
        code=st.none() | st.from_regex(r"[a-z][a-z0-9-]{0,39}", fullmatch=True),
        sentence=st.none() | st.text(st.characters(codec="utf-8"), max_size=80),
        app=st.none() | NAME.map(lambda name: name[:40]),
        **dict.fromkeys(counts, U32),
    )


def replies() -> st.SearchStrategy[Opened | Refused | Closed | Fault | Progress]:
    sentence = st.text(st.characters(codec="utf-8"), max_size=80)
    opened = st.builds(
        Opened,
        session=SESSION,
        attempt=U32,
        handle=U16,
        edge=NAME,
        target=LABEL,
        target_id=SESSION,
        position=POSITION,
        max_new_tokens=st.integers(1, 1 << 17),
        max_draft=st.integers(0, MAX_DRAFT),
        window=st.integers(1, 64),
        lease_s=st.floats(0.5, 1e6),
        end_tokens=st.lists(TOKEN, max_size=8).map(tuple),
        logprobs=st.none() | st.integers(0, 20),
        load=st.none() | loads(st.floats(0, 65504, width=16)),
    )
    closed = st.builds(
        Closed,
        session=SESSION,
        attempt=st.none() | U32,
        reason=st.sampled_from(EndReason),
        tokens=POSITION,
        rounds=U32,
        mean_batch=MILLISECONDS,
        queue_ms=MILLISECONDS,
        compute_ms=MILLISECONDS,
    )
    retry_s = st.none() | st.floats(0, 1e6)
    refused = st.builds(Refused, session=SESSION, code=st.sampled_from(RefusalCode), sentence=sentence, retry_s=retry_s)
    fault = st.builds(
        Fault,
        handle=st.none() | U16,
        round=st.none() | U32,
        code=st.sampled_from(FaultCode),
        action=st.sampled_from(Action),
        sentence=sentence,
        retry_s=retry_s,
    )
    progress = st.builds(
        Progress,
        handle=U16,
        computed=POSITION,
        tokens=POSITION,
        ahead=U32,
        tokens_per_s=st.none() | st.floats(0, 1e9, exclude_min=True),
    )
    return opened | closed | refused | fault | progress
