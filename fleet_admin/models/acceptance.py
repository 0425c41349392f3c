"""Acceptance of a draft model's tokens by a target on the target's own outputs, and the target's step times."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleet_admin.models.facts import ModelsError
from fleet_admin.models.pair import CheckedPair
from fleet_admin.models.prompts import Prompt
from fleet_device.drafters.contract import Drafter, TextCodec
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.drafters.unlike import wrap
from fleet_device.requests.chat import chat_prompt
from fleet_device.requests.structured import ChatMessage
from fleet_device.settings import DeviceSettings
from fleet_edge.settings import AUTO, EdgeSettings
from fleet_edge.step_curve import CurveMeasurement, StepCurve
from fleet_edge.verifiers.contract import Item, Logits, Verifier
from fleet_edge.verifiers.registry import load_verifier
from sampling.distribution import Dist, quantize, shape
from sampling.drawing import coupled_token
from schemas.policy import Mode, SamplingPolicy

LONGEST_DRAFT: Final = 8
"""Tokens: expectations are given for drafts up to this long."""


@dataclass(frozen=True, slots=True)
class MeasuredPosition:
    overlap: float  # probability that a draft token is accepted here in residual mode: the sum of min(p, q)
    accepted: float  # probability that the token of the output was an accepted draft token
    agrees: bool  # whether both models draw the same token in coupled mode


@dataclass(frozen=True, slots=True)
class MeasuredText:
    category: str  # of its prompt
    positions: tuple[MeasuredPosition, ...]


@dataclass(frozen=True, slots=True)
class PairAcceptance:
    """Acceptance of a pair, measured on outputs of the target."""

    texts: tuple[MeasuredText, ...]  # at least one, none empty

    @property
    def tokens(self) -> int:
        return sum(len(text.positions) for text in self.texts)

    def mean(self, *, coupled: bool) -> float:
        """Return the share of tested draft tokens that are accepted."""
        return sum(sum(self._of(text, coupled=coupled)) for text in self.texts) / self.tokens

    def error(self, *, coupled: bool) -> float | None:
        """Return the standard error of `mean` over outputs; None with one output."""
        count = len(self.texts)
        if count < 2:  # noqa: PLR2004 - nothing to compare with
            return None
        mean = self.mean(coupled=coupled)
        apart = sum((sum(self._of(text, coupled=coupled)) - mean * len(text.positions)) ** 2 for text in self.texts)
        return sqrt(apart * count / (count - 1)) / self.tokens

    def tokens_per_verdict(self, length: int, *, coupled: bool) -> float:
        verdicts = (
            _verdicts([float(each.agrees) if coupled else each.accepted for each in text.positions], length)
            for text in self.texts
        )
        return self.tokens / sum(verdicts)

    def by_category(self) -> dict[str, "PairAcceptance"]:
        categories = dict.fromkeys(text.category for text in self.texts)
        return {name: PairAcceptance(tuple(t for t in self.texts if t.category == name)) for name in categories}

    @staticmethod
    def _of(text: MeasuredText, *, coupled: bool) -> list[float]:
        return [float(each.agrees) if coupled else each.overlap for each in text.positions]


def _verdicts(accepted: Sequence[float], length: int) -> float:
    """Return the expected number of verdicts for an output.

    `accepted` has, by position, the probability that a drafted token is accepted.
    """
    needed = [0.0] * (len(accepted) + length + 2)  # from a position on; behind the end none
    for begin in range(len(accepted) - 1, -1, -1):
        expected, so_far = 1.0, 1.0
        for place in range(begin, min(begin + length, len(accepted))):
            # The token at `place` ends the round as the replacement of a rejected one, or the draft continues.
            expected += so_far * (1.0 - accepted[place]) * needed[place + 1]
            so_far *= accepted[place]
        needed[begin] = expected + so_far * needed[min(begin + length, len(accepted)) + 1]
    return needed[0]


@dataclass(frozen=True, slots=True)
class WrittenText:
    tokens: tuple[int, ...]
    dists: tuple[Dist, ...]  # shaped target distribution, by position


def write_texts(
    verifier: Verifier, prompts: Sequence[Sequence[int]], *, policies: Sequence[SamplingPolicy], tokens: int
) -> list[WrittenText]:
    """Have the target generate after each prompt, in one batch, in coupled mode."""
    info = verifier.info
    if (longest := max(map(len, prompts))) + tokens > info.context:
        raise ModelsError(
            f"A prompt has {longest} tokens, and the target holds {info.context} with the output; leave it out, or ask "
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
    drafter: Drafter, prompt: Sequence[int], written: WrittenText, *, policy: SamplingPolicy, category: str
) -> MeasuredText:
    """Compare both distributions at each position of an output.

    A drafter with another vocabulary than the target's must be wrapped by `unlike`.
    """
    drafter.reset(prompt)
    positions = []
    for place, (token, target) in enumerate(zip(written.tokens, written.dists, strict=True)):
        draft = drafter.next(policy)
        positions.append(_position(token, target, draft, policy, place))
        drafter.extend((token,))
    return MeasuredText(category, tuple(positions))


def _position(token: int, target: Dist, draft: Dist | None, policy: SamplingPolicy, place: int) -> MeasuredPosition:
    if draft is None:  # no proposal: the target generates this token alone
        return MeasuredPosition(0.0, 0.0, agrees=False)
    q = quantize(draft).probabilities(target.ids)
    overlap = float(np.minimum(target.probs, q).sum())
    where = int(np.flatnonzero(target.ids == token)[0])
    accepted = min(1.0, float(q[where] / target.probs[where]))
    return MeasuredPosition(min(1.0, overlap), accepted, agrees=coupled_token(draft, policy.seed, place) == token)


def _rows(logits: Logits) -> NDArray[Any]:
    return logits if isinstance(logits, np.ndarray) else logits.float().cpu().numpy()


_TOGETHER: Final = 8  # outputs that the target generates at a time
_CELLS: Final = 256
_MIN_KV: Final = 64 << 20
_STEPS: Final = (1, 5, 9, 17)  # new tokens of one sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceMeasurement:
    prompts: Sequence[Prompt]  # user messages, if there is a chat template
    tokens: int = 64  # maximum of each output
    temperature: float = 0.7
    engine: str = AUTO  # of the target
    dtype: str = AUTO  # of the target
    on_progress: Callable[[str], None] = field(default=lambda _done: None)

    def policy(self, number: int) -> SamplingPolicy:
        return SamplingPolicy(mode=Mode.COUPLED, temperature=self.temperature, top_k=50, top_p=0.95, seed=number)


@dataclass(frozen=True, slots=True)
class MeasuredPair:
    acceptance: PairAcceptance
    steps: StepCurve  # of one sequence


def measure(pair: CheckedPair, how: AcceptanceMeasurement, *, target_vocabulary: Path | None = None) -> MeasuredPair:
    """Measure a pair that fits; raises `FleetError` if a model cannot be loaded or fails, or a prompt is too long."""
    drafter = _drafter(pair, target_vocabulary)
    with closing(drafter):
        prompts = [_encode(drafter.codec, prompt.text) for prompt in how.prompts]
        if (longest := max(map(len, prompts))) + how.tokens > drafter.context:
            raise ModelsError(
                f"A prompt has {longest} tokens, and the draft model holds {drafter.context} with the output; leave it "
                "out, or ask for fewer --tokens."
            )
        verifier = _load(pair, how, longest + how.tokens)
        texts = []
        for first in range(0, len(prompts), _TOGETHER):
            chosen = prompts[first : first + _TOGETHER]
            policies = [how.policy(first + number) for number in range(len(chosen))]
            texts += write_texts(verifier, chosen, policies=policies, tokens=how.tokens)
            how.on_progress(f"the target has written {len(texts)} of {len(prompts)} texts")
        steps = CurveMeasurement(sessions=(1,), tokens=_STEPS, prefill=()).measure(verifier)
        measured = list[MeasuredText]()

        def read() -> None:
            for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
                category = how.prompts[number].category
                measured.append(compare(drafter, prompt, text, policy=how.policy(number), category=category))
                how.on_progress(f"the draft model has read {len(measured)} of {len(prompts)} texts")

        # On a thread without torch: torch and llama.cpp disturb each other's state of the AMX registers.
        with ThreadPoolExecutor(1, "draft") as thread:
            thread.submit(read).result()
    return MeasuredPair(PairAcceptance(tuple(measured)), steps)


def _drafter(pair: CheckedPair, target_vocabulary: Path | None) -> Drafter:
    drafter = LlamaCppDrafter(LlamaCppSettings(path=Path(pair.draft.source), threads=2))  # the target uses all cores
    if pair.draft.vocabulary == pair.target.vocabulary:
        return drafter
    words = target_vocabulary or Path(pair.target.source)
    return wrap(drafter, DeviceSettings(target_vocabulary=words))


def _load(pair: CheckedPair, how: AcceptanceMeasurement, context: int) -> Verifier:
    cells = -(-(context + 1) // _CELLS) * _CELLS
    kv_bytes = _TOGETHER * (pair.target.kv_bytes(tokens=2 * cells, number_bytes=4) + pair.target.state_bytes)
    sizes = {"context": cells - 1, "kv_bytes": max(_MIN_KV, kv_bytes)}
    settings = {"target": pair.target.source, "engine": how.engine, "dtype": how.dtype, **sizes}
    return load_verifier(EdgeSettings.model_validate(settings))


def _encode(codec: TextCodec, text: str) -> list[int]:
    tokens = chat_prompt(codec, [ChatMessage("user", text)]).tokens if codec.chat_template else codec.encode(text)
    if not tokens:
        raise ModelsError("A prompt is no token long; leave it out.")
    return tokens
