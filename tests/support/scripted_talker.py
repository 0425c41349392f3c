"""A device for chats without a fleet: a real queue and stream over a scripted agent."""

from collections.abc import Sequence
from functools import partial
from typing import Unpack

from fleet_device.requests.generate import generate_text
from fleet_device.requests.prompt import TextOptions, prepare_request
from fleet_device.requests.queue import RequestQueue, TextStream
from fleet_device.requests.structured import ChatMessage
from tests.support.memory_device import ScriptedAgent, TalkingDrafter, settings


class ScriptedTalker:
    def __init__(self, agent: ScriptedAgent | None = None, drafter: TalkingDrafter | None = None) -> None:
        self.agent = agent or ScriptedAgent()
        self.drafter = drafter or TalkingDrafter()
        self.asked: list[list[ChatMessage]] = []
        self._settings = settings()
        self._queue = RequestQueue(partial(generate_text, self.agent, self.drafter))
        self._queue.start()

    def count_tokens(self, prompt: Sequence[ChatMessage]) -> int:
        return len(prepare_request(prompt, self._settings).encode(self.drafter.codec).prompt)

    def stream(self, prompt: Sequence[ChatMessage], **options: Unpack[TextOptions]) -> TextStream:
        self.asked.append(list(prompt))
        prepared = prepare_request(prompt, self._settings, **options)
        return TextStream(self._queue, lambda: prepared.encode(self.drafter.codec))

    def close(self) -> None:
        self._queue.abandon()
        self._queue.join()
