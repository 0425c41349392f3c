"""Chat templates: messages to a prompt, through the template that the model's file carries.

The template is a program from whoever made the file, so it runs in Jinja's sandbox, sees nothing but the
messages and a few helpers, and may not write without end.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fleet_device.drafters.contract import DrafterError, TextCodec

_MAX_TEMPLATE = 1 << 18
_MAX_PROMPT = 1 << 22
_MAX_REPEAT = 1 << 16
_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class ChatError(DrafterError):
    """The messages cannot be made into a prompt. Its text is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message.

    Attributes:
        role: `system`, `user` or `assistant`, as far as the model's template knows it.
        content: Text.
    """

    role: str
    content: str


class _Refusal(Exception):  # noqa: N818
    """The template itself declines the messages."""


class ChatTemplate:
    """A model's chat template.

    Args:
        source: Jinja source.
        bos: Text of the beginning-of-text token, which some templates write.
        eos: Text of the end-of-text token, likewise.
        now: The time, which some templates write.

    Raises:
        ChatError: The source is no template, or is absurdly long.
    """

    def __init__(
        self, source: str, *, bos: str = "", eos: str = "", now: Callable[[], datetime] = datetime.now
    ) -> None:
        if len(source) > _MAX_TEMPLATE:
            raise ChatError(f"The model's chat template has {len(source)} characters; refusing it.")
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation])
        environment.globals = {
            "namespace": environment.globals["namespace"],
            "range": environment.globals["range"],
            "dict": environment.globals["dict"],
            "raise_exception": _refuse,
            "strftime_now": lambda form: now().strftime(form),
        }
        self._names = {"bos_token": bos, "eos_token": eos}
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError, SyntaxError, ValueError, OverflowError, MemoryError) as error:
            raise ChatError(f"The model's chat template cannot be read: {error}.") from error

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """Return the prompt, up to where the assistant begins to write.

        Raises:
            ChatError: There are no messages, or the template fails or declines.
        """
        if not messages:
            raise ChatError("A chat needs at least one message.")
        plain = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return _bounded(self._template.generate(messages=plain, add_generation_prompt=True, **self._names))
        except ChatError:
            raise
        except _Refusal as refusal:
            raise ChatError(f"The model's chat template declines these messages: {refusal}.") from None
        except Exception as error:  # whatever a foreign program may raise
            raise ChatError(f"The model's chat template fails: {error}.") from error


def _bounded(parts: Iterable[str]) -> str:
    """Join what a template writes, as long as it is no more than a prompt can be."""
    kept: list[str] = []
    size = 0
    for part in parts:
        kept.append(part)
        size += len(part)
        if size > _MAX_PROMPT:
            raise ChatError(f"The chat gives a prompt of more than {_MAX_PROMPT} characters.")
    return "".join(kept)


def encode_chat(codec: TextCodec, messages: Sequence[ChatMessage]) -> list[int]:
    """Return the token ids of a chat.

    Control tokens come from the template alone: what looks like one in a message is plain text, so that nobody who may
    write a user's message can write a system's.

    Raises:
        ChatError: The model has no chat template, or its template fails or declines.
    """
    template = _template_of(codec)
    mark = _unused_character(messages)
    control = frozenset(text for text in codec.control_texts if len(text) > 1)  # of one character nothing can be broken
    broken = [
        ChatMessage(_break(message.role, control, mark), _break(message.content, control, mark)) for message in messages
    ]
    # Piece by piece: within a piece there is no control token but the template's own.
    return [token for piece in template.render(broken).split(mark) for token in codec.encode(piece, special=True)]


def chat_prefix(codec: TextCodec, system: str) -> str:
    """Return the beginning that all chats with a system prompt have, as the model reads it.

    Raises:
        ChatError: As `encode_chat`.
    """
    template = _template_of(codec)
    why, how = (
        template.render([ChatMessage("system", system), ChatMessage("user", question)]) for question in ("Why?", "How?")
    )
    differ = (place for place, (one, other) in enumerate(zip(why, how, strict=False)) if one != other)
    return why[: next(differ, len(why))]


def _template_of(codec: TextCodec) -> ChatTemplate:
    source = codec.chat_template
    if source is None:
        raise ChatError("The draft model has no chat template; send a plain prompt, or use an instruct model.")
    return ChatTemplate(source, bos=codec.special_text("bos"), eos=codec.special_text("eos"))


def _unused_character(messages: Sequence[ChatMessage]) -> str:
    """Return a character that no message has: one of those that Unicode leaves to private use.

    Raises:
        ChatError: They have them all.
    """
    used = {character for message in messages for character in message.role + message.content}
    for code in _PRIVATE_USE:
        if (character := chr(code)) not in used:
            return character
    raise ChatError("The messages use every private character of Unicode's plane 15; leave one of them out.")


def _break(text: str, control: frozenset[str], mark: str) -> str:
    """Put a mark behind the first character of whatever would be read as a control token, overlapping ones too."""
    lengths = sorted({len(each) for each in control})
    begins = {each[0] for each in control}
    return "".join(
        f"{character}{mark}"
        if character in begins and any(text[place : place + length] in control for length in lengths)
        else character
        for place, character in enumerate(text)
    )


def _refuse(sentence: str) -> NoReturn:
    raise _Refusal(str(sentence).rstrip("."))


class _Sandbox(ImmutableSandboxedEnvironment):
    """Also bounds the two operators that make something huge of something small."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401 - Jinja's
        for count, what in ((left, right), (right, left)):
            repeats = isinstance(count, int) and isinstance(what, str | list | tuple)
            if operator == "**" or (repeats and len(what) * count > _MAX_REPEAT):
                raise SecurityError(f"the operator {operator} would make something huge")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """Reads `{% generation %}`, with which some templates mark the assistant's words for training."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Keep the body, drop the mark."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
