"""Chat history: what was said so far, as much of it as the draft model's context holds."""

from collections.abc import Callable, Sequence

from fleet_device.errors import PromptTooLong
from fleet_device.texts.chat import ChatMessage

_FILLED, _OF = 3, 4
"""Where turns are dropped, the rest fills three quarters of the room at most, as long as one turn is left: another
beginning has to be computed anew at both ends, and that must not happen at every turn from then on."""

Count = Callable[[Sequence[ChatMessage]], int]
"""Returns the number of tokens of a chat, up to where the assistant begins to write."""


class ChatHistory:
    """A conversation that may become longer than its context: the oldest turns are dropped then.

    A turn is a user's message and the answer to it. Whatever is dropped, the system's message stays.

    Args:
        system: The system's message; empty for none.

    Attributes:
        system: The system's message, which may be set.
        prompt_tokens: Tokens of the messages that `ask` has returned last.
    """

    def __init__(self, system: str = "") -> None:
        self.system = system
        self.prompt_tokens = 0
        self._turns: list[tuple[str, str]] = []

    @property
    def turns(self) -> int:
        return len(self._turns)

    def reset(self) -> None:
        self._turns.clear()

    def answered(self, question: str, answer: str) -> None:
        self._turns.append((question, answer))

    def drop_oldest(self) -> bool:
        """Forget the oldest turn; return whether there was one."""
        if self._turns:
            del self._turns[0]
            return True
        return False

    def ask(self, question: str, *, count: Count, room: int, drop: bool) -> tuple[list[ChatMessage], int]:
        """Return the messages of a new turn, and how many of the oldest turns were dropped for them.

        Args:
            question: The user's new message.
            count: Counts the tokens of a chat.
            room: Most tokens of the messages.
            drop: Whether to drop the oldest turns where all of them are too long.

        Raises:
            PromptTooLong: The messages are too long; no turn was dropped.
            DrafterError: The messages cannot be made into tokens.
        """
        fitting: tuple[int, int, list[ChatMessage]] | None = None  # turns dropped, tokens, messages
        for dropped in range(len(self._turns) + 1 if drop else 1):
            messages = self._messages(question, self._turns[dropped:])
            tokens = count(messages)
            if tokens <= room and (fitting is None or dropped < len(self._turns)):
                fitting = dropped, tokens, messages
            if fitting is not None and (not dropped or tokens * _OF <= room * _FILLED):
                break
        if fitting is not None:
            dropped, self.prompt_tokens, messages = fitting
            del self._turns[:dropped]
            return messages, dropped
        if drop or not self._turns:
            raise PromptTooLong(
                f"The message has {tokens:,} tokens with what comes before it, and the context has room for {room:,}: "
                "shorten it, or raise the setting 'context'."
            )
        raise PromptTooLong(
            f"The conversation would have {tokens:,} tokens, and the context has room for {room:,}: begin a new one, "
            "or raise the setting 'context'."
        )

    def _messages(self, question: str, turns: Sequence[tuple[str, str]]) -> list[ChatMessage]:
        messages = [ChatMessage("system", self.system)] if self.system else []
        for asked, answer in turns:
            messages += [ChatMessage("user", asked), ChatMessage("assistant", answer)]
        return [*messages, ChatMessage("user", question)]
