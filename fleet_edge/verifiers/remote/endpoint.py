"""Endpoint: one inference server, its circuit breaker, and the trial that identifies its model."""

import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleet_edge.verifiers.contract import VerifierError
from fleet_edge.verifiers.remote.client import InferenceClient
from fleet_edge.verifiers.remote.dialect import (
    BadAnswer,
    Dialect,
    EndpointFailed,
    LogprobsQuery,
    QueryRefused,
    TopRows,
    as_list,
    as_map,
)
from fleet_edge.verifiers.remote.loading import readings
from schemas.printable import printable_line

_FIRST_S: Final = 0.5
_LONGEST_S: Final = 15.0


@dataclass(slots=True)
class Breaker:
    """Circuit breaker of an endpoint: whether it gets work, and if not, when to try it again.

    No session's query is used as a trial: only `proved`, after a trial of our own, closes it again. If the query may be
    the cause, `tolerance` consecutive failures do not open it. `rng` spreads the trials of many edges.
    """

    clock: Callable[[], float]
    rng: random.Random = field(default_factory=random.Random)
    tolerance: int = 2
    reason: str = ""
    _in_a_row: int = 0
    _trials: int = 0
    _not_before: float = -math.inf

    @property
    def closed(self) -> bool:
        return not self.reason

    @property
    def trial_in_s(self) -> float:
        """Seconds until the next trial; 0 for now."""
        return max(0.0, self._not_before - self.clock())

    def succeeded(self) -> None:
        self._in_a_row = 0

    def failed(self, reason: str, *, suspect: bool = False) -> bool:
        """Count a failure; return whether it opened the breaker.

        If `suspect`, the query may be the cause, and it takes several failures in a row.
        """
        self._in_a_row += 1
        if not self.closed or (suspect and self._in_a_row <= self.tolerance):
            return False
        self.reason = reason
        self._trials = 0
        self._postpone()
        return True

    def disproved(self, reason: str) -> None:
        self.reason = reason
        self._trials += 1
        self._postpone()

    def proved(self) -> bool:
        """Record a successful trial; return whether it closed the breaker."""
        was_open = not self.closed
        self.reason = ""
        self._in_a_row = 0
        return was_open

    def _postpone(self) -> None:
        delay = min(_LONGEST_S, _FIRST_S * 2 ** min(self._trials, 10))
        self._not_before = self.clock() + delay * self.rng.uniform(0.75, 1.25)


_log = logging.getLogger(__name__)

# Servers of one model may use different number formats; other weights differ much more.
_MOST_VARIATION: Final = 0.3
_TRIAL_TOKENS: Final = 8


@dataclass(frozen=True, slots=True)
class Identity:
    """What a server reports: model, usable context, version (may be empty), and its rows in the trial."""

    model: str
    context: int
    version: str
    rows: TopRows


@dataclass(frozen=True, slots=True)
class Expected:
    """What every server has to be: model name (empty for any), token strings, ids to compare, entries per row."""

    model: str
    strings: Sequence[str]
    samples: Sequence[int]
    top: int


@dataclass(slots=True)
class RemoteEndpoint:
    url: str
    dialect: Dialect
    client: InferenceClient
    breaker: Breaker
    model: str = ""

    async def compute(self, question: LogprobsQuery, *, vocabulary: int, timeout_s: float) -> TopRows:
        """Return the rows of a query; raises `EndpointFailed`, or `QueryRefused` if the server rejects the query."""
        call = self.dialect.ask(question, model=self.model)
        answer = await self.client.post(self.url, call, timeout_s=timeout_s)
        try:
            return self.dialect.read(answer, question, vocabulary=vocabulary)
        except BadAnswer as error:
            raise self._explain(error) from error

    async def identify(self, expected: Expected, *, timeout_s: float) -> Identity:
        """Identify the server by what it reports and computes; raises `VerifierError` if it is not the one expected."""
        try:
            version = self.dialect.version(
                await self.client.get(self.url, self.dialect.version_path, timeout_s=timeout_s)
            )
            model, context = self._model(await self.client.get(self.url, "/v1/models", timeout_s=timeout_s), expected)
            self.model = model
            await self._compare_tokens(expected, timeout_s=timeout_s)
        except BadAnswer as error:
            raise self._explain(error) from error
        rows = await self._try(expected, timeout_s=timeout_s)
        return Identity(model, context, printable_line(version)[:40], rows)

    def check_same(self, mine: Identity, other: Identity, *, other_url: str) -> None:
        """Check that two servers have computed the same; raises `EndpointFailed`."""
        apart = max(
            _variation(row, mine.rows.logprobs[at], other.rows.ids[at], other.rows.logprobs[at])
            for at, row in enumerate(mine.rows.ids)
        )
        if apart > _MOST_VARIATION:
            raise EndpointFailed(
                f"The inference servers at {self.url} and {other_url} do not serve the same model: what they compute "
                f"lies {apart:.2f} apart in total variation."
            )
        if apart > 0:
            _log.debug("The distributions of %s and %s differ by %.4f in total variation.", self.url, other_url, apart)

    def _model(self, answer: object, expected: Expected) -> tuple[str, int]:
        models: dict[str, Any] = {}
        for each in map(as_map, as_list(as_map(answer).get("data"))):
            if isinstance(each.get("id"), str):
                models[each["id"]] = each.get("max_model_len")
        names = ", ".join(printable_line(name) for name in models)
        if expected.model and expected.model not in models:
            raise EndpointFailed(
                f"The inference server at {self.url} serves {names or 'no model'}, and not {expected.model}; correct "
                "'remote.served_model' or the address."
            )
        if not expected.model and len(models) != 1:
            raise EndpointFailed(
                f"The inference server at {self.url} serves {names or 'no model'}; say by 'remote.served_model' which "
                "one is the target model."
            )
        model = expected.model or next(iter(models))
        context = models[model]
        if type(context) is not int or context <= self.dialect.spare + _TRIAL_TOKENS:
            raise BadAnswer("a usable `max_model_len` is missing")
        return model, context - self.dialect.spare

    async def _compare_tokens(self, expected: Expected, *, timeout_s: float) -> None:
        for token in expected.samples:
            try:
                call = self.dialect.detokenize(token, model=self.model)
                text = self.dialect.read_text(await self.client.post(self.url, call, timeout_s=timeout_s))
            except QueryRefused as error:
                raise EndpointFailed(
                    f"The model at {self.url} has no token {token}, and the target's tokenizer has: they are not of "
                    "one family; check the settings 'target' and 'remote.endpoints'."
                ) from error
            if text not in readings(expected.strings[token]):
                raise EndpointFailed(
                    f"Token {token} is {text!r} at {self.url} and {expected.strings[token]!r} in the target's "
                    "tokenizer; give the tokenizer of the served model by the setting 'target'."
                )

    async def _try(self, expected: Expected, *, timeout_s: float) -> TopRows:
        """Send a query like those of sessions, on a sequence that is the same for every server."""
        tokens = [expected.samples[at % len(expected.samples)] for at in range(_TRIAL_TOKENS)]
        question = LogprobsQuery(tokens, rows=3, top=expected.top)
        try:
            return await self.compute(question, vocabulary=len(expected.strings), timeout_s=timeout_s)
        except QueryRefused as error:
            raise VerifierError(
                f"{error} Where that is about log-probabilities: start vLLM with --max-logprobs {expected.top}, or set "
                "'remote.top_logprobs' to what it allows."
            ) from error

    def _explain(self, error: BadAnswer) -> EndpointFailed:
        sentence = (
            f"The answer of the inference server at {self.url} is not what {self.dialect.name} sends: {error}; check "
            "the setting 'remote.api'."
        )
        return EndpointFailed(sentence, suspect=True)


def _variation(
    ids: NDArray[np.int64], logs: NDArray[np.float32], other_ids: NDArray[np.int64], other_logs: NDArray[np.float32]
) -> float:
    """Return the total variation distance of two rows, as far as they are known."""
    mine = dict(zip(ids.tolist(), np.exp(logs.astype(np.float64)).tolist(), strict=True))
    theirs = dict(zip(other_ids.tolist(), np.exp(other_logs.astype(np.float64)).tolist(), strict=True))
    return 0.5 * sum(
        abs(float(mine.get(token, 0)) - float(theirs.get(token, 0))) for token in mine.keys() | theirs.keys()
    )
