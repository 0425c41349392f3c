"""Log-probabilities of answers, in OpenAI's shapes.

They are the large model's own, before temperature, top_k and top_p, as OpenAI's are.
"""

import codecs
from collections.abc import Sequence
from functools import cached_property
from itertools import zip_longest
from typing import Any

from fleet_device.drafters.contract import TextCodec
from fleet_device.requests.generate import GeneratedText
from schemas.fields import MIN_LOGPROB, TokenLogprobs

TokenWithLogprobs = tuple[int, TokenLogprobs | None]


class TokenSpelling:
    """Bytes and names of tokens."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec

    def raw(self, token: int) -> bytes:
        """Return the bytes of a token's text; none for a control token."""
        return self._codec.piece(token)

    def name(self, token: int) -> str:
        """Return a token's text. A part of a character is `bytes:` and hexadecimal, as in OpenAI's completions."""
        raw = self.raw(token)
        if not raw:
            return self._control.get(token, "")
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    @cached_property
    def _control(self) -> dict[int, str]:
        """Texts of the control tokens."""
        read = {text: self._codec.encode(text, special=True) for text in self._codec.control_texts}
        return {tokens[0]: text for text, tokens in read.items() if len(tokens) == 1}


class Offsets:
    """Numbers of characters before the tokens of a growing text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._characters = 0

    def next(self, raw: bytes) -> int:
        """Return the offset of the next token, whose bytes these are: of its character, if it is a part of one."""
        offset = self._characters
        self._characters += len(self._decoder.decode(raw))
        return offset


def spelled_tokens(text: GeneratedText) -> list[TokenWithLogprobs]:
    """Return the tokens of the answer's text: without those of a stop string."""
    tokens = text.tokens[: text.shown_tokens] if text.stopped else text.tokens
    return list(zip_longest(tokens, (text.logprobs or ())[: len(tokens)]))


def prompt_tokens(text: GeneratedText) -> list[TokenWithLogprobs]:
    """Return the tokens of the prompt, with their log-probabilities if they were requested; the first has none."""
    return list(zip_longest(text.request.prompt, (None, *text.generation.prompt_logprobs)))


def token_logprobs(tokens: Sequence[TokenWithLogprobs], spelling: TokenSpelling) -> list[dict[str, Any]]:
    """Return the entries of a chat or a response, for the tokens that have a text."""
    return [
        {
            **_entry(spelling, token, _chosen(known)),
            "top_logprobs": [_entry(spelling, each, value) for each, value in _alternatives(known)],
        }
        for token, known in tokens
        if spelling.raw(token)
    ]


def chat_logprobs(tokens: Sequence[TokenWithLogprobs], spelling: TokenSpelling) -> dict[str, Any]:
    return {"content": token_logprobs(tokens, spelling), "refusal": None}


def completion_logprobs(
    tokens: Sequence[TokenWithLogprobs], spelling: TokenSpelling, offsets: Offsets, *, control: bool = False
) -> dict[str, Any]:
    """Return the `logprobs` of a completion's choice or chunk; `offsets` counts the text before it.

    Tokens without a text are left out, unless `control` tokens are to be counted too.
    """
    shown = [(token, known) for token, known in tokens if control or spelling.raw(token)]
    return {
        "tokens": [spelling.name(token) for token, _ in shown],
        "token_logprobs": [known and known.logprob for _, known in shown],
        "top_logprobs": [known and _by_name(spelling, known) for _, known in shown],
        "text_offset": [offsets.next(spelling.raw(token)) for token, _ in shown],
    }


def _by_name(spelling: TokenSpelling, known: TokenLogprobs) -> dict[str, float]:
    """Return the alternatives by name. Of several with one name, all but the first are named by id, as in vLLM."""
    found: dict[str, float] = {}
    for token, value in _alternatives(known):
        name = spelling.name(token)
        found[f"token_id:{token}" if name in found else name] = value
    return found


def _entry(spelling: TokenSpelling, token: int, logprob: float) -> dict[str, Any]:
    return {"token": spelling.name(token), "logprob": logprob, "bytes": list(spelling.raw(token))}


def _chosen(known: TokenLogprobs | None) -> float:
    return MIN_LOGPROB if known is None else known.logprob


def _alternatives(known: TokenLogprobs | None) -> list[tuple[int, float]]:
    return [] if known is None else list(zip(known.ids, known.values, strict=True))
