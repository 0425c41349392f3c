"""Tool calls of an answer: its text, which a grammar has shaped, as calls in OpenAI's shape, whole or in pieces."""

import json
import re
import secrets
from dataclasses import dataclass, field
from typing import Any, Final

_BEGIN: Final = re.compile(r'\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ')
"""What stands before the arguments in a call, as the grammar has it written."""


@dataclass(slots=True)
class _Answer:
    """An answer as it comes in: what is not decided or not sent, and whether it is a call."""

    identifier: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")
    held: str = ""
    talks: bool = False
    called: bool = False


@dataclass(slots=True)
class ToolCalls:
    """How the texts of one reply are calls.

    Attributes:
        function: Whose arguments the whole text is; None where the text names the function itself.
        may_talk: Whether it may be plain words.
    """

    function: str | None = None
    may_talk: bool = False
    _answers: dict[int, _Answer] = field(default_factory=dict)

    def message(self, text: str, *, ended: bool) -> dict[str, Any]:
        """Return a message's fields for a whole text.

        Args:
            text: The answer.
            ended: Whether it came to its own end, rather than to its longest length.
        """
        delta = [*self.pieces(-1, text), *self.last(-1, ended=ended)]
        answer = self._answers.pop(-1)
        if not answer.called:
            return {"content": "".join(each.get("content", "") for each in delta)}
        parts = [each["tool_calls"][0]["function"] for each in delta]
        function = {"name": parts[0]["name"], "arguments": "".join(part["arguments"] for part in parts)}
        return {"content": None, "tool_calls": [{"id": answer.identifier, "type": "function", "function": function}]}

    def calls(self, number: int) -> bool:
        """Whether a choice has turned out to be a call."""
        return number in self._answers and self._answers[number].called

    def pieces(self, number: int, text: str) -> list[dict[str, Any]]:
        """Return the deltas of a piece of a choice's text."""
        answer = self._answers.setdefault(number, _Answer())
        answer.held += text
        if not answer.held:
            return []
        if self.may_talk and not answer.called and not answer.held.startswith("{"):
            answer.talks = True
        if answer.talks:
            piece, answer.held = answer.held, ""
            return [{"content": piece}]
        deltas: list[dict[str, Any]] = []
        if not answer.called:
            if (begun := self._begin(answer)) is None:
                return []
            deltas.append(begun)
        # The brace behind the arguments, which ends the call itself, comes last.
        keep = 0 if self.function is not None else 1
        piece, answer.held = answer.held[: len(answer.held) - keep], answer.held[len(answer.held) - keep :]
        return [*deltas, _arguments(piece)] if piece else deltas

    def last(self, number: int, *, ended: bool) -> list[dict[str, Any]]:
        """Return the deltas behind a choice's text."""
        answer = self._answers.setdefault(number, _Answer())
        held, answer.held = answer.held, ""
        if not held or (answer.called and ended):
            return []
        return [_arguments(held)] if answer.called else [{"content": held}]

    def _begin(self, answer: _Answer) -> dict[str, Any] | None:
        name = self.function
        if name is None:
            found = _BEGIN.match(answer.held)
            if found is None:
                return None
            name = str(json.loads(found[1]))
            answer.held = answer.held[found.end() :]
        answer.called, answer.talks = True, False
        call = {"index": 0, "id": answer.identifier, "type": "function", "function": {"name": name, "arguments": ""}}
        return {"tool_calls": [call]}


def _arguments(text: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}
