"""Chats: from messages to a prompt through the chat template in the model's file, history, and token reuse."""

import functools
import hashlib
import json
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from typing import Any, Final

from fleet_device.drafters.contract import TextCodec, control_texts_with
from fleet_device.errors import PromptTooLong
from fleet_device.requests.call_formats import PROBE, PROBE_ARGUMENTS, CallFormat, recognise
from fleet_device.requests.structured import CalledFunction, ChatMessage, ToolCall, ToolOffer
from fleet_device.requests.template import ChatError, ChatTemplate
from fleet_device.requests.thinking import MARKS, TemplateOptions, Thinking, thinking_of

_FORMATS: Final = 64
"""Templates whose format of calls is remembered."""

_PRIVATE_USE = range(0xF0000, 0xFFFFE)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """The token ids of a chat, the thinking with which the output may begin, and the tools that it may call."""

    tokens: list[int]
    thinking: Thinking | None = None
    offer: ToolOffer | None = None
    control: Mapping[int, bytes] = field(default_factory=dict)


_NO_OPTIONS: Final = TemplateOptions()


def chat_prompt(
    codec: TextCodec,
    messages: Sequence[ChatMessage],
    options: TemplateOptions = _NO_OPTIONS,
    offer: ToolOffer | None = None,
) -> ChatPrompt:
    """Return the prompt of a chat; raise ChatError without a chat template, or if it fails or declines.

    Tools, calls and results go where the template has a place for them, else into the messages.

    Control tokens come from the template alone. What looks like one in a message, or in a variable of the application,
    is read as plain text, so that the author of a user's message cannot write a system message.
    """
    source = codec.chat_template
    if source is None:
        raise ChatError("The draft model has no chat template; send a plain prompt, or use an instruct model.")
    template = ChatTemplate(source, bos=codec.special_text("bos"), eos=codec.special_text("eos"))
    variables = options.of(source)
    calls = any(message.calls or message.role == "tool" for message in messages)
    native = _call_format(source) if calls or offer is not None else None
    if offer is not None:
        offer = offer.with_format(native)
        native = offer.native
    if native is None:
        messages = [message.in_words() for message in messages]
        if offer is not None:
            messages = offer.chat(messages)
    elif offer is not None:
        variables = {**variables, "tools": offer.described}
    texts = json.dumps([[asdict(message) for message in messages], variables], ensure_ascii=False, default=str)
    mark = _unused_character(texts)
    control = frozenset(text for text in codec.control_texts if len(text) > 1)  # a single character cannot be broken
    short = native is not None and native.short_ids
    broken = [_broken_message(message, control, mark, short_ids=short) for message in messages]
    text = template.render(broken, _broken(variables, control, mark))
    # Encode piece by piece: the only control tokens within a piece are the template's own.
    tokens = [token for piece in text.split(mark) for token in codec.encode(piece, special=True)]
    of_marks = [each for marks in MARKS for each in (marks.opening, marks.closing)]
    thinking = thinking_of(source, text, _control_tokens(codec, of_marks))
    if native is None or offer is None:
        return ChatPrompt(tokens, thinking, offer)
    if thinking is not None and native.closing:
        thinking = replace(thinking, marks=replace(thinking.marks, closing=native.closing))
    shown = {token: text.encode() for text, token in _control_tokens(codec, native.control)}
    return ChatPrompt(tokens, thinking, offer, shown)


@functools.lru_cache(_FORMATS)
def _call_format(source: str) -> CallFormat | None:
    """Return the format in which a template renders calls; None if it has no place for them, or another one."""
    if "tools" not in source:
        return None
    call = ToolCall(id="a" * 9, function=CalledFunction(name=PROBE, arguments=json.dumps(PROBE_ARGUMENTS)))
    chat = [
        ChatMessage("user", "a"),
        ChatMessage("assistant", "", calls=(call,)),
        ChatMessage("tool", "b", call_id=call.id),
    ]
    try:
        return recognise(ChatTemplate(source).render(chat))
    except ChatError:
        return None


def _broken_message(message: ChatMessage, control: frozenset[str], mark: str, *, short_ids: bool) -> ChatMessage:
    def broken(text: str) -> str:
        return _break(text, control, mark)

    def identity(text: str) -> str:
        return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:9] if short_ids else broken(text)

    calls = []
    for call in message.calls:
        arguments = call.function.arguments
        with suppress(ValueError, RecursionError):
            arguments = json.dumps(_broken(json.loads(arguments), control, mark), ensure_ascii=False)
        function = CalledFunction(name=broken(call.function.name), arguments=arguments)
        calls.append(ToolCall(id=identity(call.id), function=function))
    return ChatMessage(
        broken(message.role),
        broken(message.content),
        broken(message.reasoning),
        tuple(calls),
        identity(message.call_id),
    )


def _control_tokens(codec: TextCodec, marks: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Return the control tokens that marks are made of, with their ids."""
    texts = [text for text in codec.control_texts if any(text in each for each in marks)]
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


def _unused_character(texts: str) -> str:
    """Return a private-use character that the texts do not contain; raise ChatError if there is none."""
    used = set(texts)
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

    def begin_turn(self, question: str, *, count: Count, room: int) -> tuple[list[ChatMessage], int]:
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
        self._control: dict[str, tuple[str, ...]] = {}
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

    def control_texts_with(self, template: str) -> tuple[str, ...]:
        with self._one:
            if template not in self._control:
                if len(self._control) >= _REMEMBERED:
                    self._control.clear()
                self._control[template] = control_texts_with(self._codec, template)
            return self._control[template]

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the token ids of a text; for a rendered chat that goes on, reuse the generated tokens."""
        with self._one:
            if not special or any(text in each for each in (self.control_texts, *self._control.values())):
                return self._codec.encode(text, special=special)
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
