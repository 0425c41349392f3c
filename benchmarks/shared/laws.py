"""Recorded laws: what a target and a draft model say at each position of some texts, served again without either.

Along a recorded text both laws are those of the real models. Behind a token that the text does not have they go on
with what was recorded for the position: so a text may be written anew, in either mode and by any seed, and position by
position its drafts are accepted as often as the models' own, without a model at run time.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.shared.recordings import key_of, policy_of, read_by_draft, write_by_target
from dssd.distribution import Dist
from dssd.sampling import coupled_token
from fleet_cli.prompts import Prompt
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.texts.chat import ChatMessage, encode_chat
from schemas.errors import FleetError
from schemas.policy import Mode, SamplingPolicy
from tests.support.recorded_drafter import RecordedText

__all__ = ["RecordedLaw", "RecordedLaws", "record_laws"]

_TEMPERATURE: Final = policy_of(0).temperature
_TOP_K: Final = policy_of(0).top_k


@dataclass(frozen=True, slots=True)
class RecordedLaw:
    """The laws along one text.

    Attributes:
        prompt: Token ids.
        target: By position, the target's shaped distribution.
        draft: By position, the draft model's.
    """

    prompt: tuple[int, ...]
    target: tuple[Dist, ...]
    draft: tuple[Dist, ...]

    def text(self, seed: int, mode: Mode) -> RecordedText:
        """Return it as what a `RecordedDrafter` plays.

        The policy keeps what was recorded as it is: that was shaped already.
        """
        policy = SamplingPolicy(mode=mode, temperature=_TEMPERATURE, top_k=_TOP_K, top_p=1.0, seed=seed)
        return RecordedText("", self.prompt, policy, (0,) * len(self.draft), self.draft)

    def written(self, seed: int) -> RecordedText:
        """Return it as what the target writes in coupled mode: devices that play it write that text again."""
        policy = SamplingPolicy(mode=Mode.COUPLED, temperature=_TEMPERATURE, top_k=_TOP_K, top_p=0.95, seed=seed)
        tokens = tuple(coupled_token(p, seed, place) for place, p in enumerate(self.target))
        return replace(self.text(seed, Mode.COUPLED), policy=policy, tokens=tokens)

    @property
    def overlap(self) -> float:
        """The mean of the sum of min(p, q): how often a drafted token is accepted in residual mode."""
        shares = []
        for p, q in zip(self.target, self.draft, strict=True):
            _, mine, theirs = np.intersect1d(p.ids, q.ids, assume_unique=True, return_indices=True)
            shares.append(np.minimum(p.probs[mine], q.probs[theirs]).sum())
        return float(np.mean(shares))


class RecordedLaws:
    """Some laws, as a `Script` of the target: the prompt tells which.

    Args:
        laws: With prompts that differ, and none of which begins with another.
        vocabulary_size: Of both models.
    """

    def __init__(self, laws: Sequence[RecordedLaw], vocabulary_size: int) -> None:
        self.laws = tuple(laws)
        self.size = vocabulary_size
        self._by_prompt = {law.prompt: law for law in laws}
        self._lengths = sorted({len(law.prompt) for law in laws})

    @property
    def words(self) -> tuple[str, ...]:
        """Token strings by id: `t0`, `t1`, …."""
        return tuple(f"t{token}" for token in range(self.size))

    def logits(self, prefix: Sequence[int]) -> NDArray[Any]:
        """Return float32 `[vocabulary]`, minus infinity where the law has nothing; behind its end its last row."""
        law = self._of(prefix)
        row = np.full(self.size, -np.inf, dtype=np.float32)
        p = law.target[min(len(prefix) - len(law.prompt), len(law.target) - 1)]
        row[p.ids] = _TEMPERATURE * np.log(p.probs)
        return row

    def _of(self, prefix: Sequence[int]) -> RecordedLaw:
        for length in self._lengths:
            if law := self._by_prompt.get(tuple(prefix[:length])):
                return law
        raise FleetError("The recording has no such prompt.")


def record_laws(
    target: Path,
    draft: Path,
    prompts: Sequence[Prompt],
    *,
    tokens: int,
    cache: Path,
    on_progress: Callable[[str], None] = lambda _done: None,
) -> RecordedLaws:
    """Return the laws of a pair along texts that the target writes; made now, or taken from the cache.

    Args:
        target: GGUF of the target.
        draft: GGUF of the draft model, of the same vocabulary.
        prompts: What is written about.
        tokens: Of each text, at most.
        cache: Folder.
        on_progress: Told of what is done.
    """
    file = cache / f"laws-{draft.stem}-{key_of(target, draft, prompts, tokens)}.npz"
    if not file.exists():
        on_progress(f"recording what {target.name} and {draft.stem} say of {len(prompts)} texts, once")
        _save(file, *_record(target, draft, prompts, tokens))
    return _load(file)


def _record(target: Path, draft: Path, prompts: Sequence[Prompt], tokens: int) -> tuple[list[RecordedLaw], int]:
    drafter = LlamaCppDrafter(LlamaCppSettings(path=draft, threads=1))
    with closing(drafter):
        encoded = [tuple(encode_chat(drafter.codec, [ChatMessage("user", prompt.text)])) for prompt in prompts]
        policies = [policy_of(number) for number in range(len(prompts))]
        written = write_by_target(target, encoded, policies, tokens)
        said = read_by_draft(drafter, encoded, policies, written)
        laws = [
            RecordedLaw(prompt, text.dists, tuple(dists))
            for prompt, text, dists in zip(encoded, written, said, strict=True)
        ]
        return laws, drafter.vocabulary.size


def _save(file: Path, laws: Sequence[RecordedLaw], vocabulary_size: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    both = {
        "target": [dist for law in laws for dist in law.target],
        "draft": [dist for law in laws for dist in law.draft],
    }
    arrays: dict[str, NDArray[Any]] = {
        "vocabulary": np.array([vocabulary_size]),
        "prompts": np.array([len(law.prompt) for law in laws]),
        "lengths": np.array([len(law.target) for law in laws]),
        "tokens": np.concatenate([np.array(law.prompt) for law in laws]),
    }
    for name, dists in both.items():
        arrays[f"{name}_sizes"] = np.array([len(dist) for dist in dists])
        arrays[f"{name}_ids"] = np.concatenate([dist.ids for dist in dists])
        arrays[f"{name}_probs"] = np.concatenate([dist.probs for dist in dists])
    with file.with_suffix(".part").open("wb") as part:
        np.savez_compressed(part, allow_pickle=False, **arrays)
    file.with_suffix(".part").replace(file)


def _load(file: Path) -> RecordedLaws:
    with np.load(file, allow_pickle=False) as found:
        vocabulary_size = int(found["vocabulary"][0])
        lengths = found["lengths"]
        prompts = [tuple(map(int, each)) for each in _parts(found["tokens"], found["prompts"])]
        dists = {
            name: [
                Dist(ids, probs)
                for ids, probs in zip(
                    _parts(found[f"{name}_ids"], found[f"{name}_sizes"]),
                    _parts(found[f"{name}_probs"], found[f"{name}_sizes"]),
                    strict=True,
                )
            ]
            for name in ("target", "draft")
        }
    ends = np.cumsum(lengths)
    laws = [
        RecordedLaw(prompt, tuple(dists["target"][end - length : end]), tuple(dists["draft"][end - length : end]))
        for prompt, end, length in zip(prompts, ends, lengths, strict=True)
    ]
    return RecordedLaws(laws, vocabulary_size)


def _parts(values: NDArray[Any], sizes: NDArray[Any]) -> list[NDArray[Any]]:
    return np.split(values, np.cumsum(sizes)[:-1])
