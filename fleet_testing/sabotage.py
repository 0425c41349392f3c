"""Planted faults that a proof of exactness must find: each is a mistake that published code really makes."""

from contextlib import ExitStack
from dataclasses import replace
from enum import StrEnum
from typing import Any, Final
from unittest.mock import patch

import numpy as np

from dssd.distribution import Dist
from dssd.downlink import correct
from dssd.proposal import Proposal, propose
from dssd.quantized import TOTAL, QuantizedDist, quantize
from fleet_device.client.draft_sequence import DraftSequence
from fleet_device.drafters.common_tokens import CommonTokens
from fleet_edge import orchestrator
from fleet_edge.batching.judging import Case
from fleet_testing.toy_pair import ToyPair
from schemas.downlink import DownlinkForm
from schemas.policy import SamplingPolicy

__all__ = ["UNSURE", "Sabotage", "at_the_device", "at_the_edge"]


class Sabotage(StrEnum):
    """What is wrong.

    Attributes:
        NONE: Nothing.
        INVERTED: The edge accepts with probability q/p instead of p/q.
        MISREPORTED: The device reports a q that it did not draw from.
        NO_RESIDUAL: The device draws the correction from p instead of max(0, p - q).
        NOT_RENORMALISED: The device draws among the tokens that it has in common with the target, and reports their
            probabilities among all.
        UNMAPPED: The device maps the token that it draws to the target's id, and keeps q under its own ids.
        UNSHAPED: The edge verifies against p before temperature, top_k and top_p.
        WITHHELD: The device leaves a token out of the draft that it has drawn, because it was unsure of it.
    """

    NONE = "none"
    INVERTED = "inverted"
    MISREPORTED = "misreported"
    NO_RESIDUAL = "no-residual"
    NOT_RENORMALISED = "not-renormalised"
    UNMAPPED = "unmapped"
    UNSHAPED = "unshaped"
    WITHHELD = "withheld"


UNSURE: Final = 0.5
"""A token that was drawn with a smaller probability is one of which the toy draft model was unsure."""


def _accept_inverted(p: float, count: int, uniform: float) -> bool:
    return uniform * p < count / TOTAL


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
    building = drafts.session._drafts.building  # noqa: SLF001
    if went_on and building[-1].chance < UNSURE:
        building.pop()
        drafts.drafter.truncate(len(drafts.session.request.prompt) + drafts.session.position)
        return False
    return went_on


_draft: Final = DraftSequence.draft


def _case_unshaped(work: Any) -> Case:  # noqa: ANN401 - the scheduler's Work
    case = _case(work)
    return replace(case, policy=case.policy.model_copy(update={"temperature": 1.0, "top_k": 0, "top_p": 1.0}))


_case: Final = orchestrator._case  # noqa: SLF001 - sabotage reaches inside


def at_the_edge(kind: Sabotage, stack: ExitStack) -> None:
    """Put the edge's faults in place until the stack is closed."""
    if kind is Sabotage.INVERTED:
        stack.enter_context(patch("dssd.judgement.accepts", _accept_inverted))
    elif kind is Sabotage.UNSHAPED:
        stack.enter_context(patch("fleet_edge.orchestrator._case", _case_unshaped))


def at_the_device(kind: Sabotage, stack: ExitStack) -> None:
    """Put the device's faults in place until the stack is closed."""
    if kind is Sabotage.MISREPORTED:
        stack.enter_context(patch("fleet_device.session.machine.propose", _propose_misreported))
    elif kind is Sabotage.NOT_RENORMALISED:
        stack.enter_context(patch.object(CommonTokens, "restrict", _restrict_without_renormalising))
        stack.enter_context(patch("fleet_device.session.machine.propose", _propose_not_renormalised))
    elif kind is Sabotage.UNMAPPED:
        stack.enter_context(patch("fleet_device.session.machine.propose", _propose_unmapped))
    elif kind is Sabotage.WITHHELD:
        stack.enter_context(patch.object(DraftSequence, "draft", _draft_withholding))
    elif kind is Sabotage.NO_RESIDUAL:
        stack.enter_context(patch("fleet_device.session.rejection.correct", _correct_without_residual))
