"""Endpoint: the inference server, or a router in front of several, and the trial that identifies its model."""

from collections.abc import Sequence
from dataclasses import dataclass
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

# A server may come back with another number format; other weights differ much more.
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
    """What the server has to be: model name (empty for any), token strings, ids to compare, entries per row."""

    model: str
    strings: Sequence[str]
    samples: Sequence[int]
    top: int


@dataclass(slots=True)
class RemoteEndpoint:
    url: str
    dialect: Dialect
    client: InferenceClient
    model: str = ""

    async def compute(self, question: LogprobsQuery, *, vocabulary: int, timeout_s: float) -> TopRows:
        """Return the rows of a query; raises `EndpointFailed`, or `QueryRefused` if the server rejects the query."""
        call = self.dialect.ask(question, model=self.model)
        answer = await self.client.post(self.url, call, timeout_s=timeout_s, session=question.session)
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

    def check_same(self, now: Identity, before: Identity) -> None:
        """Check that a server that is back computes what it did; raises `EndpointFailed`."""
        apart = max(
            _variation(row, now.rows.logprobs[at], before.rows.ids[at], before.rows.logprobs[at])
            for at, row in enumerate(now.rows.ids)
        )
        if apart > _MOST_VARIATION:
            raise EndpointFailed(
                f"The inference server at {self.url} does not serve the same model as before: what it computes differs "
                f"by {apart:.2f} in total variation."
            )
        if now.context < before.context:
            raise EndpointFailed(
                f"The inference server at {self.url} came back with a context of {now.context} tokens, fewer than open "
                "sessions may have; start it with the context that it had, or restart this edge."
            )

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
                    "one family; check the settings 'target' and 'remote.endpoint'."
                ) from error
            if text not in readings(expected.strings[token]):
                raise EndpointFailed(
                    f"Token {token} is {text!r} at {self.url} and {expected.strings[token]!r} in the target's "
                    "tokenizer; give the tokenizer of the served model by the setting 'target'."
                )

    async def _try(self, expected: Expected, *, timeout_s: float) -> TopRows:
        """Send a query like those of sessions, on a sequence that is always the same."""
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
