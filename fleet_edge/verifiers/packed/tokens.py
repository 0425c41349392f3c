"""Token strings as a target model stores them, by id: those that a GGUF of it would hold.

Reading them from `tokenizer.json` or from the GGUF is much faster than building a tokenizer.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from fleet_common.grammar.errors import GrammarUnavailable
from fleet_common.grammar.process import GrammarTokenizer
from fleet_edge.verifiers.contract import UnsupportedModel, VerifierError
from schemas.fields import MAX_VOCABULARY

_TOKENS_KEY = "tokenizer.ggml.tokens"


class FastGguf(GGUFReader):  # type: ignore[misc]
    """GGUF that is parsed from a plain array: slices of `np.memmap` take seconds for a vocabulary."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, np.asarray(value) if name == "data" else value)


def gguf_tokens(path: Path, *, vocabulary_only: bool = False) -> list[str]:
    """Read the strings of a GGUF, padding among them.

    Raises `UnsupportedModel` if it is damaged, has no strings, or, unless `vocabulary_only`, no weights.
    """
    try:
        reader = FastGguf(path)
        if not reader.tensors and not vocabulary_only:
            raise UnsupportedModel(f"The GGUF {path} has no weights; choose a file of a whole model.")
        field = reader.get_field(_TOKENS_KEY)
        if field is None:
            raise UnsupportedModel(f"The GGUF {path} has no tokenizer; choose a file of a whole model.")
        return [str(bytes(field.parts[index]), "utf-8", "surrogateescape") for index in field.data]
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UnsupportedModel(f"The GGUF {path} is damaged; fetch it again.") from error


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
    from transformers import AutoTokenizer  # noqa: PLC0415 - takes seconds, and an edge may do without it

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        added = {index for index in tokenizer.get_added_vocab().values() if index >= rows}
        return _by_id((index, token) for token, index in tokenizer.get_vocab().items() if index not in added)
    except Exception as error:  # whatever a tokenizer that is not there raises
        raise UnsupportedModel(
            f"The target model {name} has no tokenizer; put its tokenizer.json next to the weights."
        ) from error


def grammar_tokenizer(source: str | Path | None, *, vocabulary: int, end_tokens: Sequence[int]) -> GrammarTokenizer:
    """Return a target's vocabulary for grammars; `vocabulary` counts tokens without padding.

    Raises `GrammarUnavailable` if there is no tokenizer that grammars can use.
    """
    text = _tokenizer_json(source)
    return GrammarTokenizer.of_tokenizer_json(text, vocabulary=vocabulary, end_tokens=end_tokens)


def encode(source: str | Path | None, text: str) -> list[int]:
    """Return the ids of a text; control tokens are recognised in it, and none is added.

    Raises `VerifierError` if there is no tokenizer that can be used.
    """
    from tokenizers import Tokenizer  # noqa: PLC0415 - comes with transformers, which an edge may do without

    try:
        tokenizer = Tokenizer.from_str(_tokenizer_json(source))
    except GrammarUnavailable as error:
        raise VerifierError(str(error)) from error
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _tokenizer_json(source: str | Path | None) -> str:
    """Return a target's tokenizer as the text of a `tokenizer.json`; raises `GrammarUnavailable`."""
    if source is None:
        raise GrammarUnavailable("The target was not loaded from files, so that its tokenizer is not known.")
    path = Path(source).expanduser()
    found = None if path.is_file() else _file(str(path if path.is_dir() else source), "tokenizer.json")
    return _fast_tokenizer(path) if found is None else found.read_text(encoding="utf-8")


def _fast_tokenizer(path: Path) -> str:
    """Build a tokenizer from the files there are; return the text of its `tokenizer.json`."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: PLC0415 - takes seconds

    try:
        file = {"gguf_file": path.name} if path.is_file() else {}
        tokenizer = AutoTokenizer.from_pretrained(path.parent if path.is_file() else path, **file)
    except Exception as error:  # whatever a tokenizer that is not there raises
        raise GrammarUnavailable(f"The tokenizer of {path} cannot be loaded, which grammars need.") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise GrammarUnavailable(f"The tokenizer of {path} is none that grammars can use; add its tokenizer.json.")
    text: str = tokenizer.backend_tokenizer.to_str()
    return text


def _file(name: str, file: str) -> Path | None:
    local = Path(name) / file
    if local.is_file():
        return local
    from transformers.utils import cached_file  # noqa: PLC0415 - takes seconds, and an edge may do without it

    found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


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
