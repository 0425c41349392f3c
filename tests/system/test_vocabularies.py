from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType

from broker_config.processes import MosquittoProcess
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.drafters.model_file import GgufModel
from fleet_device.requests.generate import GenerateRequest
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.registry import load_verifier
from fleet_edge.verifiers.tokens import target_tokens
from fleet_edge.verifiers.torch_engine.target import load_target
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import EndReason
from schemas.vocabulary import Vocabulary
from tests.support.one_thread import OnOneThread
from tests.support.tiny_gguf import Row, sentencepiece_rows, tiny_gguf, tiny_rows
from tests.support.whole import Whole

PLAIN = {"gpt2": tiny_rows(), "llama": sentencepiece_rows()}


def endings(first: int) -> dict[str, tuple[list[Row], int]]:
    """Return possible rows after the plain ones, from the id `first` on, and how many of them are tokens."""
    by_id = [f"[PAD{first + index}]" for index in range(4)]
    from_one_on = [f"[PAD{1 + index}]" for index in range(4)]
    return {
        "nothing": ([], 0),
        "padding named by id": ([(name, TokenType.UNUSED) for name in by_id], 0),
        "padding named from one on": ([(name, TokenType.UNUSED) for name in from_one_on], 0),
        "padding that is said to be the user's": ([(name, TokenType.USER_DEFINED) for name in by_id], 0),
        "padding that is said to be unknown": ([(name, TokenType.UNKNOWN) for name in by_id], 0),
        "tokens that are not used": ([("spare", TokenType.UNUSED), ("sparer", TokenType.UNUSED)], 2),
        "control tokens that are not used": ([(f"<unused{index}>", TokenType.CONTROL) for index in range(4)], 4),
        "control tokens": ([("<|call|>", TokenType.CONTROL), ("<|return|>", TokenType.CONTROL)], 2),
        "tokens of the user": ([("  ", TokenType.USER_DEFINED), ("<td>", TokenType.USER_DEFINED)], 2),
        "padding before a token": ([(by_id[0], TokenType.UNUSED), ("<|call|>", TokenType.CONTROL)], 2),
        "an unused token before padding": ([("<unused0>", TokenType.CONTROL), (by_id[1], TokenType.UNUSED)], 1),
        "a row without a string": ([("zip", TokenType.NORMAL), ("", TokenType.NORMAL), ("zap", TokenType.NORMAL)], 3),
        "a last row without a string": ([("", TokenType.UNUSED)], 1),
        "strings that hold a NUL": ([("zip\0zap", TokenType.NORMAL), ("\0", TokenType.NORMAL)], 2),
    }


def device_vocabulary(path: Path) -> Vocabulary:
    model = GgufModel(path, vocabulary_only=True)
    try:
        return model.vocabulary
    finally:
        model.close()


@pytest.mark.parametrize("tokenizer", PLAIN)
@pytest.mark.parametrize("ending", endings(0))
def test_both_ends_read_one_vocabulary_out_of_one_file(ending: str, tokenizer: str, tmp_path: Path) -> None:
    plain = PLAIN[tokenizer]
    rows, tokens = endings(len(plain))[ending]
    path = tiny_gguf(tmp_path / "tiny.gguf", rows=[*plain, *rows], tokenizer=tokenizer)
    found = device_vocabulary(path)
    assert found.size == len(plain) + tokens
    assert load_target(path, dtype="float32").info.vocabulary == found
    assert Vocabulary.of(target_tokens(path)) == found


def test_runs_of_spaces_are_one_vocabulary_in_either_spelling(tmp_path: Path) -> None:
    """Gemma's tokenizer has them as U+2581, the converted GGUF as spaces."""
    found = [
        device_vocabulary(
            tiny_gguf(
                tmp_path / f"{number}.gguf",
                rows=[*PLAIN["llama"], (spelling * 2, kind), (spelling * 3, kind)],
                tokenizer="llama",
            )
        )
        for number, (spelling, kind) in enumerate(
            [(" ", TokenType.USER_DEFINED), ("\u2581", TokenType.USER_DEFINED), ("\u2581", TokenType.NORMAL)]
        )
    ]
    assert len(set(found)) == 1


def test_bytes_that_are_no_unicode_are_told_apart_by_both_ends(tmp_path: Path) -> None:
    """Transformers loads no such model, and the fingerprint must not be the first check."""
    found = set()
    for stray in (b"\xff", b"\xfe"):
        path = tiny_gguf(tmp_path / "tiny.gguf", rows=[*PLAIN["gpt2"], (stray, TokenType.NORMAL)])
        assert Vocabulary.of(target_tokens(path)) == device_vocabulary(path)
        found.add(device_vocabulary(path))
    assert len(found) == 2


@pytest.mark.broker
@pytest.mark.parametrize("engine", ["torch", "llama.cpp", "blocks"])
def test_one_file_with_unused_tokens_writes_at_both_ends(
    engine: str, mosquitto: MosquittoProcess, tmp_path: Path
) -> None:
    """Draft model and target are the same: nearly all drafted tokens are accepted."""
    unused = [(f"<unused{index}>", TokenType.CONTROL) for index in range(5)]
    path = tiny_gguf(tmp_path / "tiny.gguf", rows=[*PLAIN["llama"], *unused], tokenizer="llama")
    settings = EdgeSettings(engine=engine, target=str(path), dtype="float32", kv_bytes=1 << 28)
    drafter: Any = OnOneThread(lambda: LlamaCppDrafter(LlamaCppSettings(path=path, threads=1)))
    whole = Whole(mosquitto.port, tmp_path, load_verifier(settings))
    try:
        with whole.edge(), whole.device(drafter, draft_length=4) as device:
            prompt = tuple(drafter.codec.encode("the teeth"))
            policy = SamplingPolicy(mode=Mode.RESIDUAL, seed=5)
            done = device.agent.generate(GenerateRequest(prompt, policy=policy, max_new_tokens=64))
    finally:
        drafter.close()
    assert len(done.tokens) == 64 or done.reason is EndReason.STOP
    assert done.counters.tested > len(done.tokens) / 2
    assert done.counters.accepted > 0.9 * done.counters.tested
