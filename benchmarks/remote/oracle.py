"""Oracle: what an inference server generates and reports, asked over HTTP without any part of the edge."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import httpx
import numpy as np
from numpy.typing import NDArray

from fleet_edge.verifiers.contract import VerifierError

_PREFIX: Final = "token_id:"


class Oracle:
    """One server."""

    def __init__(
        self, url: str, api: str, *, headers: Mapping[str, str], vocabulary: int, timeout_s: float = 300.0
    ) -> None:
        self._api = api
        self._vocabulary = vocabulary
        self._http = httpx.Client(base_url=url, headers=dict(headers), timeout=timeout_s, trust_env=False)
        self._model = str(self._get("/v1/models")["data"][0]["id"])

    def close(self) -> None:
        self._http.close()

    def greedy(self, prompt: Sequence[int], length: int) -> tuple[int, ...]:
        """Have the server write a text of that many tokens, always the most likely one, in one request.

        Raises:
            VerifierError: It cannot be asked.
        """
        if self._api == "sglang":
            sampling = {"max_new_tokens": length, "temperature": 0, "ignore_eos": True}
            answer = self._post("/generate", {"input_ids": list(prompt), "sampling_params": sampling})
            return tuple(answer["output_ids"])
        answer = self._complete([list(prompt)], max_tokens=length, top=0)
        return tuple(map(_token, answer["choices"][0]["logprobs"]["tokens"]))

    def row(self, prefix: Sequence[int], top: int) -> NDArray[np.float64]:
        """Return `[vocabulary]`: the log-probabilities after a prefix; of all but the `top` largest, minus infinity.

        Raises:
            VerifierError: The server cannot be asked.
        """
        if self._api == "sglang":
            body = {
                "input_ids": list(prefix), "sampling_params": {"max_new_tokens": 1, "temperature": 0},
                "return_logprob": True, "logprob_start_len": -1, "top_logprobs_num": top,
            }  # fmt: skip
            entries = {
                token: value for value, token, _ in self._post("/generate", body)["meta_info"]["output_top_logprobs"][0]
            }
        else:
            answer = self._complete([list(prefix)], max_tokens=1, top=top)
            (named,) = answer["choices"][0]["logprobs"]["top_logprobs"]
            entries = {_token(name): value for name, value in named.items()}
        row = np.full(self._vocabulary, -np.inf)
        for token, value in entries.items():
            row[token] = value
        return row

    def _complete(self, prompts: list[list[int]], *, max_tokens: int, top: int) -> Any:  # noqa: ANN401 - JSON
        body = {
            "model": self._model, "prompt": prompts, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "logprobs": top, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        return self._post("/v1/completions", body)

    def _get(self, path: str) -> Any:  # noqa: ANN401 - JSON
        return self._json(lambda: self._http.get(path), path)

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:  # noqa: ANN401 - JSON
        return self._json(lambda: self._http.post(path, json=body), path)

    def _json(self, send: Any, path: str) -> Any:  # noqa: ANN401 - JSON
        try:
            response = send()
            response.raise_for_status()
            return response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise VerifierError(
                f"The inference server at {self._http.base_url} cannot be asked {path}: {error}"
            ) from error


def _token(name: str) -> int:
    return int(name.removeprefix(_PREFIX))
