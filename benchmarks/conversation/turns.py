"""Turns of a conversation: tokens that each computes on the device, and the time to its first token."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dssd.distribution import Dist
from fleet_device.device import Device
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.texts.chat import ChatMessage
from schemas.policy import SamplingPolicy

__all__ = ["MeteredDrafter", "Talk", "Written", "converse"]


class MeteredDrafter(LlamaCppDrafter):
    """A draft model that tells what its first row of a text took.

    Attributes:
        prompt_computed: Tokens that it has computed for the first row since `begin`; 0 if no row was asked for.
    """

    def __init__(self, settings: LlamaCppSettings) -> None:
        super().__init__(settings)
        self.prompt_computed = 0
        self._before: int | None = 0

    def begin(self) -> None:
        """A text begins."""
        self.prompt_computed, self._before = 0, self.tokens_computed

    def next(self, policy: SamplingPolicy) -> Dist:
        """Compute what is pending, as `LlamaCppDrafter` does."""
        dist = super().next(policy)
        if self._before is not None:
            self.prompt_computed, self._before = self.tokens_computed - self._before, None
        return dist


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """One turn as the device has it.

    Attributes:
        session: Its id in the session log.
        turn: From 1.
        prompt: Tokens of the prompt: all that was said before, and the question.
        new: Of these, those behind what the last turn has written.
        computed: Tokens that the draft model computed before it could draft.
        written: Tokens of the answer.
        first_ms: From asking to the first token of the answer.
    """

    session: str
    turn: int
    prompt: int
    new: int
    computed: int
    written: int
    first_ms: float


class Talk:
    """A conversation.

    Args:
        system: What it begins with.

    Attributes:
        turns: So far.
    """

    def __init__(self, system: str) -> None:
        self.turns: list[Written] = []
        self._messages = [ChatMessage("system", system)]
        self._known = 0  # tokens of the last turn, its answer included

    def ask(
        self,
        device: Device,
        drafter: MeteredDrafter,
        question: str,
        *,
        tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Ask a question, with all that was said before.

        Args:
            device: Open.
            drafter: Its draft model.
            question: Of the user.
            tokens: Of the answer, at most.
            clock: Monotonic seconds.

        Raises:
            DeviceError: The answer could not be written.
        """
        self._messages.append(ChatMessage("user", question))
        drafter.begin()
        asked = clock()
        first_at: float | None = None
        with device.stream(self._messages, max_new_tokens=tokens) as stream:
            for piece in stream.pieces():
                if first_at is None and piece.tokens:
                    first_at = clock()
            text = stream.result()
        self._messages.append(ChatMessage("assistant", text.text))
        prompt = len(text.request.prompt)
        self.turns.append(
            Written(
                session=text.session,
                turn=len(self.turns) + 1,
                prompt=prompt,
                new=prompt - self._known,
                computed=drafter.prompt_computed,
                written=len(text.tokens),
                first_ms=((first_at or clock()) - asked) * 1e3,
            )
        )
        self._known = prompt + len(text.tokens)


def converse(
    device: Device, drafter: MeteredDrafter, questions: Sequence[str], *, systems: Sequence[str], tokens: int
) -> list[list[Written]]:
    """Ask one question after the other, in as many conversations as there are `systems`, which take turns.

    Args:
        device: Open.
        drafter: Its draft model.
        questions: Of the user, by turn.
        systems: What each conversation begins with.
        tokens: Of each answer, at most.

    Returns:
        The turns of each conversation.

    Raises:
        DeviceError: A turn could not be written.
    """
    talks = [Talk(system) for system in systems]
    for question in questions:
        for talk in talks:
            talk.ask(device, drafter, question, tokens=tokens)
    return [talk.turns for talk in talks]
