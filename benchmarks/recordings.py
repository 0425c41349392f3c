"""Recordings: a target's and a draft model's distributions at each position of some outputs, made once and cached.

Along a recorded output both distributions are those of the real models. After a token that the output does not have,
they continue with what was recorded for the position. So an output can be generated again, in either mode and with any
seed, and its drafts are accepted as often as the models' own, without a model at run time.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Bench, connected, say
from fleet_admin.models.acceptance import write_texts
from fleet_admin.models.prompts import Prompt
from fleet_device.drafters.contract import Drafter
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.pacing.contract import FixedPacing
from fleet_device.requests.chat import chat_prompt
from fleet_device.requests.generate import GenerateRequest
from fleet_device.requests.structured import ChatMessage
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.registry import load_verifier
from sampling.distribution import Dist, point_mass
from sampling.downlink import FormName
from sampling.drawing import coupled_token
from schemas.errors import FleetError
from schemas.policy import Mode, SamplingPolicy
from tests.support.recorded_drafter import RecordedText

_TOGETHER: Final = 8
_CELLS: Final = 256
_KV_BYTES: Final = 512 << 20
_VERSION: Final = 1
_TIMED: Final = 64  # tokens over which the draft model's speed is taken


def policy_of(number: int) -> SamplingPolicy:
    return SamplingPolicy(mode=Mode.COUPLED, temperature=0.7, top_k=50, top_p=0.95, seed=number)


@dataclass(frozen=True, slots=True)
class RecordedLaw:
    """The shaped distributions along one output: by position the target's and the draft model's."""

    prompt: tuple[int, ...]
    target: tuple[Dist, ...]
    draft: tuple[Dist, ...]

    def text(self, seed: int, mode: Mode) -> RecordedText:
        """Return it for a `RecordedDrafter`. The policy keeps what was recorded, which was already shaped."""
        policy = policy_of(seed).model_copy(update={"mode": mode, "top_p": 1.0})
        return RecordedText("", self.prompt, policy, (0,) * len(self.draft), self.draft)

    def written(self, seed: int) -> RecordedText:
        """Return the output that the target generates in coupled mode, for devices that replay it."""
        tokens = tuple(coupled_token(p, seed, place) for place, p in enumerate(self.target))
        return replace(self.text(seed, Mode.COUPLED), policy=policy_of(seed), tokens=tokens)

    @property
    def overlap(self) -> float:
        """Return the mean of the sum of min(p, q): the acceptance of a drafted token in residual mode."""
        shares = []
        for p, q in zip(self.target, self.draft, strict=True):
            _, mine, theirs = np.intersect1d(p.ids, q.ids, assume_unique=True, return_indices=True)
            shares.append(np.minimum(p.probs[mine], q.probs[theirs]).sum())
        return float(np.mean(shares))


class RecordedLaws:
    """Recorded distributions as a `Script` of the target: the prompt selects which."""

    def __init__(self, laws: Sequence[RecordedLaw], vocabulary_size: int) -> None:
        self.laws = tuple(laws)
        self.size = vocabulary_size
        self._by_prompt = {law.prompt: law for law in laws}
        self._lengths = sorted({len(law.prompt) for law in laws})

    @property
    def words(self) -> tuple[str, ...]:
        """Return the token strings by id: `t0`, `t1`, …."""
        return tuple(f"t{token}" for token in range(self.size))

    def logits(self, prefix: Sequence[int]) -> NDArray[Any]:
        """Return float32 `[vocabulary]`, minus infinity where nothing was recorded; after the end the last row."""
        law = self._of(prefix)
        row = np.full(self.size, -np.inf, dtype=np.float32)
        p = law.target[min(len(prefix) - len(law.prompt), len(law.target) - 1)]
        row[p.ids] = policy_of(0).temperature * np.log(p.probs)
        return row

    def _of(self, prefix: Sequence[int]) -> RecordedLaw:
        for length in self._lengths:
            if law := self._by_prompt.get(tuple(prefix[:length])):
                return law
        raise FleetError("The recording has no such prompt.")


@dataclass(frozen=True, slots=True)
class Recording:
    """Outputs with one draft model."""

    draft: str
    texts: tuple[RecordedText, ...]
    token_s: float


def record(bench: Bench, draft: str, prompts: Sequence[Prompt], *, tokens: int) -> Recording:
    """Return the target's coupled outputs, and the distributions of a draft model such as `Q4_0` along them."""
    laws = record_laws(bench, draft, prompts, tokens=tokens)
    drafter = LlamaCppDrafter(LlamaCppSettings(path=bench.model(f"{draft}.gguf"), threads=1))
    with closing(drafter):
        token_s = _speed(drafter, laws.laws[0].prompt)
    return Recording(draft, tuple(law.written(seed) for seed, law in enumerate(laws.laws)), token_s)


class _Noting:
    """A `Drafter` that notes its model's distribution at each length of the sequence."""

    def __init__(self, drafter: Drafter) -> None:
        self.name = drafter.name
        self.quantization = drafter.quantization
        self.vocabulary = drafter.vocabulary
        self.context = drafter.context
        self.codec = drafter.codec
        self.said: dict[int, Dist] = {}
        self._drafter = drafter
        self._length = 0

    def reset(self, tokens: Sequence[int]) -> None:
        self._drafter.reset(tokens)
        self._length = len(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        self._drafter.extend(tokens)
        self._length += len(tokens)

    def next(self, policy: SamplingPolicy) -> Dist | None:
        dist = self._drafter.next(policy)
        if dist is not None:
            self.said[self._length] = dist
        return dist

    def truncate(self, length: int) -> None:
        self._drafter.truncate(length)
        self._length = min(self._length, length)

    def close(self) -> None:
        self._drafter.close()


def record_residual(
    bench: Bench, coupled: Recording, asked: Sequence[Prompt], *, length: int, tokens: int
) -> Recording:
    """Return a pair's outputs in residual mode with drafts of one length, made now or taken from the cache."""
    policies = [text.policy.model_copy(update={"mode": Mode.RESIDUAL}) for text in coupled.texts]
    file = cache_of(bench, f"residual-{length}-{coupled.draft}", coupled.draft, asked, tokens)
    if not file.exists():
        say(f"recording what the target and {coupled.draft} generate together in residual mode, once")
        requests = [
            GenerateRequest(text.prompt, policy, tokens) for text, policy in zip(coupled.texts, policies, strict=True)
        ]
        drafter = LlamaCppDrafter(LlamaCppSettings(path=bench.model(f"{coupled.draft}.gguf"), threads=1))
        # The token after a rejected one depends on the form of p.
        own: dict[str, Any] = {"context": _CELLS - 1, "kv_bytes": _KV_BYTES, "form": FormName.DENSE.value}
        with closing(drafter), bench.broker() as broker, bench.edge(broker.port, bench.target(), **own):
            texts = write_noted(broker.port, bench.fleet, drafter, requests, length=length)
        save(file, {"texts": [text.tokens for text in texts]}, {"draft": [text.dists for text in texts]})
    ints, dists = load(file)
    recorded = (
        replace(text, policy=policy, tokens=tuple(map(int, own)), dists=said)
        for text, policy, own, said in zip(coupled.texts, policies, ints["texts"], dists["draft"], strict=True)
    )
    return replace(coupled, texts=tuple(recorded))


def write_noted(
    port: int, fleet: str, drafter: Drafter, requests: Sequence[GenerateRequest], *, length: int
) -> list[RecordedText]:
    """Complete requests at an edge with drafts of one length; return the outputs with what the draft model said.

    Where the target generated a token itself, after a whole draft, the draft model said nothing.
    """
    noting, texts = _Noting(drafter), []
    with connected(port, fleet, [noting], pacing=lambda: FixedPacing(length)) as [agent]:
        for request in requests:
            noting.said.clear()
            tokens = agent.generate(request).tokens
            begin = len(request.prompt)
            dists = (noting.said.get(place, point_mass(token)) for place, token in enumerate(tokens, begin))
            texts.append(RecordedText("", request.prompt, request.policy, tokens, tuple(dists)))
    return texts


def record_laws(bench: Bench, draft: str, prompts: Sequence[Prompt], *, tokens: int) -> RecordedLaws:
    """Return both models' distributions along outputs of the target, made now or taken from the cache."""
    file = cache_of(bench, f"laws-{draft}", draft, prompts, tokens)
    if not file.exists():
        say(f"recording what the target and {draft} say of {len(prompts)} texts, once")
        _record(file, bench.engine, bench.target(), bench.model(f"{draft}.gguf"), prompts, tokens)
    arrays, dists = load(file)
    laws = [
        RecordedLaw(tuple(map(int, prompt)), target, said)
        for prompt, target, said in zip(arrays["prompts"], dists["target"], dists["draft"], strict=True)
    ]
    return RecordedLaws(laws, int(arrays["vocabulary"][0][0]))


def cache_of(bench: Bench, kind: str, draft: str, prompts: Sequence[Prompt], tokens: int) -> Path:
    """Return the file of a recording, which depends on the models, the prompts and the lengths alone."""
    files = [(file, file.stat()) for file in (bench.target(), bench.model(f"{draft}.gguf"))]
    facts: list[Any] = [_VERSION, sorted(bench.engine.items()), tokens]
    facts.append([[prompt.category, prompt.text] for prompt in prompts])
    facts += [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in files]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    folder: Path = bench.options.models / "recordings"
    return folder / f"{kind}-{key}.npz"


def _record(
    file: Path, engine: Mapping[str, str], target: Path, draft: Path, prompts: Sequence[Prompt], tokens: int
) -> None:
    drafter = LlamaCppDrafter(LlamaCppSettings(path=draft, threads=1))
    with closing(drafter):
        encoded = [tuple(chat_prompt(drafter.codec, [ChatMessage("user", prompt.text)]).tokens) for prompt in prompts]
        policies = [policy_of(number) for number in range(len(prompts))]
        cells = -(-(max(map(len, encoded)) + tokens + 1) // _CELLS) * _CELLS
        settings = {"target": str(target), **engine, "context": cells - 1, "kv_bytes": _KV_BYTES}
        verifier = load_verifier(EdgeSettings.model_validate({**settings, "batch_invariant": True}))
        said, theirs = [], []
        for first in range(0, len(prompts), _TOGETHER):
            some = slice(first, first + _TOGETHER)
            written = write_texts(verifier, encoded[some], policies=policies[some], tokens=tokens)
            theirs += [text.dists for text in written]
            for prompt, policy, text in zip(encoded[some], policies[some], written, strict=True):
                said.append(_read(drafter, prompt, policy, text.tokens))
        vocabulary = [[drafter.vocabulary.size]]
    save(file, {"vocabulary": vocabulary, "prompts": encoded}, {"target": theirs, "draft": said})


def _read(drafter: LlamaCppDrafter, prompt: Sequence[int], policy: SamplingPolicy, tokens: Sequence[int]) -> list[Dist]:
    """Return a draft model's distribution at the position of each token."""
    drafter.reset(prompt)
    dists = []
    for token in tokens:
        dists.append(drafter.next(policy))
        drafter.extend((token,))
    return dists


def _speed(drafter: LlamaCppDrafter, prompt: Sequence[int]) -> float:
    drafter.reset(prompt)
    times = []
    for _ in range(_TIMED):
        started = time.perf_counter()
        dist = drafter.next(policy_of(0))
        times.append(time.perf_counter() - started)
        drafter.extend((int(dist.ids[0]),))
    return float(np.median(times[1:]))


def save(
    file: Path, ints: Mapping[str, Sequence[Sequence[int]]], dists: Mapping[str, Sequence[Sequence[Dist]]]
) -> None:
    """Save lists of integers and of distributions, by name."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, lists in ints.items():
        arrays[name] = np.concatenate([np.array(each, dtype=np.int64) for each in lists])
        arrays[f"{name}#"] = np.array([len(each) for each in lists])
    for name, texts in dists.items():
        flat = [dist for text in texts for dist in text]
        arrays[f"{name}@"] = np.array([len(text) for text in texts])
        arrays[f"{name}@sizes"] = np.array([len(dist) for dist in flat])
        arrays[f"{name}@ids"] = np.concatenate([dist.ids for dist in flat])
        arrays[f"{name}@probs"] = np.concatenate([dist.probs for dist in flat])
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".part").open("wb") as part:
        np.savez_compressed(part, allow_pickle=False, **arrays)
    file.with_suffix(".part").replace(file)


def load(file: Path) -> tuple[dict[str, list[NDArray[Any]]], dict[str, list[tuple[Dist, ...]]]]:
    with np.load(file, allow_pickle=False) as found:
        ints = {name[:-1]: _parts(found[name[:-1]], found[name]) for name in found if name.endswith("#")}
        dists = {}
        for name in (key[:-1] for key in found if key.endswith("@")):
            sizes = found[f"{name}@sizes"]
            pairs = zip(_parts(found[f"{name}@ids"], sizes), _parts(found[f"{name}@probs"], sizes), strict=True)
            flat = [Dist(ids, probs) for ids, probs in pairs]
            ends = np.cumsum(found[f"{name}@"])
            dists[name] = [tuple(flat[end - n : end]) for end, n in zip(ends, found[f"{name}@"], strict=True)]
    return ints, dists


def _parts(values: NDArray[Any], sizes: NDArray[Any]) -> list[NDArray[Any]]:
    return np.split(values, np.cumsum(sizes)[:-1])
