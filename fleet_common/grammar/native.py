"""The vocabulary and the compiler of llguidance. Only a grammar worker imports it: a grammar can crash this code."""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import llguidance

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

_WINDOW: Final = 512
"""Characters of forced text that are encoded at once. A string constant may have tens of thousands, of which a step
needs few tokens."""

_UNSURE: Final = 4
"""Last tokens of a truncated window, which are dropped: the text after it might change them."""

_JSON: "Final[JsonCompileOptions]" = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "lenient": False,
    "coerce_one_of": False,
}
"""A single, common way to write values, so that most of the text around them is forced."""


class NativeVocabulary:
    """The tokens, for llguidance.

    `description` has `end_tokens`, and either `pieces` (bytes as Latin-1) or `file`, the content of a `tokenizer.json`,
    with the number of tokens `size`. `encoder` encodes forced text.
    """

    def __init__(self, description: dict[str, Any]) -> None:
        ends: list[int] = description["end_tokens"]
        file, native = description.get("file"), None
        if file is None:
            pieces = [piece.encode("latin-1") for piece in description["pieces"]]
        else:
            native = llguidance.LLTokenizer(file, n_vocab=description["size"], eos_token=ends, slices=[])
            pieces = _pieces_of(native, ends)
        self.encoder = Encoder(pieces, ends[0], native)
        wrapper = llguidance.TokenizerWrapper(self.encoder)
        self.native: LLTokenizer = llguidance.LLTokenizer(wrapper, n_vocab=len(pieces), eos_token=ends)

    def compile(self, kind: str, text: str) -> "LLMatcher":
        """Return a grammar at its start, or with its error."""
        return llguidance.LLMatcher(
            self.native,
            _source(kind, text),
            log_level=0,
            limits=llguidance.LLParserLimits(
                initial_lexer_fuel=1_000_000,  # some 20 ms
                max_grammar_size=100_000,  # symbols
                max_lexer_states=50_000,  # up to 2 kB each
                step_lexer_fuel=500_000,  # some 50 ms, and never so much where patterns have no counted repetitions
                step_max_items=20_000,  # some 1 ms
                verbose_errors=False,
            ),
        )


def _pieces_of(native: "LLTokenizer", ends: Sequence[int]) -> list[bytes]:
    silent = set(ends)
    return [
        b"" if token in silent or native.is_special_token(token) else bytes(native.decode_bytes([token]))
        for token in range(native.vocab_size)
    ]


def _source(kind: str, text: str) -> str:
    match kind:
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(text)
        case "lark":
            return llguidance.LLMatcher.grammar_from_lark(text)
        case "json-object":
            text = '{"type": "object"}'
    return llguidance.LLMatcher.grammar_from_json_schema(text, overrides=_JSON)


Ask = Callable[[str], list[int]]


class Encoder:
    """Tokenizer for llguidance; `native` encodes, otherwise each thread asks its caller."""

    def __init__(self, pieces: list[bytes], end: int, native: "LLTokenizer | None") -> None:
        self.tokens = pieces
        self.eos_token_id = end
        self.bos_token_id = None
        self.special_token_ids: list[int] = []
        self._native = native
        self._callers = threading.local()
        # Enough tokens are left after the cut even if all are the longest.
        self._window = max(_WINDOW, 4 * _UNSURE * max(map(len, pieces)))
        self._encode = functools.lru_cache(maxsize=256)(self._encode_window)

    def set_caller(self, ask: Ask) -> None:
        """Set the function that encodes text on this thread."""
        self._callers.ask = ask

    def caller(self) -> Ask:
        ask: Ask = self._callers.ask
        return ask

    def __call__(self, text: str | bytes) -> list[int]:
        """Return the tokens at the beginning of a text: all of them if it is short."""
        plain = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        found = self._encode(plain[: self._window])
        return found if len(plain) <= self._window else found[:-_UNSURE]

    def _encode_window(self, text: str) -> list[int]:
        return self.caller()(text) if self._native is None else self._native.tokenize_str(text)
