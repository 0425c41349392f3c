"""Engines of the toy edge: the toy target in llama.cpp, or behind stand-ins of inference servers."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Final

from fleet_edge.verifiers.contract import Verifier
from fleet_edge.verifiers.scripted import ScriptedVerifier
from tests.support.toy_pair import END_TOKENS, TOP_K, ToyPair

_KV_BYTES: Final = 1 << 24
_SERVERS: Final = 2
_SPARE: Final = 8  # positions that a server keeps for itself
_CONTEXT: Final = 256


class ToyEngine(StrEnum):
    SCRIPTED = "scripted"
    LLAMA_CPP = "llama.cpp"
    VLLM = "vllm"
    SGLANG = "sglang"


def pair_of(engine: ToyEngine, *, unlike: bool = False) -> ToyPair:
    """Return the languages for an engine's proof: a transformer for engines that keep keys and values."""
    if unlike:
        return ToyPair.unlike()
    return ToyPair.standard() if engine is ToyEngine.SCRIPTED else ToyPair.transformer()


def toy_verifier(engine: ToyEngine) -> AbstractContextManager[Verifier]:
    return _VERIFIERS[engine]()


@contextmanager
def _scripted() -> Iterator[Verifier]:
    target = pair_of(ToyEngine.SCRIPTED).target
    yield ScriptedVerifier(target, target.words, end_tokens=END_TOKENS, name="toy")


@contextmanager
def _llama_cpp() -> Iterator[Verifier]:
    from fleet_edge.verifiers.llama_cpp.slab import open_target  # noqa: PLC0415 - only where it is installed
    from fleet_edge.verifiers.llama_cpp.verifier import LlamaCppVerifier  # noqa: PLC0415
    from tests.support.toy_transformer import ToyTransformer  # noqa: PLC0415

    target = pair_of(ToyEngine.LLAMA_CPP).target
    assert isinstance(target, ToyTransformer)
    with tempfile.TemporaryDirectory(prefix="toy-") as folder:
        path = target.write_gguf(Path(folder) / "toy.gguf", end_token=END_TOKENS[0])
        yield LlamaCppVerifier(open_target(path, gpu_layers=0), budget_bytes=_KV_BYTES, context=_CONTEXT, threads=1)


@contextmanager
def _remote(engine: ToyEngine) -> Iterator[Verifier]:
    """Request as many tokens of a row as the policy keeps."""
    from fleet_edge.settings import InferenceServerSettings  # noqa: PLC0415
    from fleet_edge.verifiers.remote.loading import LocalTokens, sample_tokens  # noqa: PLC0415
    from fleet_edge.verifiers.remote.verifier import connect  # noqa: PLC0415 - only where it is installed
    from tests.support.inference_server import InferenceServer  # noqa: PLC0415

    target = pair_of(engine).target
    local = LocalTokens("toy", list(target.words), END_TOKENS)
    settings = InferenceServerSettings(api=engine.value, top_logprobs=TOP_K)
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                InferenceServer(
                    ScriptedVerifier(target, target.words, context=_CONTEXT),
                    target.words,
                    api=engine.value,
                    max_model_len=_CONTEXT + _SPARE,
                )
            )
            for _ in range(_SERVERS)
        ]
        samples = sample_tokens(local.strings, local.end_tokens)
        verifier = connect(settings, local, [server.url for server in servers], samples=samples)
        stack.callback(verifier.shut_down)
        yield verifier


_VERIFIERS: Final[dict[ToyEngine, Callable[[], AbstractContextManager[Verifier]]]] = {
    ToyEngine.SCRIPTED: _scripted,
    ToyEngine.LLAMA_CPP: _llama_cpp,
    ToyEngine.VLLM: partial(_remote, ToyEngine.VLLM),
    ToyEngine.SGLANG: partial(_remote, ToyEngine.SGLANG),
}
