"""Honest device process: the real device, which writes text after text and reports when its tokens are committed.

Its drafts are replayed from a text that was written before, so that they cost nothing: on a fleet a device has its own
processor, and here it would take the edge's. Every fourth token of a draft is wrong, so that the edge rejects as it
would with a real draft model.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.processes import Ending, tell
from fleet_device.drafters.contract import Drafter, TextCodec
from fleet_device.drafters.model_file import GgufModel
from fleet_device.drafters.without_model import NoDrafter, WordCodec
from fleet_device.requests.chat import chat_prompt
from fleet_device.requests.generate import GenerateRequest, RequestContext
from fleet_device.requests.structured import ChatMessage
from fleet_device.service import DeviceService
from fleet_device.settings import DeviceSettings
from schemas.errors import FleetError
from schemas.policy import Grammar, Mode, SamplingPolicy
from schemas.vocabulary import Vocabulary
from tests.support.processes import BrokerClient
from tests.support.recorded_drafter import RecordedDrafter, mostly_right
from tests.support.scripted_language import LANGUAGE, LETTER_END, LETTER_WORDS, LetterCodec

_DRAFT: Final = 4
_PAUSE_S: Final = 0.5  # after a failed request

_OBJECT: Final = '{"a": "'

_SHORT: Final = Grammar.json_schema(
    {
        "type": "object",
        "properties": {
            "topic": {"type": "string", "maxLength": 20},
            "stars": {"type": "integer", "minimum": 0, "maximum": 9},
            "sure": {"type": "boolean"},
        },
        "required": ["topic", "stars", "sure"],
        "additionalProperties": False,
    }
)
"""Schema of short JSON texts, some 25 tokens."""


@dataclass(frozen=True, slots=True)
class Language:
    """Text side of the target, without a draft model."""

    codec: TextCodec
    vocabulary: Vocabulary

    @classmethod
    def load(cls, model: Path | None, *, json: bool) -> "Language":
        """Open a model's vocabulary; without one, the words of a scripted target, letters for JSON texts."""
        if model is None and json:
            return cls(LetterCodec(LETTER_WORDS, LETTER_END), Vocabulary.of(LETTER_WORDS))
        if model is None:
            return cls(WordCodec(LANGUAGE.words), Vocabulary.of(LANGUAGE.words))
        opened = GgufModel(model, vocabulary_only=True)
        return cls(opened, opened.vocabulary)

    def json_string(self) -> tuple[tuple[int, ...], int]:
        """Return the tokens that begin a JSON object with a string, and the longest one that the string may have."""
        pieces = [self.codec.piece(token) for token in range(self.vocabulary.size)]
        plain = [token for token, piece in enumerate(pieces) if piece.isascii() and not set(piece) & set(b'"\\')]
        filler = max(plain, key=lambda token: len(pieces[token]) if pieces[token].decode().isprintable() else 0)
        if isinstance(self.codec, LetterCodec):
            return tuple(LETTER_WORDS.index(letter) for letter in _OBJECT), filler
        if isinstance(self.codec, WordCodec):
            return (), filler  # the words of a scripted target spell no JSON
        return tuple(token for token in self.codec.encode(_OBJECT) if pieces[token]), filler

    def encode(self, prompt: str) -> list[int]:
        if isinstance(self.codec, LetterCodec):
            return [LETTER_WORDS.index(letter) for letter in prompt if letter in LETTER_WORDS]
        if isinstance(self.codec, WordCodec):
            return [1 + sum(prompt.encode()) % (self.vocabulary.size - 1)]
        return chat_prompt(self.codec, [ChatMessage("user", prompt)]).tokens


def main() -> None:
    """Generate until SIGTERM; the task comes as a line of JSON on standard input."""
    task = json.loads(sys.stdin.readline())
    ending = Ending().at_sigterm()
    language = Language.load(Path(task["model"]) if task["model"] else None, json=task["json"])
    identity = BrokerClient(**task["identity"])
    settings = DeviceSettings.model_validate(
        {
            "fleet": task["fleet"],
            "device": identity.name,
            "broker": identity.settings(),
            "draft_length": _DRAFT if task["texts"] else 0,
        }
    )
    codec, vocabulary = language.codec, language.vocabulary
    recorded = RecordedDrafter(codec, vocabulary)
    drafter: Drafter = recorded if task["texts"] else NoDrafter(vocabulary, codec, context=recorded.context)
    service = DeviceService(settings, drafter)
    service.start()
    try:
        service.edges.wait_online(settings.answer_s)
        tell("ready")
        number = 0
        while not ending.event.is_set() and (task["texts"] or number < len(task["prompts"])):
            index = number % len(task["prompts"])
            prompt = language.encode(task["prompts"][index])
            if task["texts"]:
                recorded.play(mostly_right(prompt, task["texts"][index], SamplingPolicy(seed=0), vocabulary))
            _write(service, prompt, task, index, ending)
            number += 1
    finally:
        service.stop()


def _write(
    service: DeviceService,
    prompt: Sequence[int],
    task: dict[str, Any],
    index: int,
    ending: Ending,
) -> None:
    grammar = _SHORT if task["json"] else None
    policy = SamplingPolicy(mode=Mode.COUPLED, seed=task["seeds"][index], grammar=grammar)
    try:
        done = service.agent.generate(
            GenerateRequest(tuple(prompt), policy=policy, max_new_tokens=task["tokens"]),
            RequestContext(
                on_tokens=lambda new: tell("tokens", at=time.monotonic(), number=len(new)),
                cancellation=ending.cancellation,
            ),
        )
    except FleetError as error:
        tell("failed", sentence=str(error))
        ending.event.wait(_PAUSE_S)
        return
    same = not task["texts"] or list(done.tokens) == task["texts"][index][: len(done.tokens)]
    tokens = [] if task["texts"] else list(done.tokens)
    quota_s = done.counters.quota_wait_ms / 1e3
    tell("text", tokens=tokens, resumes=done.resumes, same=same, quota_s=quota_s)


if __name__ == "__main__":
    main()
