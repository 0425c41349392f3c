"""Token strings as a target model stores them, by id: those that a GGUF of it would hold.

Reading them from `tokenizer.json` or from the GGUF takes a fraction of the time of building a tokenizer.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from fleet_edge.verifiers.contract import UnsupportedModel

__all__ = ["gguf_tokens", "repository_tokens"]

_TOKENS_KEY = "tokenizer.ggml.tokens"


def gguf_tokens(path: Path, *, vocabulary_only: bool = False) -> list[str]:
    """Read the strings of a GGUF, padding among them.

    Args:
        path: The file.
        vocabulary_only: Do not ask for weights to go with them.

    Raises:
        UnsupportedModel: It is damaged, or has none, or no weights.
    """
    try:
        reader = GGUFReader(path)
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

    Raises:
        UnsupportedModel: It has no tokenizer.
    """
    found = _tokenizer_file(name)
    if found is not None:
        try:
            return _by_id(_fast_tokens(json.loads(found.read_text(encoding="utf-8"))))
        except (ValueError, KeyError, TypeError) as error:
            raise UnsupportedModel(f"The tokenizer.json of {name} is damaged; fetch the model again.") from error
    from transformers import AutoTokenizer  # noqa: PLC0415 - takes seconds, and an edge may do without it

    try:
        return _by_id((index, token) for token, index in AutoTokenizer.from_pretrained(name).get_vocab().items())
    except Exception as error:  # whatever a tokenizer that is not there raises
        raise UnsupportedModel(
            f"The target model {name} has no tokenizer; put its tokenizer.json beside the weights."
        ) from error


def _tokenizer_file(name: str) -> Path | None:
    """Return the `tokenizer.json` of a folder or a repository, if there is one."""
    local = Path(name) / "tokenizer.json"
    if local.is_file():
        return local
    from transformers.utils import cached_file  # noqa: PLC0415 - takes seconds, and an edge may do without it

    found = cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _fast_tokens(tokenizer: Mapping[str, Any]) -> Iterable[tuple[int, str]]:
    """Yield id and string of every token of a `tokenizer.json`."""
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, Mapping):
        for token, index in vocabulary.items():
            yield int(index), str(token)
    else:  # a unigram model: a list of [string, score]
        for index, entry in enumerate(vocabulary):
            yield index, str(entry[0])
    for added in tokenizer.get("added_tokens") or ():
        yield int(added["id"]), str(added["content"])


def _by_id(pairs: Iterable[tuple[int, str]]) -> list[str]:
    strings = dict(pairs)
    if not strings:
        raise ValueError("no tokens")
    return [strings.get(index, f"[PAD{index}]") for index in range(max(strings) + 1)]
