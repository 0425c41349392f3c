"""Chats: from messages to a prompt through the chat template in the model's file, history, and token reuse."""

import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate
from typing import Any, Final

from fleet_device.drafters.contract import TextCodec
from fleet_device.errors import PromptTooLong
from fleet_device.requests.structured import ChatMessage
from fleet_device.requests.template import ChatError, ChatTemplate
from fleet_device.requests.thinking import MARKS, TemplateOptions, Thinking, thinking_of

_PRIVATE_USE = range(0xF0000, 0xFFFFE)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """The token ids of a chat, and the thinking with which the output may begin."""

    tokens: list[int]
    thinking: Thinking | None = None


def encode_chat(codec: TextCodec, messages: Sequence[ChatMessage]) -> list[int]:
    """Return the token ids of a chat, as `chat_prompt` does."""
    return chat_prompt(codec, messages).tokens


_NO_OPTIONS: Final = TemplateOptions()


def chat_prompt(
    codec: TextCodec, messages: Sequence[ChatMessage], options: TemplateOptions = _NO_OPTIONS
) -> ChatPrompt:
    """Return the prompt of a chat; raise ChatError without a chat template, or if it fails or declines.

    Control tokens come from the template alone. What looks like one in a message, or in a variable of the application,
    is read as plain text, so that the author of a user's message cannot write a system message.
    """
    source = codec.chat_template
    if source is None:
        raise ChatError("The draft model has no chat template; send a plain prompt, or use an instruct model.")
    template = ChatTemplate(source, bos=codec.special_text("bos"), eos=codec.special_text("eos"))
    variables = options.of(source)
    texts = [each for message in messages for each in astuple(message)]
    mark = _unused_character([*texts, json.dumps(variables, ensure_ascii=False)])
    control = frozenset(text for text in codec.control_texts if len(text) > 1)  # a single character cannot be broken
    broken = [ChatMessage(*(_break(each, control, mark) for each in astuple(message))) for message in messages]
    text = template.render(broken, _broken(variables, control, mark))
    # Encode piece by piece: the only control tokens within a piece are the template's own.
    tokens = [token for piece in text.split(mark) for token in codec.encode(piece, special=True)]
    return ChatPrompt(tokens, thinking_of(source, text, _control_tokens(codec)))


def _control_tokens(codec: TextCodec) -> tuple[tuple[str, int], ...]:
    """Return the control tokens that marks of thinking are made of, with their ids."""
    texts = [text for text in codec.control_texts if any(text in each.opening + each.closing for each in MARKS)]
    read = {text: codec.encode(text, special=True) for text in texts}
    return tuple((text, ids[0]) for text, ids in read.items() if len(ids) == 1 and not codec.piece(ids[0]))


def _broken(value: Any, control: frozenset[str], mark: str) -> Any:  # noqa: ANN401 - JSON
    match value:
        case str():
            return _break(value, control, mark)
        case dict():
            return {_break(key, control, mark): _broken(each, control, mark) for key, each in value.items()}
        case list():
            return [_broken(each, control, mark) for each in value]
    return value


def _unused_character(texts: Iterable[str]) -> str:
    """Return a private-use character that no text contains; raise ChatError if there is none."""
    used = set[str]().union(*texts)
    for code in _PRIVATE_USE:
        if (character := chr(code)) not in used:
            return character
    raise ChatError("The messages use every private character of Unicode's plane 15; leave one of them out.")


def _break(text: str, control: frozenset[str], mark: str) -> str:
    """Put a mark behind the first character of any text that would be read as a control token, overlapping ones too."""
    lengths = sorted({len(each) for each in control})
    begins = {each[0] for each in control}
    return "".join(
        f"{character}{mark}"
        if character in begins and any(text[place : place + length] in control for length in lengths)
        else character
        for place, character in enumerate(text)
    )


_FILLED, _OF = 3, 4
"""After turns were dropped, the rest fills at most three quarters of the room, as long as one turn is left: another
beginning is computed again at both ends, which must not happen at every turn."""

Count = Callable[[Sequence[ChatMessage]], int]


class ChatHistory:
    """A conversation that drops its oldest turns when it becomes longer than its context.

    A turn is a user's message and the answer to it. The system message always stays; it may be empty.
    """

    def __init__(self, system: str = "") -> None:
        self.system = system
        self._turns: list[tuple[str, str]] = []

    def reset(self) -> None:
        self._turns.clear()

    def answered(self, question: str, answer: str) -> None:
        self._turns.append((question, answer))

    def drop_oldest(self) -> bool:
        if self._turns:
            del self._turns[0]
            return True
        return False

    def ask(self, question: str, *, count: Count, room: int) -> tuple[list[ChatMessage], int]:
        """Return the messages of a new turn, and the number of oldest turns that were dropped for them.

        `count` counts the tokens of a chat, at most `room`. Raise PromptTooLong, without dropping a turn, if they are
        too many, DrafterError if the messages cannot be encoded.
        """
        fitting: tuple[int, list[ChatMessage]] | None = None  # turns dropped, messages
        for dropped in range(len(self._turns) + 1):
            messages = self._messages(question, self._turns[dropped:])
            tokens = count(messages)
            if tokens <= room and (fitting is None or dropped < len(self._turns)):
                fitting = dropped, messages
            if fitting is not None and (not dropped or tokens * _OF <= room * _FILLED):
                break
        if fitting is not None:
            dropped, messages = fitting
            del self._turns[:dropped]
            return messages, dropped
        raise PromptTooLong(
            f"The message has {tokens:,} tokens with what comes before it, and the context holds {room:,}: "
            "shorten it, or raise the setting 'context'."
        )

    def _messages(self, question: str, turns: Sequence[tuple[str, str]]) -> list[ChatMessage]:
        messages = [ChatMessage("system", self.system)] if self.system else []
        for asked, answer in turns:
            messages += [ChatMessage("user", asked), ChatMessage("assistant", answer)]
        return [*messages, ChatMessage("user", question)]


_REMEMBERED: Final = 8
"""Concurrent conversations that are remembered."""


@dataclass(frozen=True, slots=True)
class _Written:
    text: str
    tokens: tuple[int, ...]


class ConversationCodec:
    """`TextCodec` over another, which encodes a continued chat with the tokens that were generated.

    A model may generate other tokens than its tokenizer makes of the same text. Encoding the whole next turn of a
    conversation would change the prefix from the first such place on, and both ends would compute it again. Callable on
    any thread.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self.special_text, self.piece = codec.special_text, codec.piece
        self._one = threading.Lock()
        self._encoded: deque[_Written] = deque(maxlen=_REMEMBERED)
        self._written: deque[_Written] = deque(maxlen=2 * _REMEMBERED)  # the latest first

    @property
    def end_tokens(self) -> tuple[int, ...]:
        return self._codec.end_tokens

    @property
    def chat_template(self) -> str | None:
        return self._codec.chat_template

    @property
    def control_texts(self) -> tuple[str, ...]:
        return self._codec.control_texts

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the token ids of a text; for a rendered chat that goes on, reuse the generated tokens."""
        with self._one:
            if not special or text in self.control_texts:
                return self._codec.encode(text)
            known = next((each for each in self._written if self._goes_on(text, each.text)), _Written("", ()))
            tokens = [*known.tokens, *self._codec.encode(text[len(known.text) :], special=True)]
            self._encoded.append(_Written(text, tuple(tokens)))
            return tokens

    def remember(self, prompt: Sequence[int], text: str, tokens: Sequence[int]) -> None:
        """Record the output for a prompt that `encode` has returned as a whole; ignore other prompts.

        Tokens are recorded only if they are exactly the text, without control tokens or partial characters.
        """
        written = list(tokens)
        while written and written[-1] in self.end_tokens:
            written.pop()
        pieces = [self.piece(token) for token in written]
        with self._one:
            encoded = next((each for each in self._encoded if each.tokens == tuple(prompt)), None)
            if encoded is None or not text or not all(pieces) or b"".join(pieces) != text.encode("utf-8", "replace"):
                return
            self._note(encoded, text, written)
            # Many templates, and many applications, drop the white space at the end of an answer.
            stripped = text.rstrip().encode("utf-8", "replace")
            lengths = list(accumulate(map(len, pieces)))
            if len(stripped) < lengths[-1] and len(stripped) in lengths:
                self._note(encoded, text.rstrip(), written[: lengths.index(len(stripped)) + 1])

    def _note(self, encoded: "_Written", text: str, tokens: Sequence[int]) -> None:
        self._written.appendleft(_Written(encoded.text + text, (*encoded.tokens, *tokens)))

    def _goes_on(self, text: str, beginning: str) -> bool:
        """Behind a control token the parts of a text can be encoded separately."""
        return text.startswith(beginning) and any(text.startswith(each, len(beginning)) for each in self.control_texts)
