"""Constraint of a text that has a grammar, on the device: which tokens are worth drafting, and which need no model.

The edge decides what is possible. Whatever is wrong here costs speed and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dssd.distribution import Dist, Ids
from fleet_common.grammar.errors import GrammarError
from fleet_common.grammar.matcher import GrammarMatcher
from fleet_device.drafters.contract import Drafter, DraftsConstrained
from fleet_device.session.text import CommittedTokens, TokenOrigin
from schemas.policy import SamplingPolicy


@dataclass(slots=True)
class DraftConstraint:
    """A grammar, followed along a text and what is drafted of it.

    Attributes:
        matcher: Follows the text.
    """

    matcher: GrammarMatcher

    def forced(self, text: Sequence[int]) -> int | None:
        """Return the token that must follow a text; None if there is a choice, or that is not known."""
        try:
            return next(iter(self.matcher.forced(text)), None)
        except GrammarError:
            return None

    def next(self, drafter: Drafter, policy: SamplingPolicy, *, text: Sequence[int]) -> Dist | None:
        """Return the draft model's distribution given the grammar; None for "no idea".

        Args:
            drafter: Its sequence ends with the text.
            policy: The session's.
            text: Committed and drafted, prompt left out.
        """
        try:
            allowed = self.matcher.allowed(text)
        except GrammarError:
            return drafter.next(policy)
        if isinstance(drafter, DraftsConstrained):
            return drafter.next_allowed(policy, allowed)
        dist = drafter.next(policy)
        return None if dist is None else restrict(dist, allowed)

    def origins(self, text: Sequence[int], committed: CommittedTokens, *, begin: int) -> CommittedTokens:
        """Return newly committed tokens, those marked that a grammar has forced.

        Args:
            text: All that is committed.
            committed: A part of it.
            begin: Where that begins.
        """
        origins = list(committed.origins)
        place = 0
        while place < len(origins):
            try:
                run = self.matcher.forced(text[: begin + place])
            except GrammarError:
                break
            for offset, token in enumerate(run[: len(origins) - place]):
                if token == committed.ids[place + offset]:
                    origins[place + offset] = TokenOrigin.FORCED
            place += max(1, len(run))
        return replace(committed, origins=tuple(origins))


def restrict(dist: Dist, allowed: Ids) -> Dist | None:
    """Return a distribution over those of its tokens that are allowed, or None if none is.

    Args:
        dist: Of the draft model.
        allowed: int64 ids, rising.
    """
    kept = np.isin(dist.ids, allowed)
    if not kept.any():
        return None
    probs = dist.probs[kept]
    return Dist(dist.ids[kept], probs / probs.sum())
