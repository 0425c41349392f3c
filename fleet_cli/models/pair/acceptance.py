"""Acceptance of a draft model's tokens by a target, measured on texts that the target writes.

The target writes each text alone; at every position both models' distributions are compared, shaped by one policy. Of a
token x that a text of law p has, the probability that it was an accepted draft token is min(1, q(x) / p(x)): in
residual mode exactly what is emitted by acceptance has the density min(p, q). So one text of the target tells what
would become of drafts of every length. In coupled mode a draft token is accepted if both draw the same one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dssd.distribution import Dist, quantize, shape
from dssd.sampling import coupled_token
from fleet_cli.models.errors import ModelsError
from fleet_device.drafters.contract import Drafter
from fleet_edge.verifiers.contract import Item, Logits, Verifier
from schemas.policy import SamplingPolicy

__all__ = ["LONGEST_DRAFT", "Acceptance", "MeasuredText", "Position", "WrittenText", "compare", "write_texts"]

LONGEST_DRAFT: Final = 8
"""Tokens: expectations are given for drafts up to this long."""


@dataclass(frozen=True, slots=True)
class Position:
    """One token of a text.

    Attributes:
        overlap: Probability that a draft token is accepted here in residual mode: the sum of min(p, q).
        accepted: Probability that the token that the text has was an accepted draft token.
        agrees: Whether both models draw the same token in coupled mode.
    """

    overlap: float
    accepted: float
    agrees: bool


@dataclass(frozen=True, slots=True)
class MeasuredText:
    """A text, position by position.

    Attributes:
        category: Of its prompt.
        positions: In order.
    """

    category: str
    positions: tuple[Position, ...]


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What some texts say of a pair.

    Attributes:
        texts: At least one, none empty.
    """

    texts: tuple[MeasuredText, ...]

    @property
    def tokens(self) -> int:
        """Of all texts."""
        return sum(len(text.positions) for text in self.texts)

    def mean(self, *, coupled: bool) -> float:
        """Return the share of draft tokens that are accepted, of those that are tested."""
        return sum(sum(self._of(text, coupled=coupled)) for text in self.texts) / self.tokens

    def error(self, *, coupled: bool) -> float | None:
        """Return the standard error of `mean`, texts taken as drawn at random; None of a single text."""
        count = len(self.texts)
        if count < 2:  # noqa: PLR2004 - nothing to compare with
            return None
        mean = self.mean(coupled=coupled)
        apart = sum((sum(self._of(text, coupled=coupled)) - mean * len(text.positions)) ** 2 for text in self.texts)
        return sqrt(apart * count / (count - 1)) / self.tokens

    def tokens_per_verdict(self, length: int, *, coupled: bool) -> float:
        """Return how many tokens a verdict on a draft of `length` tokens brings, these texts being written from it."""
        verdicts = 0.0
        for text in self.texts:
            accepted = (
                [float(position.agrees) for position in text.positions]
                if coupled
                else [position.accepted for position in text.positions]
            )
            verdicts += _verdicts(accepted, length)
        return self.tokens / verdicts

    def by_category(self) -> dict[str, "Acceptance"]:
        """Return the same for each category of prompts, in the order in which they come."""
        categories = dict.fromkeys(text.category for text in self.texts)
        return {name: Acceptance(tuple(t for t in self.texts if t.category == name)) for name in categories}

    @staticmethod
    def _of(text: MeasuredText, *, coupled: bool) -> list[float]:
        return [float(each.agrees) if coupled else each.overlap for each in text.positions]


def _verdicts(accepted: Sequence[float], length: int) -> float:
    """Return the expected number of verdicts in which a text is written.

    Args:
        accepted: By position, the probability that its token, if drafted, was accepted.
        length: Of each draft.
    """
    needed = [0.0] * (len(accepted) + length + 2)  # from a position on; behind the end none
    for begin in range(len(accepted) - 1, -1, -1):
        expected, so_far = 1.0, 1.0
        for place in range(begin, min(begin + length, len(accepted))):
            # The token at `place` ends the round, in place of a rejected one, or the draft goes on.
            expected += so_far * (1.0 - accepted[place]) * needed[place + 1]
            so_far *= accepted[place]
        needed[begin] = expected + so_far * needed[min(begin + length, len(accepted)) + 1]
    return needed[0]


@dataclass(frozen=True, slots=True)
class WrittenText:
    """A text of the target.

    Attributes:
        tokens: Of the text.
        dists: By position, the target's shaped distribution.
    """

    tokens: tuple[int, ...]
    dists: tuple[Dist, ...]


def write_texts(
    verifier: Verifier,
    prompts: Sequence[Sequence[int]],
    *,
    policies: Sequence[SamplingPolicy],
    tokens: int,
) -> list[WrittenText]:
    """Let the target write a text behind each prompt, all in one batch, in coupled mode.

    Args:
        verifier: The target, with no sequence open.
        prompts: Token ids, none empty.
        policies: One a prompt.
        tokens: Of each text, at most.

    Raises:
        ModelsError: A prompt is too long for the target.
        VerifierError: The target has failed.
    """
    info = verifier.info
    if (longest := max(map(len, prompts))) + tokens > info.context:
        raise ModelsError(
            f"A prompt has {longest} tokens, and the target holds {info.context} with the text; leave it out, or ask "
            "for fewer --tokens."
        )
    texts: list[list[int]] = [[] for _ in prompts]
    dists: list[list[Dist]] = [[] for _ in prompts]

    def take(number: int, row: NDArray[Any]) -> None:
        dist = shape(row, policies[number])
        texts[number].append(coupled_token(dist, policies[number].seed, len(texts[number])))
        dists[number].append(dist)

    for number, prompt in enumerate(prompts):
        verifier.open(number)
        take(number, _rows(verifier.score([Item(number, tuple(prompt), 1)]))[0])
    going = list(range(len(prompts)))
    while going := [n for n in going if len(texts[n]) < tokens and texts[n][-1] not in info.end_tokens]:
        rows = _rows(verifier.score([Item(number, (texts[number][-1],), 1) for number in going]))
        for number, row in zip(going, rows, strict=True):
            take(number, row)
    for number in range(len(prompts)):
        verifier.close(number)
    return [WrittenText(tuple(text), tuple(found)) for text, found in zip(texts, dists, strict=True)]


def compare(
    drafter: Drafter,
    prompt: Sequence[int],
    written: WrittenText,
    *,
    policy: SamplingPolicy,
    category: str,
) -> MeasuredText:
    """Ask the draft model for its distribution at each position of a text.

    Args:
        drafter: The draft model; of another vocabulary than the target's it is one that `unlike` has wrapped.
        prompt: Token ids.
        written: Behind it.
        policy: Of the text.
        category: Of the prompt.

    Raises:
        DrafterError: The draft model has failed.
    """
    drafter.reset(prompt)
    positions = []
    for place, (token, target) in enumerate(zip(written.tokens, written.dists, strict=True)):
        draft = drafter.next(policy)
        positions.append(_position(token, target, draft, policy, place))
        drafter.extend((token,))
    return MeasuredText(category, tuple(positions))


def _position(token: int, target: Dist, draft: Dist | None, policy: SamplingPolicy, place: int) -> Position:
    if draft is None:  # no idea: the target writes this token alone
        return Position(0.0, 0.0, agrees=False)
    q = quantize(draft).probabilities(target.ids)
    overlap = float(np.minimum(target.probs, q).sum())
    where = int(np.flatnonzero(target.ids == token)[0])
    accepted = min(1.0, float(q[where] / target.probs[where]))
    return Position(min(1.0, overlap), accepted, agrees=coupled_token(draft, policy.seed, place) == token)


def _rows(logits: Logits) -> NDArray[Any]:
    """Return the logits as an array in the processor's memory."""
    return logits if isinstance(logits, np.ndarray) else logits.float().cpu().numpy()
