"""Recordings: texts that a target writes in coupled mode, and what draft models say along them, kept in a file.

What is recorded depends on nothing but the files, the prompts and the policy, so that it is made once.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from dssd.distribution import Dist
from fleet_cli.models.pair.acceptance import WrittenText, write_texts
from fleet_cli.prompts import Prompt
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.texts.chat import ChatMessage, encode_chat
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.registry import load_verifier
from schemas.errors import FleetError
from schemas.policy import Mode, SamplingPolicy
from tests.support.recorded_drafter import RecordedText

__all__ = [
    "Recording",
    "key_of",
    "load_texts",
    "policy_of",
    "read_by_draft",
    "record",
    "save_texts",
    "write_by_target",
]

_TOGETHER: Final = 8
_CELLS: Final = 256
_KV_BYTES: Final = 512 << 20
_VERSION: Final = 1
_TIMED: Final = 64  # tokens over which the draft model's speed is taken


@dataclass(frozen=True, slots=True)
class Recording:
    """Texts with one draft model.

    Attributes:
        draft: Name of its file, without the ending.
        texts: In the order of the prompts.
        token_s: Its time for a token on one core of this machine, the median; what it depends on was busy or not.
    """

    draft: str
    texts: tuple[RecordedText, ...]
    token_s: float

    @property
    def acceptance(self) -> float:
        """Share of the positions at which draft model and target draw the same token."""
        from dssd.sampling import coupled_token  # noqa: PLC0415

        agree = [
            coupled_token(dist, text.policy.seed, place) == text.tokens[place]
            for text in self.texts
            for place, dist in enumerate(text.dists)
        ]
        return sum(agree) / len(agree)


def record(
    target: Path,
    draft: Path,
    prompts: Sequence[Prompt],
    *,
    tokens: int,
    cache: Path,
    on_progress: Callable[[str], None] = lambda _done: None,
) -> Recording:
    """Return the recording of a pair; made now, or taken from the cache.

    Args:
        target: GGUF of the target.
        draft: GGUF of the draft model, of the same vocabulary.
        prompts: What is written about; text n has seed n.
        tokens: Of each text, at most.
        cache: Folder.
        on_progress: Told of what is done.
    """
    policies = [policy_of(number) for number in range(len(prompts))]
    file = cache / f"{draft.stem}-{key_of(target, draft, prompts, tokens)}.npz"
    drafter = LlamaCppDrafter(LlamaCppSettings(path=draft, threads=1))
    with closing(drafter):
        encoded = [tuple(encode_chat(drafter.codec, [ChatMessage("user", prompt.text)])) for prompt in prompts]
        if not file.exists():
            on_progress(f"recording what {target.name} writes and what {draft.stem} says of it, once")
            written = write_by_target(target, encoded, policies, tokens)
            said = read_by_draft(drafter, encoded, policies, written)
            save_texts(file, [text.tokens for text in written], said)
        texts, dists = load_texts(file)
        token_s = _speed(drafter, encoded[0])
    recorded = (
        RecordedText(prompt.category, prompt_tokens, policy, text, said)
        for prompt, prompt_tokens, policy, text, said in zip(prompts, encoded, policies, texts, dists, strict=True)
    )
    return Recording(draft.stem, tuple(recorded), token_s)


def policy_of(number: int) -> SamplingPolicy:
    """Return the policy of text `number`."""
    return SamplingPolicy(mode=Mode.COUPLED, temperature=0.7, top_k=50, top_p=0.95, seed=number)


def key_of(target: Path, draft: Path, prompts: Sequence[Prompt], tokens: int) -> str:
    """Return what tells the recordings of these files, prompts and lengths from others.

    Raises:
        FleetError: One of the files does not exist.
    """
    for file in (target, draft):
        if not file.exists():
            raise FleetError(f"There is no {file}; make it with `fleet models prepare`, or say --models.")
    facts = [_VERSION, tokens, [[p.category, p.text] for p in prompts]]
    facts += [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in (target, draft)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def write_by_target(
    target: Path, prompts: Sequence[tuple[int, ...]], policies: Sequence[SamplingPolicy], tokens: int
) -> list[WrittenText]:
    """Return a text of a target for each prompt, with the distributions that its tokens were drawn from."""
    cells = -(-(max(map(len, prompts)) + tokens + 1) // _CELLS) * _CELLS
    verifier = load_verifier(
        EdgeSettings(target=str(target), engine="llama.cpp", context=cells - 1, kv_bytes=_KV_BYTES, stable_rows=True)
    )
    written: list[WrittenText] = []
    for first in range(0, len(prompts), _TOGETHER):
        some = slice(first, first + _TOGETHER)
        written += write_texts(verifier, prompts[some], policies=policies[some], tokens=tokens)
    return written


def read_by_draft(
    drafter: LlamaCppDrafter,
    prompts: Sequence[tuple[int, ...]],
    policies: Sequence[SamplingPolicy],
    written: Sequence[WrittenText],
) -> list[list[Dist]]:
    """Return, by text, what a draft model says at the place of each token."""
    said = []
    for prompt, policy, text in zip(prompts, policies, written, strict=True):
        drafter.reset(prompt)
        dists = []
        for token in text.tokens:
            dist = drafter.next(policy)
            assert dist is not None
            dists.append(dist)
            drafter.extend((token,))
        said.append(dists)
    return said


def _speed(drafter: LlamaCppDrafter, prompt: Sequence[int]) -> float:
    drafter.reset(prompt)
    times = []
    for _ in range(_TIMED):
        started = time.perf_counter()
        dist = drafter.next(policy_of(0))
        times.append(time.perf_counter() - started)
        assert dist is not None
        drafter.extend((int(dist.ids[0]),))
    return float(np.median(times[1:]))


def save_texts(file: Path, texts: Sequence[Sequence[int]], said: Sequence[Sequence[Dist]]) -> None:
    """Keep texts, and what a draft model says along them."""
    dists = [dist for text in said for dist in text]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".part").open("wb") as part:
        np.savez_compressed(
            part,
            lengths=np.array([len(text) for text in texts]),
            tokens=np.concatenate([np.array(text) for text in texts]),
            sizes=np.array([len(dist) for dist in dists]),
            ids=np.concatenate([dist.ids for dist in dists]),
            probs=np.concatenate([dist.probs for dist in dists]),
        )
    file.with_suffix(".part").replace(file)


def load_texts(file: Path) -> tuple[list[tuple[int, ...]], list[tuple[Dist, ...]]]:
    """Return the texts of a file, and what the draft model says along them."""
    with np.load(file, allow_pickle=False) as found:
        lengths, tokens, sizes, ids, probs = (found[name] for name in ("lengths", "tokens", "sizes", "ids", "probs"))
    ends, behind = np.cumsum(lengths), np.cumsum(sizes)
    dists = [Dist(ids[end - size : end], probs[end - size : end]) for end, size in zip(behind, sizes, strict=True)]
    texts = [tuple(int(t) for t in tokens[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
    return texts, [tuple(dists[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
