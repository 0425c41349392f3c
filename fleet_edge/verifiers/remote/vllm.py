"""vLLM's dialect: the prefixes that end at each row as one completion request, with prefix caching.

`prompt_logprobs` would give all rows of one prompt, but a request that asks for them does not read the prefix cache.
Source: vLLM's OpenAI-compatible server, `/v1/completions` with token-id prompts and `return_tokens_as_token_ids`.
"""

import re
from typing import Any, Final

from fleet_edge.verifiers.remote.dialect import Call, Question, TopRows, as_list, as_map, check_rows
from fleet_edge.verifiers.remote.errors import BadAnswer

__all__ = ["Vllm"]

_TOKEN: Final = re.compile(r"token_id:([0-9]{1,9})")
_ANSWER_BYTES: Final = 1 << 14
_ROW_BYTES: Final = 1 << 11
_ENTRY_BYTES: Final = 64


class Vllm:
    """`Dialect` of vLLM."""

    name: Final = "vLLM"
    spare: Final = 1  # it always generates a token
    version_path: Final = "/version"

    def ask(self, question: Question, *, model: str) -> Call:
        """Ask for one token after each prefix, the most likely, with the `top` most likely beside it."""
        tokens = list(question.tokens)
        ends = range(len(tokens) - question.rows + 1, len(tokens) + 1) if question.rows else (len(tokens),)
        body: dict[str, Any] = {
            "model": model,
            "prompt": [tokens[:end] for end in ends],
            "max_tokens": 1,
            # The most likely token is among those asked for; one that is drawn may not be.
            "temperature": 0,
            # Said, since a model's own configuration may have other defaults.
            "top_p": 1,
            "top_k": 0,
            "min_p": 0,
            "repetition_penalty": 1,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "ignore_eos": True,
            "stream": False,
        }
        if question.rows:
            body |= {"logprobs": question.top, "return_tokens_as_token_ids": True}
        row_bytes = _ROW_BYTES + _ENTRY_BYTES * (question.top + 1)
        return Call("/v1/completions", body, _ANSWER_BYTES + len(ends) * row_bytes)

    def read(self, answer: object, question: Question, *, vocabulary: int) -> TopRows:
        """Read `choices`, in order of their index."""
        choices = as_list(as_map(answer).get("choices"), max(1, question.rows))
        rows: list[list[tuple[object, object]] | None] = [None] * len(choices)
        for choice in map(as_map, choices):
            index = choice.get("index")
            if type(index) is not int or not 0 <= index < len(rows) or rows[index] is not None:
                raise BadAnswer("a choice has no index of its own")
            rows[index] = _entries(choice) if question.rows else []
        wanted = [row for row in rows if row is not None] if question.rows else []
        return check_rows(wanted, question, vocabulary=vocabulary)

    def detokenize(self, token: int, *, model: str) -> Call:
        """Ask for a token's text."""
        return Call("/detokenize", {"model": model, "tokens": [token]}, _ANSWER_BYTES)

    def read_text(self, answer: object) -> str:
        """Read `prompt`."""
        text = as_map(answer).get("prompt")
        if not isinstance(text, str):
            raise BadAnswer("a text is missing")
        return text

    def version(self, answer: object) -> str:
        """Read `version`."""
        version = as_map(answer).get("version")
        if not isinstance(version, str):
            raise BadAnswer("a version is missing")
        return version


def _entries(choice: dict[str, Any]) -> list[tuple[object, object]]:
    entries = as_map(as_list(as_map(choice.get("logprobs")).get("top_logprobs"), 1)[0])
    found: list[tuple[object, object]] = []
    for key, value in entries.items():
        match = _TOKEN.fullmatch(key)
        if match is None:
            raise BadAnswer("tokens are not named by their ids")
        found.append((int(match[1]), value))
    return found
