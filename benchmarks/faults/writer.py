"""Writer process: the real device over a toy draft model, which writes one text after another and checks each.

Texts alternate between the two modes and are drafted ahead, or, at some devices, written by the edge alone. In coupled
mode a text is compared token by token with what the seed and the target determine; in residual mode each token must be
one that the target may write there. In both, what the application received piece by piece must be the text. If the
task asks for structured output, each text must end by itself and be valid by its JSON schema instead.
"""

import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import jsonschema

from benchmarks.processes import Ending, tell
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.requests.generate import GenerateRequest, Generation, RequestContext
from fleet_device.service import DeviceService
from fleet_device.settings import DeviceSettings, OfflinePolicy, Outages
from sampling.distribution import Dist
from schemas.errors import FleetError
from schemas.policy import Grammar, Mode, SamplingPolicy
from schemas.reasons import EndReason
from tests.support.markov import MarkovScript
from tests.support.offset_clock import OffsetClock
from tests.support.processes import BrokerClient
from tests.support.scripted_language import (
    LANGUAGE,
    LETTER_END,
    LETTER_WORDS,
    LetterDrafter,
    draft_language,
    is_possible,
    reference_text,
)

_DRAFT: Final = 4
_EDGE_ONLY: Final = 0.25  # of the devices use edge-only decoding
_PROMPT: Final = (1, 40)
_AGAIN_S: Final = 0.5  # after a failed request
_OUTAGES: Final = Outages(policy=OfflinePolicy.WAIT)  # no fault is to end a request
_CONNECT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Load:
    devices: int = 8
    shortest: int = 40
    longest: int = 160
    token_s: float = 0.02
    pause_s: float = 0.1
    kv_tokens: int = 1 << 20
    structured: bool = False


_STATUS: Final = {"enum": ["normal", "warning", "critical"]}
_VALUE: Final = {"type": "integer", "minimum": -40, "maximum": 200}
_CODE: Final = {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"}
SCHEMAS: Final[tuple[dict[str, Any], ...]] = (
    {"type": "object", "properties": {"status": _STATUS, "value": _VALUE}, "required": ["status", "value"],
     "additionalProperties": False},
    {"oneOf": [{"type": "array", "items": _STATUS, "minItems": 1, "maxItems": 3}, _CODE]},
    {"type": "object", "properties": {"text": {"type": "string", "maxLength": 12}, "code": _CODE},
     "required": ["code"], "additionalProperties": False},
)  # fmt: skip
"""Of structured output; each bounds the length of a text."""

_LONGEST: Final = 200


class _PacedDrafter(ScriptedDrafter):
    """A drafter that takes a model's time without using the processor."""

    def __init__(self, script: MarkovScript, token_s: float) -> None:
        super().__init__(script, script.words)
        self._token_s = token_s

    def next(self, policy: SamplingPolicy) -> Dist:
        time.sleep(self._token_s)
        return super().next(policy)


def verdict(
    prompt: Sequence[int], policy: SamplingPolicy, tokens: Sequence[int], received: Sequence[int]
) -> str | None:
    """Return what is wrong with an output, in a word; None if nothing is."""
    if list(received) != list(tokens):
        return "torn"
    if policy.mode is Mode.COUPLED:
        return None if list(tokens) == reference_text(prompt, policy, len(tokens)) else "altered"
    return None if is_possible(prompt, policy, tokens) else "altered"


def _invalid(schema: dict[str, Any], done: Generation, received: Sequence[int]) -> str | None:
    """Return what is wrong with a structured output, in a word; None if nothing is or if it was cancelled."""
    if list(received) != list(done.tokens):
        return "torn"
    if done.reason is not EndReason.STOP:
        return None if done.reason is EndReason.CANCELLED else "cut off"
    text = "".join(LETTER_WORDS[token] for token in done.tokens if token not in LETTER_END)
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return "invalid"
    return None


def main() -> None:
    """Generate until SIGTERM; the task comes as a line of JSON on standard input."""
    task = json.loads(sys.stdin.readline())
    load, identity = Load(**task["load"]), BrokerClient(**task["identity"])
    ending = Ending().at_sigterm().with_parent()
    settings = DeviceSettings.model_validate(
        {
            "fleet": task["fleet"],
            "device": identity.name,
            "broker": identity.settings(),
            "draft_length": _DRAFT,
            "ahead": True,
            "edge_only": random.Random(f"edge-only {task['seed']}").random() < _EDGE_ONLY,
        }
    )
    rng = random.Random(task["seed"])
    drafter = LetterDrafter() if load.structured else _PacedDrafter(draft_language(), load.token_s)
    service = DeviceService(settings, drafter, now=OffsetClock.from_environment())
    service.start_patiently()
    try:
        service.edges.wait_online(_CONNECT_S)
        tell("ready")
        number = rng.randrange(2)
        while not ending.event.is_set():
            _write(service, load, rng, list(Mode)[number % 2], ending)
            number += 1
            ending.event.wait(load.pause_s * rng.uniform(0.5, 1.5))
    finally:
        service.stop()


def _write(
    service: DeviceService,
    load: Load,
    rng: random.Random,
    mode: Mode,
    ending: Ending,
) -> None:
    words = len(LETTER_WORDS) if load.structured else LANGUAGE.size
    prompt = [rng.randrange(words) for _ in range(rng.randint(*_PROMPT))]
    schema = rng.choice(SCHEMAS) if load.structured else None
    grammar = None if schema is None else Grammar.json_schema(schema)
    policy = SamplingPolicy(mode=mode, temperature=0.8, top_k=12, top_p=0.95, seed=rng.getrandbits(63), grammar=grammar)
    length = _LONGEST if load.structured else rng.randint(load.shortest, load.longest)
    received: list[int] = []

    def take(tokens: Sequence[int]) -> None:
        received.extend(tokens)
        tell("tokens", at=time.monotonic(), number=len(tokens))

    try:
        done = service.agent.generate(
            GenerateRequest(tuple(prompt), policy=policy, max_new_tokens=length, outages=_OUTAGES),
            RequestContext(on_tokens=take, cancellation=ending.cancellation),
        )
    except FleetError as error:
        wrong = None if schema else verdict(prompt, policy, received, received)
        tell("failed", sentence=str(error), written=len(received), mode=mode.value, wrong=wrong)
        ending.event.wait(_AGAIN_S)
        return
    wrong = verdict(prompt, policy, done.tokens, received) if schema is None else _invalid(schema, done, received)
    if schema is None and wrong is None and done.reason is EndReason.LENGTH and len(done.tokens) != length:
        wrong = "short"
    tell(
        "text",
        session=done.session.hex(),
        written=len(done.tokens),
        reason=done.reason.value,
        mode=mode.value,
        wrong=wrong,
        resumes=done.resumes,
        confirmed=done.closed is not None,
    )


if __name__ == "__main__":
    main()
