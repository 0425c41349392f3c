"""Thinking: what a reasoning model generates before its answer, between the marks of its chat template."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, Final

from pydantic import AfterValidator

from fleet_device.settings import ReasoningEffort
from schemas.policy import Grammar, GrammarKind

_RESERVED: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})


def _variables(given: dict[str, Any]) -> dict[str, Any]:
    if taken := _RESERVED & given.keys():
        raise ValueError(f"{min(taken)!r} is no variable of an application")
    return given


TemplateVariables = Annotated[dict[str, Any], AfterValidator(_variables)]
"""Variables of a chat template, as JSON has them."""


@dataclass(frozen=True, slots=True)
class ThinkingMarks:
    """Texts before and behind the thinking; each is one or more tokens."""

    opening: str
    closing: str


CHANNELS: Final = ThinkingMarks(
    "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"
)
_CHANNELS_OF: Final = "<|channel|>final<|message|>"  # in templates of gpt-oss

MARKS: Final = (
    CHANNELS,
    ThinkingMarks("<think>", "</think>"),
    ThinkingMarks("<seed:think>", "</seed:think>"),
    ThinkingMarks("<mm:think>", "</mm:think>"),
    ThinkingMarks("[THINK]", "[/THINK]"),
    ThinkingMarks("<|START_THINKING|>", "<|END_THINKING|>"),
    ThinkingMarks("<|inner_prefix|>", "<|inner_suffix|>"),
    ThinkingMarks("<|channel>thought\n", "<channel|>"),
    ThinkingMarks("<thinking>", "</thinking>"),
)
"""Marks of gpt-oss; of Qwen, DeepSeek, GLM and most others; and of Seed-OSS, MiniMax, Mistral, Cohere, Apertus, Gemma 4
and Apriel, in this order."""


def marks_of(template: str) -> ThinkingMarks | None:
    """Return the marks that a chat template names; None for a model that does not think."""
    if _CHANNELS_OF in template:
        return CHANNELS
    return next((each for each in MARKS if each.closing in template or repr(each.opening)[1:-1] in template), None)


def template_variables(effort: ReasoningEffort | None, template: str) -> dict[str, Any]:
    """Return the variables that turn thinking on or off in a template: each family of models has a word of its own."""
    if effort is None:
        return {}
    on, level = effort is not ReasoningEffort.NONE, effort
    if _CHANNELS_OF in template and effort in (ReasoningEffort.NONE, ReasoningEffort.MINIMAL):
        level = ReasoningEffort.LOW  # the least that gpt-oss has
    return {
        "enable_thinking": on,
        "thinking": on,
        "thinking_mode": "enabled" if on else "disabled",
        "reasoning_effort": level.value,
    }


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """Variables of a chat template in addition to the messages: the effort's, and those that the application names."""

    effort: ReasoningEffort | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    def of(self, template: str) -> dict[str, Any]:
        return {**template_variables(self.effort, template), **self.variables}


@dataclass(frozen=True, slots=True)
class Thinking:
    """The marks of a request's model.

    Attributes:
        begun: The prompt ends within the thinking, so the output begins there.
        control: Texts of the control tokens in the marks, by id, which are no part of any other text.
    """

    marks: ThinkingMarks
    begun: bool = False
    control: Mapping[int, bytes] = field(default_factory=dict, hash=False)


def thinking_of(template: str, prompt: str, control: Iterable[tuple[str, int]]) -> Thinking | None:
    """Return the thinking of a rendered prompt; None if its output has none.

    `control` are the control tokens whose text is in a mark.
    """
    marks = marks_of(template)
    if marks is None:
        return None
    end = prompt.rstrip()
    if end.endswith(marks.closing.rstrip()):
        return None  # turned off: the thinking is over, and empty
    known = {token: text.encode() for text, token in control if text in marks.opening + marks.closing}
    return Thinking(marks, begun=end.endswith(marks.opening.rstrip()), control=known)


class _Part(Enum):
    UNDECIDED = 0  # nothing has come but a possible beginning of the opening mark
    THINKING = 1
    CLOSED = 2  # no text of the answer has come yet
    ANSWER = 3


class ThinkingSplitter:
    """Divide a growing output into thinking and answer, without marks and the white space around them.

    The thinking has one place, at the beginning: what looks like a mark in the answer is text.
    """

    def __init__(self, thinking: Thinking | None) -> None:
        self._marks = thinking.marks if thinking else ThinkingMarks("", "")
        self._part = _Part.ANSWER if thinking is None else _Part.THINKING if thinking.begun else _Part.UNDECIDED
        self._held = ""
        self._thought = False

    @property
    def thinks(self) -> bool:
        """The output so far ends within the thinking."""
        return self._part is _Part.THINKING

    def feed(self, text: str) -> tuple[str, str]:
        """Return more of the thinking and more of the answer; a possible beginning of a mark is held back."""
        self._held += text
        if self._part is _Part.UNDECIDED:
            begun = self._held.lstrip()
            if begun.startswith(self._marks.opening):
                self._part, self._held = _Part.THINKING, begun[len(self._marks.opening) :]
            elif not self._marks.opening.startswith(begun):
                self._part = _Part.ANSWER
        thinking = self._think() if self._part is _Part.THINKING else ""
        if self._part is _Part.CLOSED:
            self._held = self._held.lstrip()
            if self._held:
                self._part = _Part.ANSWER
        if self._part is not _Part.ANSWER:
            return thinking, ""
        answer, self._held = self._held, ""
        return thinking, answer

    def finish(self) -> tuple[str, str]:
        """Return the rest that was held back, at the end of the output."""
        held, self._held = self._held, ""
        if self._part is _Part.THINKING:
            return held.rstrip(), ""
        return "", "" if self._part is _Part.CLOSED else held

    def _think(self) -> str:
        if not self._thought:
            self._held = self._held.lstrip()
        found, closing, rest = self._held.partition(self._marks.closing)
        if closing:
            self._part, self._held = _Part.CLOSED, rest
            found = found.rstrip()
        else:
            found = found[: len(found) - overlap(found, self._marks.closing)].rstrip()
            self._held = self._held[len(found) :]
        self._thought = self._thought or bool(found)
        return found


def overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of a text with which a mark may begin."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


_START: Final = re.compile(r"\Astart:")
_SLASH: Final = re.compile(r"(?<!\\)((?:\\\\)*)/")  # that is not escaped
_EXACT: Final = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""Options of a schema within another grammar: the white space is as in a schema alone."""


def after_thinking(grammar: Grammar, thinking: Thinking) -> Grammar:
    """Return the grammar of any thinking and then an answer that matches the given one.

    It is the given one, which leaves no room for thinking, where a mark is a control token: a grammar is about text. A
    Lark grammar begins with its rule `start`, to which nothing else refers.
    """
    if thinking.control:
        return grammar
    match grammar.kind:
        case GrammarKind.LARK:
            answer = _START.sub("answer:", grammar.text)
        case GrammarKind.REGEX:
            escaped = _SLASH.sub(r"\1\\/", grammar.text)
            answer = f"answer: ANSWER\nANSWER: /{escaped}/\n"
        case _:
            schema = json.loads(grammar.text or '{"type": "object"}') | {"x-guidance": _EXACT}
            answer = f"answer: %json {json.dumps(schema, separators=(',', ':'))}\n"
    opening, closing = json.dumps(thinking.marks.opening), json.dumps(thinking.marks.closing)
    thought = "thinking SPACE answer" if thinking.begun else f"{opening} thinking SPACE answer | answer"
    return Grammar.lark(
        f"start: {thought}\nthinking[suffix={closing}]: THOUGHT\nTHOUGHT: /(.|\\n)*/\nSPACE: /[ \\n]*/\n{answer}"
    )
