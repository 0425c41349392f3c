"""Figures of a chat: how its answers were written, the last one and all of them."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from fleet_device.requests.generate import GeneratedText
from fleet_device.session.sequence import TokenOrigin
from schemas.printable import printable_line

_WORDS: Final = {
    TokenOrigin.DRAFTED: "drafted and accepted",
    TokenOrigin.CORRECTED: "corrected",
    TokenOrigin.BONUS: "drawn by the edge behind a draft",
    TokenOrigin.STREAMED: "written by the edge alone",
    TokenOrigin.FORCED: "forced by a grammar",
    TokenOrigin.UNVERIFIED: "unverified",
}


@dataclass(slots=True)
class ChatFigures:
    """Sums over the answers of a chat."""

    _last: GeneratedText | None = None
    _answers: int = 0
    _tested: int = 0
    _accepted: int = 0
    _wall_s: float = 0.0
    _origins: Counter[TokenOrigin] = field(default_factory=Counter)

    def add(self, text: GeneratedText) -> None:
        self._last = text
        self._answers += 1
        self._tested += text.generation.counters.tested
        self._accepted += text.generation.counters.accepted
        self._wall_s += text.generation.wall_ms / 1e3
        self._origins.update(text.origins)

    def lines(self, *, turns: int, prompt_tokens: int, context: int) -> list[str]:
        """Return them for a person, a line each.

        Args:
            turns: Turns that are part of the conversation.
            prompt_tokens: Tokens of the last question with all before it.
            context: Tokens that the draft model holds.
        """
        if (text := self._last) is None:
            return ["Nothing has been written yet."]
        generation, tokens = text.generation, len(text.tokens)
        first = "" if generation.first_ms is None else f", the first after {generation.first_ms / 1e3:.2f} s"
        rate = f"{text.tokens_per_s:.1f} tokens/s"
        lines = [
            f"last answer     {tokens} tokens in {generation.wall_ms / 1e3:.1f} s, {rate}{first}; {text.reason.value}",
            f"  tokens        {_by_origin(Counter(text.origins))}",
            f"  acceptance    {_share(generation.counters.accepted, generation.counters.tested)}",
        ]
        if generation.choice is not None:
            lines.append(f"  plan          {generation.choice.plan}: {printable_line(generation.choice.reason)}")
        total = self._origins.total()
        rate = f"{total / self._wall_s if self._wall_s else 0.0:.1f} tokens/s"
        lines += [
            f"all answers     {self._answers} with {total} tokens, {rate}; {_by_origin(self._origins)}",
            f"  acceptance    {_share(self._accepted, self._tested)}",
            f"conversation    {turns} turns; the last prompt had {prompt_tokens:,} tokens, the context has {context:,}",
        ]
        return lines


def _by_origin(origins: Counter[TokenOrigin]) -> str:
    return ", ".join(f"{origins[each]} {words}" for each, words in _WORDS.items() if origins[each]) or "none"


def _share(accepted: int, tested: int) -> str:
    return f"{accepted / tested:.2f} ({accepted} of {tested} draft tokens tested)" if tested else "no draft was tested"
