"""Tokens of a target model: their strings as its files store them, and its tokenizer, without transformers.

Reading strings from `tokenizer.json` or from the GGUF is much faster than building a tokenizer.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from gguf import TokenType

from fleet_common.gguf_files import GgufUnreadable, read_header
from fleet_common.grammar.errors import GrammarUnavailable
from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_edge.verifiers.contract import UnsupportedModel
from fleet_edge.verifiers.source import check_source, fetch_files, is_gguf
from schemas.control import MAX_CHAT_FORMAT_BYTES, ChatFormat, encode_json
from schemas.fields import MAX_VOCABULARY
from schemas.vocabulary import token_strings

_TOKENS_KEY = "tokenizer.ggml.tokens"


def gguf_tokens(path: Path, *, vocabulary_only: bool = False) -> list[str]:
    """Read the strings of a GGUF, padding among them.

    Raises `UnsupportedModel` if it is damaged, has no strings, or, unless `vocabulary_only`, no weights.
    """
    try:
        header = read_header(path)
    except GgufUnreadable as error:
        raise UnsupportedModel(str(error)) from error
    if not header.tensors and not vocabulary_only:
        raise UnsupportedModel(f"The GGUF {path} has no weights; choose a file of a whole model.")
    tokens = header.metadata.get(_TOKENS_KEY)
    if not isinstance(tokens, list):
        raise UnsupportedModel(f"The GGUF {path} has no tokenizer; choose a file of a whole model.")
    return [str(token) for token in tokens]


def target_tokens(source: str | Path) -> list[str]:
    """Read the token strings of a target model by id, without padding and without loading its weights.

    Raises `UnsupportedModel` if the files are not a model's, `VerifierError` if there is no such model.
    """
    check_source(source)
    path = Path(source).expanduser()
    if is_gguf(path):
        return token_strings(gguf_tokens(path))
    return token_strings(repository_tokens(str(path if path.is_dir() else fetch_files(str(source), *_TOKENIZER_FILES))))


_TOKENIZER_FILES: Final = ("*.json", "*.model", "*.txt")


def repository_tokens(name: str) -> list[str]:
    """Read the strings of a folder or a repository, gaps filled with `[PAD<id>]` as converters do it.

    Added tokens for which the model has no row are left out: Gemma's small models share the tokenizer of the large
    ones, but lack its image token. Raises `UnsupportedModel` if there is no tokenizer.
    """
    rows = _rows(name)
    found = _file(name, "tokenizer.json")
    if found is not None:
        try:
            return _by_id(_fast_tokens(json.loads(found.read_text(encoding="utf-8")), rows))
        except (ValueError, KeyError, TypeError) as error:
            raise UnsupportedModel(f"The tokenizer.json of {name} is damaged; fetch the model again.") from error
    try:
        from transformers import AutoTokenizer  # noqa: PLC0415 - takes seconds, and an edge may do without it

        tokenizer = AutoTokenizer.from_pretrained(name)
        added = {index for index in tokenizer.get_added_vocab().values() if index >= rows}
        return _by_id((index, token) for token, index in tokenizer.get_vocab().items() if index not in added)
    except Exception as error:  # whatever a tokenizer that is not there raises
        raise UnsupportedModel(
            f"The target model {name} has no tokenizer; put its tokenizer.json next to the weights."
        ) from error


def chat_format(source: str | Path, end_tokens: Iterable[int]) -> ChatFormat | None:
    """Read the chat format of a target model; None without a chat template. Raises `UnsupportedModel`."""
    path = Path(source).expanduser()
    try:
        found = _gguf_chat(path) if is_gguf(path) else _repository_chat(str(path if path.is_dir() else source))
        if not found["template"]:
            return None
        made = ChatFormat.model_validate({**found, "end_tokens": tuple(sorted(end_tokens))})
    except (GgufUnreadable, ValueError, TypeError, AttributeError, LookupError, OSError) as error:
        raise UnsupportedModel(f"The chat template of {source} is damaged; fetch the model again.") from error
    if len(encode_json(made)) > MAX_CHAT_FORMAT_BYTES:
        raise UnsupportedModel(f"The chat template of {source} has more than {MAX_CHAT_FORMAT_BYTES >> 10} KiB.")
    return made


def _gguf_chat(path: Path) -> dict[str, Any]:
    metadata = read_header(path).metadata
    tokens = metadata.get(_TOKENS_KEY, [])
    texts = {}
    for name in ("bos", "eos"):
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        texts[name] = "" if token is None else str(tokens[token])
    return {"template": metadata.get("tokenizer.chat_template"), **texts}


def _repository_chat(name: str) -> dict[str, Any]:
    found, alone = _file(name, "tokenizer_config.json"), _file(name, "chat_template.jinja")
    config = json.loads(found.read_text(encoding="utf-8")) if found else {}
    template = alone.read_text(encoding="utf-8") if alone else config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((each["template"] for each in template if each.get("name") == "default"), None)
    texts = {each: config.get(f"{each}_token") or "" for each in ("bos", "eos")}
    return {
        "template": template,
        **{each: text["content"] if isinstance(text, dict) else text for each, text in texts.items()},
    }


def grammar_tokenizer(source: str | Path | None, *, vocabulary: int, end_tokens: Sequence[int]) -> GrammarTokenizer:
    """Return a target's vocabulary for grammars; `vocabulary` counts tokens without padding.

    Raises `GrammarUnavailable` if there is no tokenizer that grammars can use.
    """
    path = _tokenizer_file(source)
    if path.suffix == ".json":
        text = path.read_text(encoding="utf-8")
        return GrammarTokenizer(file=text, vocabulary=vocabulary, end_tokens=tuple(end_tokens))
    file = GgufTokenizer(path)
    pieces = tuple(file.pieces()[:vocabulary])
    return GrammarTokenizer(vocabulary=len(pieces), pieces=pieces, end_tokens=tuple(end_tokens), encode=file.encode)


def _tokenizer_file(source: str | Path | None) -> Path:
    """Return the file of a target's tokenizer, a `tokenizer.json` or a GGUF; raises `GrammarUnavailable`."""
    if source is None:
        raise GrammarUnavailable("The target was not loaded from files, so that its tokenizer is not known.")
    path = Path(source).expanduser()
    found = path if path.is_file() else _file(str(path if path.is_dir() else source), "tokenizer.json")
    if found is None:
        raise GrammarUnavailable(f"{source} has no tokenizer that grammars can use; add its tokenizer.json.")
    return found


_BYTE_LEVEL: Final = "gpt2"
_SENTENCEPIECE: Final = "llama"
_SPACE: Final = "\u2581"

_CONTRACTIONS: Final = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2: Final = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_LLAMA3: Final = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SPLITS: Final[Mapping[str, tuple[str, ...]]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "dbrx": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace("{1,3}", ""),),
    "deepseek-r1-qwen": (_LLAMA3.replace("{1,3}", ""),),
}
"""By the name in a GGUF, the regular expressions that split a text before byte pairs are merged."""


class GgufTokenizer:
    """Tokenizer of a GGUF: byte-level BPE, or SentencePiece's BPE.

    Raises `GrammarUnavailable` if it is of another kind, or damaged.
    """

    def __init__(self, path: Path) -> None:
        try:
            metadata = read_header(path).metadata
        except GgufUnreadable as error:
            raise GrammarUnavailable(str(error)) from error
        self._get: Callable[[str, Any], Any] = lambda key, default: metadata.get(f"tokenizer.ggml.{key}", default)
        self._model = str(self._get("model", ""))
        self._strings: list[str] = self._get("tokens", [])
        self._kinds: list[int] = self._get("token_type", []) or [int(TokenType.NORMAL)] * len(self._strings)
        if self._model not in (_BYTE_LEVEL, _SENTENCEPIECE):
            raise GrammarUnavailable(f"The tokenizer of {path}, of the kind {self._model}, is none for grammars.")
        self._ids = {string: token for token, string in reversed(list(enumerate(self._strings)))}
        self._plain = self._encode_bytes() if self._model == _BYTE_LEVEL else self._encode_pairs()

    def pieces(self) -> list[bytes]:
        """Return the bytes of each token; none for control tokens."""
        return [self._piece(string, kind) for string, kind in zip(self._strings, self._kinds, strict=True)]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; control tokens are recognised in it, and none is added."""
        special = {
            self._strings[token]
            for token, kind in enumerate(self._kinds)
            if kind in (TokenType.CONTROL, TokenType.USER_DEFINED) and self._strings[token]
        }
        choices = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        parts = re.split(f"({choices})", text) if special else [text]
        found, first = list[int](), True
        for part in parts:
            if part in special:
                found.append(self._ids[part])
            elif part:
                found += self._plain(part, first)
            first = part in special if part else first
        return found

    def _piece(self, string: str, kind: int) -> bytes:
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.UNUSED):
            return b""
        if self._model == _SENTENCEPIECE:
            if kind == TokenType.BYTE:
                return bytes([int(string[3:5], 16)])
            return string.replace(_SPACE, " ").encode("utf-8", "surrogateescape")
        known = byte_letters()
        if kind == TokenType.USER_DEFINED or any(letter not in known for letter in string):
            return string.encode("utf-8", "surrogateescape")
        return bytes(known[letter] for letter in string)

    def _encode_bytes(self) -> Callable[[str, bool], list[int]]:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers  # noqa: PLC0415 - an edge may do without it

        pairs = [tuple(merge.split(" ", 1)) for merge in self._get("merges", [])]
        model = models.BPE(vocab=self._ids, merges=[(one, two) for one, two in pairs], ignore_merges=False)
        tokenizer = Tokenizer(model)
        splits = _SPLITS.get(str(self._get("pre", "gpt-2")), _SPLITS["gpt-2"])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(split), "isolated") for split in splits),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        return lambda text, _first: list(tokenizer.encode(text, add_special_tokens=False).ids)

    def _encode_pairs(self) -> Callable[[str, bool], list[int]]:
        from tokenizers import Tokenizer, models  # noqa: PLC0415 - likewise

        ids, scores = self._ids, self._get("scores", [0.0] * len(self._strings))
        merged = sorted((string for string in ids if len(string) > 1), key=lambda string: -scores[ids[string]])
        halves = ((string[:at], string[at:]) for string in merged for at in range(1, len(string)))
        pairs = [(left, right) for left, right in halves if left in ids and right in ids]
        unknown = self._strings[int(self._get("unknown_token_id", 0))]
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=pairs, unk_token=unknown, byte_fallback=True))
        prefix = bool(self._get("add_space_prefix", True))  # noqa: FBT003 - llama.cpp's default

        def encoded(text: str, first: bool) -> list[int]:
            spaced = (f" {text}" if prefix and first else text).replace(" ", _SPACE)
            return list(tokenizer.encode(spaced, add_special_tokens=False).ids)

        return encoded


@cache
def byte_letters() -> Mapping[str, int]:
    """Return the alphabet of byte-level BPE: printable bytes as themselves, others as letters from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _file(name: str, file: str) -> Path | None:
    local = Path(name) / file
    if local.is_file():
        return local
    if Path(name).is_dir():
        return None
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - only for a repository
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError  # noqa: PLC0415

    try:
        return Path(hf_hub_download(name, file))
    except (EntryNotFoundError, HFValidationError):
        return None


def _rows(name: str) -> int:
    """Return the rows of the model's vocabulary; unbounded where its configuration does not say."""
    found = _file(name, "config.json")
    try:
        config = json.loads(found.read_text(encoding="utf-8")) if found else {}
        # A model that reads images as well keeps the configuration of its language model apart.
        rows = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
        return MAX_VOCABULARY if rows is None else int(rows)
    except (ValueError, TypeError, AttributeError) as error:
        raise UnsupportedModel(f"The config.json of {name} is damaged; fetch the model again.") from error


def _fast_tokens(tokenizer: Mapping[str, Any], rows: int) -> Iterable[tuple[int, str]]:
    """Yield id and string of every token of a `tokenizer.json`, without added ones that have no row."""
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, Mapping):
        for token, index in vocabulary.items():
            yield int(index), str(token)
    else:  # a unigram model: a list of [string, score]
        for index, entry in enumerate(vocabulary):
            yield index, str(entry[0])
    for added in tokenizer.get("added_tokens") or ():
        if int(added["id"]) < rows:
            yield int(added["id"]), str(added["content"])


def _by_id(pairs: Iterable[tuple[int, str]]) -> list[str]:
    strings = dict(pairs)
    if not strings:
        raise ValueError("no tokens")
    return [strings.get(index, f"[PAD{index}]") for index in range(max(strings) + 1)]
