"""Dialects: how each kind of inference server is asked for log-probabilities, and its answers read.

Exceptions::

        VerifierError (fleet_edge.verifiers.contract)
        ├── BadSetting              a setting of the remote verifier cannot work
        ├── EndpointFailed          an inference server failed; another may work
        │   ├── BadAnswer           its answer does not match the query
        │   └── EndpointBusy        it is healthy but overloaded
        └── QueryRefused            the server rejects this query; another would too
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fleet_edge.verifiers.contract import VerifierError


class BadSetting(VerifierError):  # noqa: N818 - reads as what it says
    def __init__(self, sentence: str, *, setting: str) -> None:
        super().__init__(sentence)
        self.setting = setting


class EndpointFailed(VerifierError):  # noqa: N818 - reads as what it says
    """An inference server failed; another may work. `suspect` if the query may be the cause."""

    def __init__(self, sentence: str, *, suspect: bool = False) -> None:
        super().__init__(sentence)
        self.suspect = suspect


class BadAnswer(EndpointFailed):
    """A server's answer does not match the query; the text says why in a few words."""

    def __init__(self, what: str) -> None:
        super().__init__(what, suspect=True)


class EndpointBusy(EndpointFailed):
    """An inference server is overloaded; try again after `retry_s` seconds."""

    def __init__(self, sentence: str, *, retry_s: float) -> None:
        super().__init__(sentence)
        self.retry_s = retry_s


class QueryRefused(VerifierError):  # noqa: N818
    """An inference server rejects a query, as any other would."""


# Rounding error of a sum of probabilities.
_ROUNDING: Final = 1e-3
_MOST_PADDING: Final = 4096
# Servers write minus infinity as a number that JSON has.
_IMPOSSIBLE: Final = -9990.0


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
    """An HTTP request: path, JSON body, and a bound on the answer's size."""

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


def _as_text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise BadAnswer(f"{what} is missing")
    return value


def check_rows(rows: Sequence[Sequence[tuple[object, object]]], question: LogprobsQuery, *, vocabulary: int) -> TopRows:
    """Check and sort the pairs of id and log-probability in an answer; ids above `vocabulary` are padding.

    If there are more entries than asked for, the most likely are kept: some servers add the token that they drew.
    Raises `BadAnswer` if an entry is invalid, repeated or missing, or values are not log-probabilities.
    """
    top = min(question.top, vocabulary)
    ids = np.empty((question.rows, top), dtype=np.int64)
    values = np.empty((question.rows, top), dtype=np.float32)
    for number, row in enumerate(rows):
        found: dict[int, float] = {}
        for token, value in row:
            if type(token) is not int or token < 0 or type(value) not in (int, float) or token in found:
                raise BadAnswer("an entry is not a pair of id and log-probability, or is repeated")
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
    if (sums + probs[:, -1] * (left_out + _MOST_PADDING) < 1.0 - _ROUNDING).any():
        raise BadAnswer("the tokens that it names are not the most likely ones")


_ANSWER_BYTES: Final = 1 << 14
_PROMPT_ENTRY_BYTES: Final = 96
_TRIPLE: Final = 3


class SgLang:
    """The dialect of SGLang.

    A dialect has the `name` of its servers, the tokens of their context that a sequence cannot use (`spare`), and a
    path that only this kind of server has (`version_path`). `ask` and `detokenize` return requests; `read`, `read_text`
    and `version` read their answers, and raise BadAnswer if they do not match.
    """

    name: Final = "SGLang"
    spare: Final = 8  # SGLang reserves a few positions of its context
    version_path: Final = "/get_model_info"

    def ask(self, question: LogprobsQuery, *, model: str) -> HttpCall:
        """Ask for one more token, and for the most likely tokens of the positions before it."""
        del model  # a server has one
        tokens = list(question.tokens)
        body: dict[str, Any] = {
            "input_ids": tokens,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
            "stream": False,
        }
        if question.namespace:
            body["extra_key"] = question.namespace
        if question.rows:
            body |= {
                "return_logprob": True,
                "logprob_start_len": len(tokens) - question.rows,
                "top_logprobs_num": question.top,
                "return_text_in_logprobs": False,
            }
        rows = question.rows + 1
        return HttpCall("/generate", body, _ANSWER_BYTES + rows * _PROMPT_ENTRY_BYTES * (question.top + 2))

    def read(self, answer: object, question: LogprobsQuery, *, vocabulary: int) -> TopRows:
        """Read `input_top_logprobs` after its first, empty entry, then `output_top_logprobs`."""
        meta = as_map(as_map(answer).get("meta_info"))
        if not question.rows:
            return check_rows([], question, vocabulary=vocabulary)
        before = as_list(meta.get("input_top_logprobs"), question.rows)
        last = as_list(meta.get("output_top_logprobs"), 1)
        rows = [[_pair(entry) for entry in as_list(row)] for row in (*before[1:], *last)]
        return check_rows(rows, question, vocabulary=vocabulary)

    def detokenize(self, token: int, *, model: str) -> HttpCall:
        return HttpCall("/detokenize", {"model": model, "tokens": [token], "skip_special_tokens": False}, _ANSWER_BYTES)

    def read_text(self, answer: object) -> str:
        return _as_text(as_map(answer).get("text"), "a text")

    def version(self, answer: object) -> str:
        """Check for `model_path`; the version is elsewhere."""
        _as_text(as_map(answer).get("model_path"), "a model's path")
        return ""


def _pair(entry: object) -> tuple[object, object]:
    """Return id and log-probability of an entry `[log-probability, id, text]`."""
    value, token, _text = as_list(entry, _TRIPLE)
    return token, value


_TOKEN: Final = re.compile(r"token_id:([0-9]{1,9})")
_ROW_BYTES: Final = 1 << 11
_ENTRY_BYTES: Final = 64


class Vllm:
    """The dialect of vLLM; see `SgLang`."""

    name: Final = "vLLM"
    spare: Final = 1  # vLLM always generates a token
    version_path: Final = "/version"

    def ask(self, question: LogprobsQuery, *, model: str) -> HttpCall:
        """Ask for one token after each prefix, with the `top` most likely ones."""
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

    def read(self, answer: object, question: LogprobsQuery, *, vocabulary: int) -> TopRows:
        """Read `choices`, ordered by their index."""
        choices = as_list(as_map(answer).get("choices"), max(1, question.rows))
        rows: list[list[tuple[object, object]] | None] = [None] * len(choices)
        for choice in map(as_map, choices):
            index = choice.get("index")
            if type(index) is not int or not 0 <= index < len(rows) or rows[index] is not None:
                raise BadAnswer("a choice has no index")
            rows[index] = _entries(choice) if question.rows else []
        wanted = [row for row in rows if row is not None] if question.rows else []
        return check_rows(wanted, question, vocabulary=vocabulary)

    def detokenize(self, token: int, *, model: str) -> HttpCall:
        return HttpCall("/detokenize", {"model": model, "tokens": [token]}, _ANSWER_BYTES)

    def read_text(self, answer: object) -> str:
        return _as_text(as_map(answer).get("prompt"), "a text")

    def version(self, answer: object) -> str:
        return _as_text(as_map(answer).get("version"), "a version")


def _entries(choice: dict[str, Any]) -> list[tuple[object, object]]:
    entries = as_map(as_list(as_map(choice.get("logprobs")).get("top_logprobs"), 1)[0])
    found: list[tuple[object, object]] = []
    for key, value in entries.items():
        match = _TOKEN.fullmatch(key)
        if match is None:
            raise BadAnswer("tokens are not named by their ids")
        found.append((int(match[1]), value))
    return found


Dialect: TypeAlias = SgLang | Vllm

DIALECTS: Final[dict[str, Callable[[], Dialect]]] = {"vllm": Vllm, "sglang": SgLang}
"""Dialects by the value of the setting `remote.api`."""
