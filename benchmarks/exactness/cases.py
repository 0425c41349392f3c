"""Cases of the exactness proof: variants that must follow the target distribution, and faults that must not."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from itertools import count
from typing import Any, Final

import numpy as np

from fleet_device.drafters.contract import Prospect
from fleet_device.pacing.adaptive import AdaptivePacing
from fleet_device.pacing.contract import Choice, FixedPacing, Pacing, Plan
from sampling.downlink import FormName
from schemas.policy import Grammar, Mode, SamplingPolicy
from tests.support.markov import MarkovScript
from tests.support.sabotage import UNSURE, Sabotage
from tests.support.toy_engines import ToyEngine, pair_of
from tests.support.toy_grammar import GRAMMAR, joint_by_prefix
from tests.support.toy_pair import END_TOKENS, GUESSABLE, NEAR_SIZE, PROMPT, Languages, ToyPair, policy

LATE: Final = 1_500
"""Tokens of an output whose late positions are tested."""

Law = np.ndarray[Any, np.dtype[np.float64]]

LENGTH: Final = 3
"""Tokens of an output whose joint distribution is compared."""

LONG: Final = 24
"""Most tokens of an output of languages without a short end: small mistakes show in many tokens."""


def law(mode: Mode) -> Law:
    """Return the joint distribution of an output of the standard pair, `[size] * LENGTH`."""
    return Variant(mode, FormName.AUTO, LENGTH).joint


def fold_ends(joint: Law, end_tokens: Sequence[int]) -> Law:
    """Return a joint distribution with early ends counted under their end token repeated."""
    length = joint.ndim
    for end in end_tokens:
        for position in range(length - 1):
            # All continuations of an end token are one outcome.
            head = (slice(None),) * position + (end,)
            rest = tuple(range(position, length - 1))
            mass = joint[head].sum(axis=rest)
            joint[head] = 0.0
            joint[head + (end,) * (length - 1 - position)] = mass
    return joint


@dataclass(frozen=True, slots=True)
class StoppingPacing(FixedPacing):
    def plan(self, *, longest: int, window: int) -> Plan:
        del longest, window
        return Plan(self.tokens, may_stop=True)

    def goes_on(self, chances: Sequence[float]) -> bool:
        """Stop after a token that was not the likely one."""
        return chances[-1] >= UNSURE


@dataclass(frozen=True, slots=True)
class MixingPacing(FixedPacing):
    """Uses suffix drafts wherever possible, except every third time; the draft model makes the others."""

    turns: Iterator[int] = field(default_factory=lambda: count(1))

    def weigh(self, plan: Plan, prospect: Prospect, *, longest: int, window: int) -> Plan:
        del prospect, longest, window
        return replace(plan, repeats=next(self.turns) % 3 > 0)


@dataclass(frozen=True, slots=True)
class TurningPacing(FixedPacing):
    """Alternates between drafting a token and edge-only decoding of `tokens`."""

    turns: Iterator[int] = field(default_factory=lambda: count(1))

    def plan(self, *, longest: int, window: int) -> Plan:
        del longest, window
        return Plan(1) if next(self.turns) % 2 else Plan(self.tokens, edge_only=True)

    def choice(self) -> Choice:
        return Choice("draft", "They take turns.")


class Controls(StrEnum):
    """Controls of sampling that a case's policy has in addition."""

    NONE = "none"
    MIN_P = "min-p"
    PRESENCE = "presence"
    FREQUENCY = "frequency"
    REPETITION = "repetition"
    BIAS = "bias"
    MIN_TOKENS = "min-tokens"
    ALL = "all-controls"


_FIELDS: Final[dict[Controls, dict[str, Any]]] = {
    Controls.MIN_P: {"min_p": 0.25},
    Controls.PRESENCE: {"presence_penalty": 1.5},
    Controls.FREQUENCY: {"frequency_penalty": 1.2},
    Controls.REPETITION: {"repetition_penalty": 2.5},
    Controls.BIAS: {"logit_bias": ((2, 1.5), (4, -2.0), (5, 0.75))},
    Controls.MIN_TOKENS: {"min_tokens": 2},
}


_FAULT_SHARE = 10
_GREEDY_SHARE = 20
_RESUMED_SHARE = 4


@dataclass(frozen=True, slots=True)
class Variant:
    """One variant of the system.

    Attributes:
        form: Downlink form.
        draft_length: Tokens in a draft; None lets each device choose, and whether to draft ahead as well.
        edge_only: Tokens of edge-only decoding at a time.
        languages: Target and draft model.
        tokens: Most tokens of an output.
        stops: Whether a draft ends after a token of which the draft model was unsure.
        suffix: Whether suffix drafts alternate with those of the draft model.
        constrained: Whether requests have a grammar.
        edge_draft: Whether the edge has a draft model for edge-only decoding.
        controls: Controls of sampling in addition to temperature, top_k and top_p.
        two_targets: Whether edges lose sessions in the middle, and another edge, with another target, takes Opens too.
        sabotage: The planted fault.
    """

    mode: Mode
    form: FormName
    draft_length: int | None
    ahead: bool = False
    edge_only: bool = False
    languages: Languages = Languages.STANDARD
    tokens: int = LENGTH
    stops: bool = False
    suffix: bool = False
    engine: ToyEngine = ToyEngine.SCRIPTED
    greedy: bool = False
    constrained: bool = False
    edge_draft: bool = False
    two_targets: bool = False
    controls: Controls = Controls.NONE
    sabotage: Sabotage = Sabotage.NONE

    @property
    def name(self) -> str:
        form = "" if self.mode is Mode.COUPLED or self.edge_only else f" {self.form.value}"
        ahead = " chosen" if self.draft_length is None else " ahead" if self.ahead else ""
        if self.edge_only:
            ahead = " drafted and edge-only in turns" if self.draft_length is None else " edge-only"
        ahead = f"{ahead} edge-draft" if self.edge_draft else ahead
        ahead = f" stopped{ahead}" if self.stops else ahead
        ahead = f"{ahead} two-targets" if self.two_targets else ahead
        ahead = f" suffix{ahead}" if self.suffix else ahead
        languages = "" if self.languages is Languages.STANDARD else f" {self.languages.value}"
        greedy = " greedy" if self.greedy else ""
        greedy = f"{greedy} grammar" if self.constrained else greedy
        greedy = greedy if self.controls is Controls.NONE else f"{greedy} {self.controls.value}"
        engine = "" if self.engine is ToyEngine.SCRIPTED else f" {self.engine.value}"
        fault = "" if self.sabotage is Sabotage.NONE else f" fault:{self.sabotage.value}"
        return f"{self.mode.value}{form}{ahead}{languages}{greedy}{engine}{fault}"

    @property
    def prompt(self) -> tuple[int, ...]:
        prompt = GUESSABLE if self.suffix else PROMPT
        return prompt if self.languages is not Languages.WIDE else tuple(self.pair.target.ids[each] for each in prompt)

    @property
    def pair(self) -> ToyPair:
        return replace(pair_of(self.engine, self.languages), suffix=self.suffix)

    @property
    def policy(self) -> Callable[[int], SamplingPolicy]:
        """Return the policy of a seed."""
        top_k = None
        if self.languages in {Languages.NEAR, Languages.WIDE, Languages.ENDLESS}:
            # Nothing is cut; but sorting a wide vocabulary takes long.
            top_k = NEAR_SIZE if self.languages is Languages.WIDE else 0
        controls = (
            {}
            if self.controls is Controls.NONE
            else _FIELDS.get(self.controls)
            or {name: value for fields in _FIELDS.values() for name, value in fields.items()}
        )
        return partial(policy, self.mode, greedy=self.greedy, grammar=self.grammar, top_k=top_k, controls=controls)

    @property
    def by_prefix(self) -> bool:
        """Whether p depends on all tokens before a position."""
        return self.grammar is not None or self.policy(0).adjusts

    @property
    def verified_exactly(self) -> bool:
        """Whether the probabilities that draft tokens are accepted are known exactly."""
        exact = self.engine in (ToyEngine.SCRIPTED, ToyEngine.VLLM)  # other rows are rounded
        return exact and not (self.suffix or self.languages is Languages.UNLIKE)

    @property
    def joint(self) -> Law:
        """The joint distribution of the first `LENGTH` tokens, `[tokens that may occur] * LENGTH`."""
        target = self.pair.target
        if self.by_prefix:
            assert isinstance(target, MarkovScript)
            return joint_by_prefix(target, self.prompt, length=LENGTH, policy=self.policy(0), end=END_TOKENS[0])
        return fold_ends(target.joint(self.prompt, length=LENGTH, policy=self.policy(0)), END_TOKENS)

    @property
    def grammar(self) -> Grammar | None:
        return GRAMMAR if self.constrained else None

    def pacing(self) -> Pacing:
        if self.draft_length is None:
            return TurningPacing(1) if self.edge_only else AdaptivePacing()
        if self.suffix:
            return MixingPacing(self.draft_length)
        if self.stops:
            return StoppingPacing(self.draft_length)
        return FixedPacing(self.draft_length, self.ahead, self.edge_only)

    def share(self, sessions: int) -> int:
        """Return how many of these suffice: faults show sooner, greedy outputs are all the same, resumes wait."""
        share = _GREEDY_SHARE if self.greedy else _RESUMED_SHARE if self.two_targets else 1
        if self.sabotage is not Sabotage.NONE and self.tokens == LENGTH:
            share *= _FAULT_SHARE // 2 if self.suffix else _FAULT_SHARE  # half of its drafts have the mistake
        return max(1, sessions * LENGTH // self.tokens // share)


_WAYS = (
    (Mode.RESIDUAL, FormName.SPARSE),
    (Mode.RESIDUAL, FormName.SAMPLES),
    (Mode.RESIDUAL, FormName.DENSE),
    (Mode.COUPLED, FormName.AUTO),
)
_ENGINES = (
    ToyEngine.LLAMA_CPP,
    ToyEngine.HYBRID,
    ToyEngine.EIGHT_BITS,
    ToyEngine.FOUR_BITS,
    ToyEngine.DELTA,
    ToyEngine.VLLM,
)
_NEAR = Variant(Mode.RESIDUAL, FormName.AUTO, 8, languages=Languages.NEAR, tokens=LONG)

CASES = (
    *(Variant(mode, form, 2) for mode, form in _WAYS),
    *(Variant(mode, form, 1, ahead=True) for mode, form in _WAYS),
    Variant(Mode.RESIDUAL, FormName.AUTO, None),
    Variant(Mode.COUPLED, FormName.AUTO, None),
    Variant(Mode.RESIDUAL, FormName.AUTO, 2, edge_only=True),
    Variant(Mode.COUPLED, FormName.AUTO, 2, edge_only=True),
    Variant(Mode.RESIDUAL, FormName.AUTO, None, edge_only=True),
    Variant(Mode.COUPLED, FormName.AUTO, None, edge_only=True),
    *(Variant(mode, FormName.AUTO, 2, stops=True) for mode in Mode),
    *(Variant(mode, FormName.AUTO, 2, suffix=True) for mode in Mode),
    *(Variant(mode, FormName.AUTO, length, two_targets=True) for length in (2, None) for mode in Mode),
    *(Variant(mode, form, 2, languages=Languages.UNLIKE) for mode, form in _WAYS),
    *(Variant(mode, FormName.AUTO, 1, ahead=True, languages=Languages.UNLIKE) for mode in Mode),
    *(Variant(mode, FormName.AUTO, 2, engine=engine) for engine in (*_ENGINES, ToyEngine.MAMBA) for mode in Mode),
    *(Variant(Mode.RESIDUAL, FormName.AUTO, 1, ahead=True, engine=engine) for engine in _ENGINES),
    *(Variant(Mode.COUPLED, FormName.AUTO, None, edge_only=True, engine=engine) for engine in _ENGINES),
    *(Variant(Mode.RESIDUAL, FormName.AUTO, 2, greedy=True, engine=engine) for engine in _ENGINES),
    *(Variant(mode, form, 2, constrained=True) for mode, form in _WAYS),
    *(Variant(mode, FormName.AUTO, 1, ahead=True, constrained=True) for mode in Mode),
    *(Variant(mode, FormName.AUTO, 2, languages=Languages.UNLIKE, constrained=True) for mode in Mode),
    *(Variant(mode, FormName.AUTO, length, edge_only=True, constrained=True) for length in (3, None) for mode in Mode),
    Variant(Mode.RESIDUAL, FormName.AUTO, None, constrained=True),
    Variant(Mode.RESIDUAL, FormName.AUTO, 2, greedy=True, constrained=True),
    *(replace(_NEAR, mode=mode, form=form) for mode, form in ((Mode.RESIDUAL, FormName.AUTO), *_WAYS)),
    replace(_NEAR, draft_length=4, ahead=True),
    *(replace(_NEAR, mode=mode, form=form, languages=Languages.WIDE) for mode, form in _WAYS),
    *(replace(_NEAR, mode=mode, languages=Languages.ENDLESS, tokens=LATE) for mode in Mode),
    Variant(Mode.COUPLED, FormName.AUTO, None, edge_only=True, languages=Languages.ENDLESS, tokens=LATE),
    *(
        replace(_NEAR, mode=mode, draft_length=length, edge_only=True, edge_draft=True)
        for length in (8, None)
        for mode in Mode
    ),
    *(Variant(mode, FormName.AUTO, length, edge_only=True, edge_draft=True) for length in (3, None) for mode in Mode),
    *(Variant(Mode.RESIDUAL, FormName.AUTO, 2, controls=controls) for controls in _FIELDS),
    *(Variant(Mode.COUPLED, FormName.AUTO, 1, ahead=True, controls=controls) for controls in _FIELDS),
    *(Variant(mode, FormName.AUTO, 2, edge_only=True, controls=controls) for controls in _FIELDS for mode in Mode),
    *(Variant(mode, form, 2, controls=Controls.ALL) for mode, form in _WAYS),
    *(Variant(mode, FormName.AUTO, 1, ahead=True, controls=Controls.ALL) for mode in Mode),
    *(Variant(mode, FormName.AUTO, 2, edge_only=True, controls=Controls.ALL) for mode in Mode),
    *(Variant(mode, FormName.AUTO, 3, edge_only=True, edge_draft=True, controls=Controls.ALL) for mode in Mode),
    *(Variant(mode, FormName.AUTO, 2, constrained=True, controls=Controls.ALL) for mode in Mode),
    *(Variant(mode, FormName.AUTO, 2, languages=Languages.UNLIKE, controls=Controls.ALL) for mode in Mode),
)

FAULTS = (
    *(
        Variant(Mode.RESIDUAL, form, 2, sabotage=sabotage)
        for form in (FormName.SPARSE, FormName.SAMPLES)
        for sabotage in (Sabotage.INVERTED, Sabotage.MISREPORTED, Sabotage.NO_RESIDUAL, Sabotage.UNSHAPED)
    ),
    *(Variant(mode, FormName.AUTO, 2, sabotage=Sabotage.NUCLEUS_SHORT) for mode in Mode),
    *(replace(_NEAR, sabotage=sabotage) for sabotage in (Sabotage.ACCEPTANCE_LOW, Sabotage.REPORTED_HIGH)),
    Variant(Mode.RESIDUAL, FormName.AUTO, 2, sabotage=Sabotage.CORRECTED_FROM_P),
    *(Variant(mode, FormName.AUTO, 2, sabotage=Sabotage.SEEDS_SHARED) for mode in Mode),
    Variant(Mode.RESIDUAL, FormName.AUTO, 2, edge_only=True, sabotage=Sabotage.UNSHAPED),
    *(
        Variant(mode, FormName.AUTO, 3, edge_only=True, edge_draft=True, sabotage=sabotage)
        for mode in Mode
        for sabotage in (Sabotage.GUESS_KEPT, Sabotage.GUESS_LIKELIEST, Sabotage.GUESS_SHIFTED)
    ),
    *(Variant(mode, FormName.AUTO, 2, two_targets=True, sabotage=Sabotage.TARGETS_ALIKE) for mode in Mode),
    Variant(Mode.RESIDUAL, FormName.AUTO, 2, stops=True, sabotage=Sabotage.WITHHELD),
    Variant(Mode.RESIDUAL, FormName.AUTO, 2, suffix=True, sabotage=Sabotage.LIKELIEST),
    *(
        Variant(Mode.RESIDUAL, form, 2, languages=Languages.UNLIKE, sabotage=sabotage)
        for form in (FormName.SPARSE, FormName.SAMPLES)
        for sabotage in (Sabotage.NOT_RENORMALISED, Sabotage.UNMAPPED)
    ),
    *(
        Variant(mode, FormName.AUTO, 2, engine=engine, sabotage=Sabotage.SHIFTED)
        for engine in _ENGINES
        for mode in Mode
    ),
    *(Variant(mode, FormName.AUTO, 2, engine=ToyEngine.DELTA, sabotage=Sabotage.LOG_SHORT) for mode in Mode),
    *(
        Variant(Mode.RESIDUAL, FormName.AUTO, 2, engine=ToyEngine.VLLM, sabotage=sabotage)
        for sabotage in (Sabotage.TEMPERED_TWICE, Sabotage.CUT_SHORT)
    ),
    Variant(Mode.COUPLED, FormName.AUTO, 2, engine=ToyEngine.VLLM, sabotage=Sabotage.TEMPERED_TWICE),
    *(
        Variant(Mode.RESIDUAL, FormName.AUTO, 2, greedy=True, engine=engine, sabotage=Sabotage.SHIFTED)
        for engine in _ENGINES
    ),
    *(
        Variant(mode, FormName.AUTO, 2, controls=controls, sabotage=sabotage)
        for mode in Mode
        for controls, sabotage in (
            (Controls.FREQUENCY, Sabotage.DRAFT_NOT_COUNTED),
            (Controls.BIAS, Sabotage.BIAS_LATE),
        )
    ),
    *(
        Variant(Mode.RESIDUAL, FormName.AUTO, 2, constrained=True, sabotage=sabotage)
        for sabotage in (Sabotage.MASKED_HALF, Sabotage.MASKED_LATE)
    ),
    *(
        Variant(mode, FormName.AUTO, 3, edge_only=True, constrained=True, sabotage=sabotage)
        for mode, sabotage in (
            (Mode.RESIDUAL, Sabotage.MASK_NOT_RENORMALISED),
            (Mode.RESIDUAL, Sabotage.MASKED_LATE),
            (Mode.COUPLED, Sabotage.MASKED_LATE),
        )
    ),
)
