"""Measurement of a pair with its weights: the target writes texts, then the draft model reads them."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fleet_cli.models.errors import ModelsError
from fleet_cli.models.pair.acceptance import Acceptance, MeasuredText, compare, write_texts
from fleet_cli.models.pair.check import CheckedPair
from fleet_cli.models.pair.facts import Form
from fleet_cli.prompts import Prompt
from fleet_device.drafters.contract import Drafter, TextCodec
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.drafters.unlike import wrap
from fleet_device.settings import DeviceSettings
from fleet_device.texts.chat import ChatMessage, encode_chat
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import Verifier
from fleet_edge.verifiers.registry import load_verifier
from schemas.policy import Mode, SamplingPolicy

__all__ = ["Measurement", "measure"]

_TOGETHER: Final = 8  # texts that the target writes at a time
_CELLS: Final = 256
_LEAST_KV: Final = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """How to measure.

    Attributes:
        prompts: What is written about; each is a user's message, where there is a chat template.
        tokens: Of each text, at most.
        temperature: Of the sampling policy, as are those that follow.
        top_k: Tokens kept.
        top_p: Mass kept.
        seed: Of the first text; the others follow on.
        threads: Of the draft model; the target has all cores.
        on_progress: Told of what is done, as part of a sentence.
    """

    prompts: Sequence[Prompt]
    tokens: int = 64
    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 0.95
    seed: int = 0
    threads: int = 2
    on_progress: Callable[[str], None] = field(default=lambda _done: None)

    def policy(self, number: int) -> SamplingPolicy:
        """Return the policy of a text."""
        return SamplingPolicy(
            mode=Mode.COUPLED,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed + number,
        )


def measure(pair: CheckedPair, how: Measurement, *, target_vocabulary: Path | None = None) -> Acceptance:
    """Measure a pair that fits.

    Args:
        pair: What was checked.
        how: What is written, and how.
        target_vocabulary: As a device's setting, where the vocabularies differ and the target is a folder.

    Raises:
        FleetError: A model cannot be loaded, or has failed, or a prompt is too long.
    """
    drafter = _drafter(pair, how, target_vocabulary)
    with closing(drafter):
        prompts = [_encode(drafter.codec, prompt.text) for prompt in how.prompts]
        if (longest := max(map(len, prompts))) + how.tokens > drafter.context:
            raise ModelsError(
                f"A prompt has {longest} tokens, and the draft model holds {drafter.context} with the text; leave it "
                "out, or ask for fewer --tokens."
            )
        verifier = _load(pair, longest + how.tokens)
        texts = []
        for first in range(0, len(prompts), _TOGETHER):
            chosen = prompts[first : first + _TOGETHER]
            policies = [how.policy(first + number) for number in range(len(chosen))]
            texts += write_texts(verifier, chosen, policies=policies, tokens=how.tokens)
            how.on_progress(f"the target has written {len(texts)} of {len(prompts)} texts")
        measured = list[MeasuredText]()

        def read() -> None:
            for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
                category = how.prompts[number].category
                measured.append(compare(drafter, prompt, text, policy=how.policy(number), category=category))
                how.on_progress(f"the draft model has read {len(measured)} of {len(prompts)} texts")

        # On a thread where torch has not computed: each leaves a processor's matrix unit as the other does not expect.
        with ThreadPoolExecutor(1, "draft") as thread:
            thread.submit(read).result()
    return Acceptance(tuple(measured))


def _drafter(pair: CheckedPair, how: Measurement, target_vocabulary: Path | None) -> Drafter:
    settings = LlamaCppSettings(path=Path(pair.draft.source), threads=how.threads)
    drafter = LlamaCppDrafter(settings)
    if pair.draft.vocabulary == pair.target.vocabulary:
        return drafter
    words = target_vocabulary or Path(pair.target.source)
    return wrap(drafter, DeviceSettings(target_vocabulary=words))


def _load(pair: CheckedPair, context: int) -> Verifier:
    cells = -(-(context + 1) // _CELLS) * _CELLS
    kv_bytes = _TOGETHER * pair.target.kv_bytes(tokens=2 * cells, number_bytes=4)
    engine = "llama.cpp" if pair.target.form is Form.GGUF else "torch"
    settings = EdgeSettings(
        target=pair.target.source, engine=engine, context=cells - 1, kv_bytes=max(_LEAST_KV, kv_bytes)
    )
    return load_verifier(settings)


def _encode(codec: TextCodec, text: str) -> list[int]:
    tokens = encode_chat(codec, [ChatMessage("user", text)]) if codec.chat_template else codec.encode(text)
    if not tokens:
        raise ModelsError("A prompt is no token long; leave it out.")
    return tokens
