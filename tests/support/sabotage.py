"""Planted faults that a proof of exactness must find: each is a mistake of published code."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from enum import StrEnum
from functools import partial
from typing import Any, Final
from unittest.mock import patch

import numpy as np

from fleet_device.client.agent import Agent
from fleet_device.client.drafting import DraftSequence
from fleet_device.drafters.unlike import CommonTokens
from fleet_device.requests.generate import GenerateRequest, Generation, RequestContext
from fleet_edge import orchestrator
from fleet_edge.batching.judging import Case
from fleet_edge.batching.shaping import ShapedRows, shape_rows
from fleet_edge.sessions.grammars import Constraint
from fleet_edge.verifiers.contract import Item, TargetInfo, Verifier
from sampling.distribution import TOTAL, Dist, QuantizedDist, quantize, shape
from sampling.downlink import correct
from sampling.drawing import Proposal, Purpose, propose, random_uniform
from sampling.verification import Judgement, decode
from schemas.downlink import DownlinkForm
from schemas.policy import SamplingPolicy
from tests.support.toy_pair import TEMPERATURE, ToyPair


class Sabotage(StrEnum):
    NONE = "none"
    ACCEPTANCE_LOW = "acceptance-low"
    BIAS_LATE = "bias-late"
    CORRECTED_FROM_P = "corrected-from-p"
    CUT_SHORT = "cut-short"
    DRAFT_NOT_COUNTED = "draft-not-counted"
    GUESS_KEPT = "guess-kept"
    GUESS_LIKELIEST = "guess-likeliest"
    GUESS_SHIFTED = "guess-shifted"
    INVERTED = "inverted"
    LIKELIEST = "likeliest"
    LOG_SHORT = "log-short"
    MASKED_HALF = "masked-half"
    MASKED_LATE = "masked-late"
    MASK_NOT_RENORMALISED = "mask-not-renormalised"
    MISREPORTED = "misreported"
    NO_RESIDUAL = "no-residual"
    NOT_RENORMALISED = "not-renormalised"
    NUCLEUS_SHORT = "nucleus-short"
    REPORTED_HIGH = "reported-high"
    SEEDS_SHARED = "seeds-shared"
    SHIFTED = "shifted"
    TARGETS_ALIKE = "targets-alike"
    TEMPERED_TWICE = "tempered-twice"
    UNMAPPED = "unmapped"
    UNSHAPED = "unshaped"
    WITHHELD = "withheld"


SMALL: Final = 0.02
"""Of the small mistakes: share of accepted tokens that are rejected, and by which a reported q is too high."""

FROM_P: Final = 0.03
"""Share of corrections that are drawn from p."""

UNSURE: Final = 0.5
"""Below this probability the toy draft model counts as unsure of a token."""


def _accept_inverted(p: float, count: int, uniform: float) -> bool:
    return uniform * p < count / TOTAL


def _accept_low(p: float, count: int, uniform: float) -> bool:
    return uniform < (1.0 - SMALL) * min(1.0, p * TOTAL / count)


def _correct_without_residual(
    form: DownlinkForm, quantized: QuantizedDist, *, policy: SamplingPolicy, position: int
) -> int | None:
    # An empty q: the residual of p over nothing is p.
    nothing = QuantizedDist(quantized.ids[:1], np.zeros(1, dtype=np.int64))
    return correct(form, nothing, policy=policy, position=position)


def _propose_misreported(q: Dist, *, policy: SamplingPolicy, position: int) -> Proposal:
    proposal = propose(q, policy=policy, position=position)
    if proposal.quantized is None:
        return proposal
    flat = quantize(Dist(q.ids, np.full(len(q), 1.0 / len(q))))
    return Proposal(proposal.token, flat.count(proposal.token), flat)


def _correct_sometimes_from_p(
    form: DownlinkForm, quantized: QuantizedDist, *, policy: SamplingPolicy, position: int
) -> int | None:
    wrong = random_uniform(policy.seed, position, Purpose.THIN, 1 << 20) < FROM_P
    return (_correct_without_residual if wrong else correct)(form, quantized, policy=policy, position=position)


def _propose_high(q: Dist, *, policy: SamplingPolicy, position: int) -> Proposal:
    proposal = propose(q, policy=policy, position=position)
    if proposal.count is None:
        return proposal
    return replace(proposal, count=min(TOTAL, round(proposal.count * (1.0 + SMALL))))


def _generate_in_pairs(self: Agent, request: GenerateRequest, context: RequestContext | None = None) -> Generation:
    policy = request.policy.model_copy(update={"seed": request.policy.seed & ~1})
    return _generate(self, replace(request, policy=policy), context)


_generate: Final = Agent.generate


def _restrict_without_renormalising(common: CommonTokens, dist: Dist) -> Dist | None:
    ids = common.to_target[dist.ids]
    kept = ids >= 0
    return Dist(ids[kept], dist.probs[kept]) if kept.any() else None


def _propose_not_renormalised(q: Dist, *, policy: SamplingPolicy, position: int) -> Proposal:
    proposal = propose(q, policy=policy, position=position)  # draws as from what is whole
    if proposal.quantized is None:
        return proposal
    scaled = np.maximum(1, (proposal.quantized.counts * q.probs.sum()).astype(np.int64))
    reported = QuantizedDist(proposal.quantized.ids, scaled)
    return Proposal(proposal.token, reported.count(proposal.token), reported)


def _propose_unmapped(q: Dist, *, policy: SamplingPolicy, position: int) -> Proposal:
    proposal = propose(q, policy=policy, position=position)
    if proposal.quantized is None:
        return proposal
    own = {word: token for token, word in enumerate(ToyPair.unlike().draft_words)}
    ids = [own.get(f"t{token}", own["stop"]) for token in proposal.quantized.ids]
    return Proposal(
        proposal.token, proposal.count, QuantizedDist(np.array(ids, dtype=np.int64), proposal.quantized.counts)
    )


def _draft_withholding(drafts: DraftSequence, limit: int) -> bool:
    went_on = _draft(drafts, limit)
    building = drafts.session._drafts.building
    if went_on and building[-1].chance < UNSURE:
        building.pop()
        drafts.drafter.truncate(len(drafts.session.request.prompt) + drafts.session.position)
        return False
    return went_on


def _draft_likeliest(drafts: DraftSequence, limit: int) -> bool:
    went_on, source = _draft(drafts, limit), drafts.source
    building = drafts.session._drafts.building
    if went_on and source is not None and source.repeats and (quantized := building[-1].quantized) is not None:
        token = int(quantized.ids[0])
        building[-1] = Proposal(token, quantized.count(token), quantized)
        drafts.drafter.truncate(len(drafts.session.request.prompt) + drafts.session.position - 1)
        drafts.drafter.extend((token,))
    return went_on


_draft: Final = DraftSequence.draft


def _write_keeping(
    row: Callable[[int], Dist], guesses: Sequence[int], *, policy: SamplingPolicy, base: int
) -> Judgement:
    judged = decode(row, guesses, policy=policy, base=base)
    return Judgement(1, rejected=False) if guesses and not judged.accepted else judged


def _write_likeliest(
    row: Callable[[int], Dist], guesses: Sequence[int], *, policy: SamplingPolicy, base: int
) -> Judgement:
    likeliest = [int(p.ids[np.argmax(p.probs)]) for p in map(row, range(len(guesses)))]
    kept = next((offset for offset, guess in enumerate(guesses) if likeliest[offset] != guess), len(guesses))
    drawn = decode(partial(_row_at, row, kept), (), policy=policy, base=base + kept)
    return Judgement(kept, rejected=False, token=drawn.token)


def _write_shifted(
    row: Callable[[int], Dist], guesses: Sequence[int], *, policy: SamplingPolicy, base: int
) -> Judgement:
    own = [
        decode(partial(_row_at, row, offset), (), policy=policy, base=base + max(0, offset - 1)).token
        for offset in range(len(guesses) + 1)
    ]
    right = next((offset for offset, guess in enumerate(guesses) if own[offset] != guess), len(guesses))
    return Judgement(right, rejected=False, token=own[right])


def _row_at(row: Callable[[int], Dist], offset: int, _number: int) -> Dist:
    return row(offset)


def _case_unshaped(work: Any) -> Case:
    case = _case(work)
    return replace(case, policy=case.policy.model_copy(update={"temperature": 1.0, "top_k": 0, "top_p": 1.0}))


_case: Final = orchestrator._case


def _policy_behind_the_text(case: Case, _number: int) -> SamplingPolicy:
    return case.policy.after(case.prompt, case.text, case.end_tokens)


def _shape_with_late_bias(logits: Any, policy: SamplingPolicy, *, allowed: Any = None) -> Dist:
    whole, biases = shape(logits, policy.plain(), allowed=allowed), dict(policy.logit_bias)
    probs = whole.probs * np.exp([biases.get(int(token), 0.0) / policy.temperature for token in whole.ids])
    return Dist(whole.ids, (probs / probs.sum()).astype(np.float32).astype(np.float64))


def _without_last(probs: Any) -> Any:
    shorter = np.where(np.arange(len(probs)) < max(1, int((probs > 0.0).sum()) - 1), probs, 0.0)
    return (shorter / shorter.sum()).astype(np.float32).astype(np.float64)


def _shape_short(logits: Any, policy: SamplingPolicy, *, allowed: Any = None) -> Dist:
    whole = shape(logits, policy, allowed=allowed)
    probs = _without_last(whole.probs)
    return Dist(whole.ids[probs > 0.0], probs[probs > 0.0])


def _shape_rows_short(logits: Any, policies: Sequence[SamplingPolicy], support: int, rows: Any) -> ShapedRows:
    whole = shape_rows(logits, policies, support, rows)
    return ShapedRows(whole.ids, np.stack([_without_last(probs) for probs in whole.probs]))


class _TestedAsItIs(Dist):
    """A masked distribution that is tested against the unmasked one."""

    __slots__ = ("before",)
    before: Dist

    def probability(self, token: int) -> float:
        return self.before.probability(token) if token in self.ids else 0.0


def _kept(dist: Dist, allowed: Any) -> Dist:
    kept = np.isin(dist.ids, allowed)
    return Dist(dist.ids[kept], dist.probs[kept]) if kept.any() else Dist(allowed[:1], np.ones(1))


def _mask_wrongly(kind: Sabotage, stack: ExitStack) -> None:
    masked = Constraint.shape

    def changed(self: Constraint, row: Any, policy: SamplingPolicy, *, text: Sequence[int]) -> Dist:
        right = masked(self, row, policy, text=text)
        whole = shape(row, policy)
        if kind is Sabotage.MASKED_HALF:
            half = _TestedAsItIs(right.ids, right.probs)
            object.__setattr__(half, "before", whole)
            return half
        late = _kept(whole, self.matcher.allowed(text))
        if kind is Sabotage.MASKED_LATE:
            return Dist(late.ids, late.probs / late.probs.sum())
        return late

    stack.enter_context(patch.object(Constraint, "shape", changed))


def _rows_before(rows: int) -> list[int]:
    return [max(0, row - 1) for row in range(rows)]


def _shift(ids: Any, logprobs: Any) -> tuple[Any, Any]:
    before = _rows_before(len(ids))
    return ids[before], logprobs[before]


def _temper_again(ids: Any, logprobs: Any) -> tuple[Any, Any]:
    # As if the server returned log-probabilities after its own sampling.
    return ids, logprobs / np.float32(TEMPERATURE)


def _cut_short(ids: Any, logprobs: Any) -> tuple[Any, Any]:
    cut = logprobs.copy()
    cut[:, -1] = -np.inf
    return ids, cut


def _change_answers(change: Callable[[Any, Any], tuple[Any, Any]], stack: ExitStack) -> None:
    from fleet_edge.verifiers.remote.server import VllmServer  # noqa: PLC0415 - only where the extra is installed

    compute = VllmServer.compute

    def changed(self: VllmServer, *args: Any, **kwargs: Any) -> Any:
        rows = compute(self, *args, **kwargs)
        ids, logprobs = change(rows.ids, rows.logprobs)
        return replace(rows, ids=ids, logprobs=logprobs)

    stack.enter_context(patch.object(VllmServer, "compute", changed))


def _shift_rows(engine: type[Verifier], stack: ExitStack) -> None:
    score = engine.score

    def changed(self: Verifier, items: Sequence[Item]) -> Any:
        logits, rows, start = score(self, items), [], 0
        for item in items:
            rows += [start + row for row in _rows_before(item.rows)]
            start += item.rows
        return logits[rows]

    stack.enter_context(patch.object(engine, "score", changed))


def _shorten_logs(stack: ExitStack) -> None:
    """Compute one token less again than a state's log has."""
    from fleet_edge.verifiers.blocks.model import Model  # noqa: PLC0415 - only where the extra is installed

    forward = Model.forward

    def changed(self: Model, parts: Sequence[Any], *more: Any) -> Any:
        return forward(self, [replace(part, replay=shorter(part.replay)) for part in parts], *more)

    def shorter(its: Any) -> Any:
        if not its.logged:
            return its
        return replace(its, logged=its.logged - 1, settled=its.settled - 1, copied=max(0, its.copied - 1))

    stack.enter_context(patch.object(Model, "forward", changed))


_AT_THE_EDGE: Final[dict[Sabotage, tuple[str, Callable[..., Any]]]] = {
    Sabotage.INVERTED: ("sampling.verification.accepts", _accept_inverted),
    Sabotage.ACCEPTANCE_LOW: ("sampling.verification.accepts", _accept_low),
    Sabotage.UNSHAPED: ("fleet_edge.orchestrator._case", _case_unshaped),
    Sabotage.NUCLEUS_SHORT: ("fleet_edge.batching.judging.shape_rows", _shape_rows_short),
    Sabotage.DRAFT_NOT_COUNTED: ("fleet_edge.batching.judging.Case.policy_at", _policy_behind_the_text),
    Sabotage.BIAS_LATE: ("fleet_edge.batching.judging.shape", _shape_with_late_bias),
    Sabotage.GUESS_KEPT: ("fleet_edge.batching.judging.decode", _write_keeping),
    Sabotage.GUESS_LIKELIEST: ("fleet_edge.batching.judging.decode", _write_likeliest),
    Sabotage.GUESS_SHIFTED: ("fleet_edge.batching.judging.decode", _write_shifted),
}


def at_the_edge(kind: Sabotage, stack: ExitStack) -> None:
    if kind in _AT_THE_EDGE:
        stack.enter_context(patch(*_AT_THE_EDGE[kind]))
    elif kind in (Sabotage.MASKED_HALF, Sabotage.MASKED_LATE, Sabotage.MASK_NOT_RENORMALISED):
        _mask_wrongly(kind, stack)
    elif kind is Sabotage.LOG_SHORT:
        _shorten_logs(stack)
    elif kind is Sabotage.SHIFTED:
        from fleet_edge.verifiers.blocks.verifier import BlocksVerifier  # noqa: PLC0415 - likewise
        from fleet_edge.verifiers.llama_cpp.verifier import LlamaCppVerifier  # noqa: PLC0415 - likewise

        _shift_rows(LlamaCppVerifier, stack)
        _shift_rows(BlocksVerifier, stack)
        _change_answers(_shift, stack)
    elif kind is Sabotage.TARGETS_ALIKE:
        # As if the identity were that of the vocabulary.
        stack.enter_context(
            patch.object(TargetInfo, "target_id", property(lambda self: self.vocabulary.fingerprint[:8]))
        )
    elif kind is Sabotage.TEMPERED_TWICE:
        _change_answers(_temper_again, stack)
    elif kind is Sabotage.CUT_SHORT:
        _change_answers(_cut_short, stack)


_AT_THE_DEVICE: Final[dict[Sabotage, dict[str, Callable[..., Any]]]] = {
    Sabotage.MISREPORTED: {"fleet_device.session.machine.propose": _propose_misreported},
    Sabotage.REPORTED_HIGH: {"fleet_device.session.machine.propose": _propose_high},
    Sabotage.UNMAPPED: {"fleet_device.session.machine.propose": _propose_unmapped},
    Sabotage.NOT_RENORMALISED: {
        "fleet_device.drafters.unlike.CommonTokens.restrict": _restrict_without_renormalising,
        "fleet_device.session.machine.propose": _propose_not_renormalised,
    },
    Sabotage.LIKELIEST: {"fleet_device.client.drafting.DraftSequence.draft": _draft_likeliest},
    Sabotage.WITHHELD: {"fleet_device.client.drafting.DraftSequence.draft": _draft_withholding},
    Sabotage.NUCLEUS_SHORT: {
        "fleet_device.drafters.without_model.shape": _shape_short,
        # Whatever the proof expects of the product's own code.
        "sampling.distribution.shape": _shape_short,
    },
    Sabotage.NO_RESIDUAL: {"fleet_device.session.sequence.correct": _correct_without_residual},
    Sabotage.CORRECTED_FROM_P: {"fleet_device.session.sequence.correct": _correct_sometimes_from_p},
    Sabotage.SEEDS_SHARED: {"fleet_device.client.agent.Agent.generate": _generate_in_pairs},
}


def at_the_device(kind: Sabotage, stack: ExitStack) -> None:
    for name, replacement in _AT_THE_DEVICE.get(kind, {}).items():
        stack.enter_context(patch(name, replacement))
