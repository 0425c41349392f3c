"""Log-probabilities in OpenAI's two shapes: of a chat, and of a completion.

They are the large model's own, before temperature, top_k and top_p: as OpenAI's are.
"""

from collections.abc import Callable, Sequence
from typing import Any

from fleet_device.client.request import TokenText
from fleet_device.texts.generate import GeneratedText
from schemas.logprobs import LEAST_LOGPROB, TokenLogprobs

Spell = Callable[[int], bytes]
"""Returns the bytes of a token; none for control tokens."""

Told = tuple[int, TokenLogprobs | None]
"""A token, and what is known of it."""


def spelled_tokens(text: GeneratedText, spell: Spell) -> list[Told]:
    """Return the tokens that an answer shows: without the one that ends it, and those of a stop string."""
    told = text.logprobs or ()
    pairs = [(token, told[place] if place < len(told) else None) for place, token in enumerate(text.tokens)]
    if not text.stopped:
        return pairs
    shown, size = [], 0
    for token, known in pairs:
        if size >= len(text.text.encode()):
            break
        shown.append((token, known))
        size += len(spell(token))
    return shown


def pieces_of(parts: Sequence[TokenText]) -> list[Told]:
    """Return the tokens of a piece."""
    return [(part.token, part.logprobs) for part in parts]


def chat_logprobs(tokens: Sequence[Told], spell: Spell) -> dict[str, Any]:
    """Return the `logprobs` of a chat's choice, or of its chunk."""
    return {
        "content": [
            {
                **_entry(spell(token), LEAST_LOGPROB if known is None else known.logprob),
                "top_logprobs": [
                    _entry(spell(each), value) for each, value in zip(known.ids, known.values, strict=True)
                ]
                if known
                else [],
            }
            for token, known in tokens
            if spell(token)
        ],
        "refusal": None,
    }


def completion_logprobs(tokens: Sequence[Told], spell: Spell, *, offset: int) -> dict[str, Any]:
    """Return the `logprobs` of a completion's choice, or of its chunk.

    Args:
        tokens: With what is known of them.
        spell: Their bytes.
        offset: Characters of the text before them.
    """
    shown = [(spell(token), known) for token, known in tokens if spell(token)]
    offsets = []
    for raw, _ in shown:
        offsets.append(offset)
        offset += len(_text(raw))
    return {
        "tokens": [_text(raw) for raw, _ in shown],
        "token_logprobs": [LEAST_LOGPROB if known is None else known.logprob for _, known in shown],
        "top_logprobs": [
            {_text(spell(each)): value for each, value in zip(known.ids, known.values, strict=True)} if known else {}
            for _, known in shown
        ],
        "text_offset": offsets,
    }


def _entry(raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _text(raw), "logprob": logprob, "bytes": list(raw)}


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")
