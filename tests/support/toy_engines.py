"""Engines of the toy edge: the toy target or a hybrid in llama.cpp or blocks, or a stand-in of an inference server."""

import atexit
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import TokenType

from fleet_edge.verifiers.contract import Item, Verifier
from sampling.distribution import Float
from tests.support.markov import MarkovScript
from tests.support.scripted_verifier import ScriptedVerifier
from tests.support.tiny_gguf import Row, tiny_delta_gguf, tiny_hybrid_gguf, tiny_nemotron_gguf
from tests.support.toy_pair import END_TOKENS, TOP_K, Disturbed, Languages, ToyPair
from tests.support.toy_transformer import ToyTransformer

_KV_BYTES: Final = 1 << 24
_SPARE: Final = 1  # position that a server keeps for itself
_CONTEXT: Final = 256
_NOISE: Final = MarkovScript(size=6, seed=8, sharpness=1.0, period=3)
_HYBRID_SEED: Final = 8
"""Its rows are further from the edges of `top_k` and `top_p` than an engine rounds."""


class ToyEngine(StrEnum):
    SCRIPTED = "scripted"
    LLAMA_CPP = "llama.cpp"
    HYBRID = "hybrid"  # layers with a running state, in llama.cpp
    EIGHT_BITS = "8-bit"
    FOUR_BITS = "4-bit"
    DELTA = "delta"  # layers with a gated delta rule, in blocks
    MAMBA = "mamba"  # layers with Mamba-2, and experts, likewise
    VLLM = "vllm"


_BLOCKS: Final = (ToyEngine.EIGHT_BITS, ToyEngine.FOUR_BITS)


def pair_of(engine: ToyEngine, languages: Languages = Languages.STANDARD) -> ToyPair:
    """Return the languages of a proof; those of engines that keep keys and values are transformers."""
    if languages is Languages.UNLIKE:
        return ToyPair.unlike()
    if languages is not Languages.STANDARD:
        return ToyPair.near(languages)
    if engine is ToyEngine.SCRIPTED:
        return ToyPair.standard()
    pair = ToyPair.transformer()
    if engine in (ToyEngine.HYBRID, ToyEngine.DELTA, ToyEngine.MAMBA):
        return replace(pair, target=_alone(engine), draft=Disturbed(_alone(engine), _NOISE))
    return replace(pair, target=_alone(engine)) if engine in _BLOCKS else pair


def toy_verifier(engine: ToyEngine, languages: Languages, *, foreign: bool = False) -> AbstractContextManager[Verifier]:
    """Return the target of a pair, or with `foreign` another one of the same vocabulary."""
    if foreign:
        other = ToyPair.foreign()
        return nullcontext(ScriptedVerifier(other, other.words, end_tokens=END_TOKENS, name="toy-foreign"))
    return _VERIFIERS[engine]() if engine in _VERIFIERS else _scripted(languages)


def toy_draft(languages: Languages) -> AbstractContextManager[Verifier]:
    """Return the draft model of a pair as an edge runs it."""
    pair = pair_of(ToyEngine.SCRIPTED, languages)
    return nullcontext(ScriptedVerifier(pair.draft, pair.draft_words, end_tokens=END_TOKENS, name="toy-draft"))


@contextmanager
def _scripted(languages: Languages) -> Iterator[Verifier]:
    target = pair_of(ToyEngine.SCRIPTED, languages).target
    yield ScriptedVerifier(target, target.words, end_tokens=END_TOKENS, name="toy")


@contextmanager
def _llama_cpp() -> Iterator[Verifier]:
    from fleet_edge.verifiers.llama_cpp.target import open_target  # noqa: PLC0415 - only where it is installed
    from fleet_edge.verifiers.llama_cpp.verifier import LlamaCppVerifier  # noqa: PLC0415

    target = pair_of(ToyEngine.LLAMA_CPP).target
    assert isinstance(target, ToyTransformer)
    with tempfile.TemporaryDirectory(prefix="toy-") as folder:
        path = target.write_gguf(Path(folder) / "toy.gguf", end_token=END_TOKENS[0])
        yield LlamaCppVerifier(open_target(path, gpu_layers=0), budget_bytes=_KV_BYTES, context=_CONTEXT, threads=1)


def _toy_rows() -> list[Row]:
    return [(word, TokenType.NORMAL) for word in ToyPair.standard().target.words]


@contextmanager
def _hybrid() -> Iterator[Verifier]:
    from fleet_edge.verifiers.llama_cpp.target import open_target  # noqa: PLC0415
    from fleet_edge.verifiers.llama_cpp.verifier import LlamaCppVerifier  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="toy-") as folder:
        path = tiny_hybrid_gguf(Path(folder) / "toy.gguf", rows=_toy_rows(), seed=_HYBRID_SEED, end=END_TOKENS[0])
        target = open_target(path, gpu_layers=0)
        yield LlamaCppVerifier(target, budget_bytes=_KV_BYTES, context=_CONTEXT, threads=1)


@contextmanager
def _blocks(engine: ToyEngine) -> Iterator[Verifier]:
    from fleet_edge.settings import EdgeSettings  # noqa: PLC0415 - only where it is installed
    from fleet_edge.verifiers.registry import load_verifier  # noqa: PLC0415

    target = ToyPair.transformer().target
    assert isinstance(target, ToyTransformer)
    with tempfile.TemporaryDirectory(prefix="toy-") as folder:
        path = Path(folder) / "toy.gguf"
        if engine is ToyEngine.DELTA:
            tiny_delta_gguf(path, rows=_toy_rows(), end=END_TOKENS[0])
        elif engine is ToyEngine.MAMBA:
            tiny_nemotron_gguf(path, rows=_toy_rows(), end=END_TOKENS[0], experts=6)
        else:
            target.write_gguf(path, end_token=END_TOKENS[0], four_bits=engine is ToyEngine.FOUR_BITS)
        settings = {"engine": "blocks", "target": str(path), "kv_bytes": _KV_BYTES, "threads": 1}
        yield load_verifier(EdgeSettings.model_validate(settings))


class ComputedAlone(ToyTransformer):
    """What an engine computes: each row alone and from its first token, without drafts or rollback."""

    def __init__(self, words: tuple[str, ...], verifier: Verifier) -> None:
        self._words = words
        self._verifier = verifier
        self._rows = {}
        self._one = threading.Lock()

    @property
    def size(self) -> int:
        return len(self._words)

    def _compute(self, tokens: tuple[int, ...]) -> Float:
        with self._one:
            self._verifier.open(0)
            row: np.ndarray[Any, Any] = np.array(self._verifier.score([Item(0, tokens, 1)]))[0]
            self._verifier.close(0)
        return row.astype(np.float64)


@cache
def _alone(engine: ToyEngine) -> ComputedAlone:
    verifier = _ALONE.enter_context(_VERIFIERS[engine]())
    return ComputedAlone(ToyPair.standard().target.words, verifier)


_ALONE: Final = ExitStack()
atexit.register(_ALONE.close)


@contextmanager
def _remote() -> Iterator[Verifier]:
    """Request as many tokens of a row as the policy keeps."""
    from fleet_edge.settings import InferenceServerSettings  # noqa: PLC0415
    from fleet_edge.verifiers.remote.local import LocalTokens, sample_tokens  # noqa: PLC0415
    from fleet_edge.verifiers.remote.verifier import connect  # noqa: PLC0415 - only where it is installed
    from tests.support.inference_server import InferenceServer  # noqa: PLC0415

    target = pair_of(ToyEngine.VLLM).target
    local = LocalTokens("toy", list(target.words), END_TOKENS)
    settings = InferenceServerSettings(top_logprobs=TOP_K)
    with ExitStack() as stack:
        server = stack.enter_context(
            InferenceServer(
                ScriptedVerifier(target, target.words, context=_CONTEXT),
                target.words,
                max_model_len=_CONTEXT + _SPARE,
            )
        )
        samples = sample_tokens(local.strings, local.end_tokens)
        verifier = connect(settings, local, server.url, samples=samples)
        stack.callback(verifier.shut_down)
        yield verifier


_VERIFIERS: Final[dict[ToyEngine, Callable[[], AbstractContextManager[Verifier]]]] = {
    ToyEngine.LLAMA_CPP: _llama_cpp,
    ToyEngine.HYBRID: _hybrid,
    ToyEngine.EIGHT_BITS: partial(_blocks, ToyEngine.EIGHT_BITS),
    ToyEngine.FOUR_BITS: partial(_blocks, ToyEngine.FOUR_BITS),
    ToyEngine.DELTA: partial(_blocks, ToyEngine.DELTA),
    ToyEngine.MAMBA: partial(_blocks, ToyEngine.MAMBA),
    ToyEngine.VLLM: _remote,
}
