"""vLLM's completions API: how it is asked for log-probabilities, and its answers read. Without I/O."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleet_edge.verifiers.contract import VerifierError

SPARE: Final = 1
"""Tokens of the server's context that a sequence cannot use: vLLM always generates one."""

# Rounding error of a sum of probabilities.
_ROUNDING: Final = 1e-3
_MAX_PADDING: Final = 4096
# vLLM writes minus infinity as a number that JSON has.
_IMPOSSIBLE: Final = -9990.0
_ANSWER_BYTES: Final = 1 << 14
_ROW_BYTES: Final = 1 << 11
_ENTRY_BYTES: Final = 64
_TOKEN: Final = re.compile(r"token_id:([0-9]{1,9})")


class BadAnswer(VerifierError):  # noqa: N818 - reads as what it says
    """An answer does not match the query; the text says why in a few words."""


@dataclass(frozen=True, slots=True)
class LogprobsQuery:
    """A query for log-probabilities of a sequence.

    `tokens` are all up to the last one to compute; `rows` counts the last positions with log-probabilities, 0 to only
    compute the prefix; `top` counts entries per row. The server may reuse its prefix cache only within a namespace;
    empty for the common one. A router that knows `session` sends it to the server that has its prefix.
    """

    tokens: Sequence[int]
    rows: int
    top: int
    namespace: str = ""
    session: str = ""


@dataclass(frozen=True, slots=True)
class HttpCall:
    """A POST request: path, JSON body, and a bound on the answer's size."""

    path: str
    body: dict[str, Any]
    answer_bytes: int


@dataclass(frozen=True, slots=True)
class TopRows:
    """Most likely tokens of each row: int64 ids, distinct within a row, and float32 log-probabilities.

    Both are `[rows, top]`; log-probabilities may be minus infinity.
    """

    ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]


def completion(question: LogprobsQuery, *, model: str) -> HttpCall:
    """Ask for one token after each prefix, with the `top` most likely ones.

    `prompt_logprobs` would be one row per position of one prompt, but vLLM then reads nothing from its prefix cache.
    """
    tokens = list(question.tokens)
    ends = range(len(tokens) - question.rows + 1, len(tokens) + 1) if question.rows else (len(tokens),)
    body: dict[str, Any] = {
        "model": model,
        "prompt": [tokens[:end] for end in ends],
        "max_tokens": 1,
        # The most likely token is among the `top`; a sampled one may not be.
        "temperature": 0,
        # Explicit, since a model's configuration may change the defaults.
        "top_p": 1,
        "top_k": 0,
        "min_p": 0,
        "repetition_penalty": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "ignore_eos": True,
        "stream": False,
    }
    if question.namespace:
        body["cache_salt"] = question.namespace
    if question.rows:
        body |= {"logprobs": question.top, "return_tokens_as_token_ids": True}
    row_bytes = _ROW_BYTES + _ENTRY_BYTES * (question.top + 1)
    return HttpCall("/v1/completions", body, _ANSWER_BYTES + len(ends) * row_bytes)


def read_completion(answer: object, question: LogprobsQuery, *, vocabulary: int) -> TopRows:
    """Read `choices`, ordered by their index; raise BadAnswer if they do not match the query."""
    choices = as_list(as_map(answer).get("choices"), max(1, question.rows))
    rows: list[list[tuple[int, object]] | None] = [None] * len(choices)
    for choice in map(as_map, choices):
        index = choice.get("index")
        if type(index) is not int or not 0 <= index < len(rows) or rows[index] is not None:
            raise BadAnswer("a choice has no index")
        rows[index] = _entries(choice) if question.rows else []
    wanted = [row for row in rows if row is not None] if question.rows else []
    return _check_rows(wanted, question, vocabulary=vocabulary)


def detokenize(token: int, *, model: str) -> HttpCall:
    return HttpCall("/detokenize", {"model": model, "tokens": [token]}, _ANSWER_BYTES)


def read_models(answer: object) -> dict[str, object]:
    """Return the context of each served model by its name, unchecked."""
    models = map(as_map, as_list(as_map(answer).get("data")))
    return {each["id"]: each.get("max_model_len") for each in models if isinstance(each.get("id"), str)}


def as_map(value: object) -> dict[str, Any]:
    """Return a JSON object; raise BadAnswer for anything else."""
    if not isinstance(value, dict):
        raise BadAnswer("an object is missing")
    return value


def as_list(value: object, length: int | None = None) -> list[Any]:
    """Return a JSON array, of a given length if any; raise BadAnswer for anything else."""
    if not isinstance(value, list) or (length is not None and len(value) != length):
        found = f"{len(value)} entries" if isinstance(value, list) else "no list"
        raise BadAnswer(f"{found} where {'a list' if length is None else length} was expected")
    return value


def as_text(value: object, name: str) -> str:
    """Return the string under a name of a JSON object; raise BadAnswer for anything else."""
    text = as_map(value).get(name)
    if not isinstance(text, str):
        raise BadAnswer(f"the {name} is missing")
    return text


def _entries(choice: dict[str, Any]) -> list[tuple[int, object]]:
    entries = as_map(as_list(as_map(choice.get("logprobs")).get("top_logprobs"), 1)[0])
    found: list[tuple[int, object]] = []
    for key, value in entries.items():
        match = _TOKEN.fullmatch(key)
        if match is None:
            raise BadAnswer("tokens are not named by their ids")
        found.append((int(match[1]), value))
    return found


def _check_rows(rows: Sequence[Sequence[tuple[int, object]]], question: LogprobsQuery, *, vocabulary: int) -> TopRows:
    """Check and sort the pairs of id and log-probability in an answer; ids above `vocabulary` are padding.

    If there are more entries than asked for, the most likely are kept: vLLM adds the token that it drew. Raises
    `BadAnswer` if an entry is invalid, repeated or missing, or values are not log-probabilities.
    """
    top = min(question.top, vocabulary)
    ids = np.empty((question.rows, top), dtype=np.int64)
    values = np.empty((question.rows, top), dtype=np.float32)
    for number, row in enumerate(rows):
        found: dict[int, float] = {}
        for token, value in row:
            if type(value) not in (int, float) or token in found:
                raise BadAnswer("an entry has no log-probability, or is repeated")
            if token < vocabulary:
                try:
                    found[token] = float(value)  # type: ignore[arg-type]  # a number of any size
                except OverflowError:
                    found[token] = math.inf
        if len(found) < top:
            raise BadAnswer(f"{len(found)} of {top} tokens of the vocabulary are among those that it names")
        best = sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))[:top]
        ids[number] = [token for token, _ in best]
        with np.errstate(over="ignore"):
            values[number] = [value for _, value in best]
    _check_values(values, left_out=vocabulary - top)
    values[values <= _IMPOSSIBLE] = -np.inf
    return TopRows(ids, values)


def _check_values(values: NDArray[np.float32], *, left_out: int) -> None:
    if not np.isfinite(values).all():
        raise BadAnswer("a log-probability is no finite number")
    with np.errstate(over="ignore"):
        probs = np.exp(values.astype(np.float64))
    sums = probs.sum(axis=1)
    if (sums > 1.0 + _ROUNDING).any():
        raise BadAnswer("its values are no log-probabilities")
    # Tokens left out are at most as likely as the last one named.
    if (sums + probs[:, -1] * (left_out + _MAX_PADDING) < 1.0 - _ROUNDING).any():
        raise BadAnswer("the tokens that it names are not the most likely ones")
