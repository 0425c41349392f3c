"""An inference server over a toy language, and the verifier that asks it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from fleet_edge.settings import InferenceServerSettings
from fleet_edge.verifiers.remote import verifier as remote_verifier
from fleet_edge.verifiers.remote.local import LocalTokens, sample_tokens
from fleet_edge.verifiers.remote.verifier import RemoteVerifier, connect
from tests.support.inference_server import InferenceServer
from tests.support.markov import MarkovScript
from tests.support.scripted_verifier import ScriptedVerifier

SIZE = 40
TOP = 10
SCRIPT = MarkovScript(size=SIZE, seed=3, period=5)


def server(*, script: MarkovScript = SCRIPT, context: int = 200, **options: Any) -> InferenceServer:
    verifier = ScriptedVerifier(script, script.words, context=1000)
    return InferenceServer(verifier, script.words, max_model_len=context, **options)


@contextmanager
def steps_of(seconds: float) -> Iterator[None]:
    """Limit the time of a step, all attempts included."""
    with patch.object(InferenceServerSettings, "step_s", seconds):
        yield


@contextmanager
def asking(asked: InferenceServer | str, **settings: Any) -> Iterator[RemoteVerifier]:
    """Yield a verifier over a server or address; what it waits between attempts is short."""
    url = asked if isinstance(asked, str) else asked.url
    usual = {"request_s": 60.0, "top_logprobs": TOP}
    local = LocalTokens("toy", list(SCRIPT.words), (0,))
    samples = sample_tokens(local.strings, local.end_tokens)
    with patch.multiple(remote_verifier, _FIRST_TRIAL_S=0.05, _HEALTH_S=0.05, _HEALTH_TIMEOUT_S=60.0, _BRIDGED_S=0.1):
        verifier = connect(InferenceServerSettings.model_validate(usual | settings), local, url, samples=samples)
        try:
            yield verifier
        finally:
            verifier.shut_down()
