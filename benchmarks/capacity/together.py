"""Together: draft model and target on the same cores, batched over all clients, as inference servers speculate.

Also recordings of texts that both generate in residual mode. Such a text depends on the draft model and on where drafts
begin, so that it is recorded with both at work; played again under the same plan it comes out as it was.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.capacity.serving import CHUNK, STEP, Prompt, Written, verifier_over
from benchmarks.harness import Bench, say
from benchmarks.recordings import Recording, cache_of, load, save
from dssd.distribution import Dist
from dssd.downlink import correct, dense
from dssd.sampling import Proposal, propose
from dssd.verification import Judgement
from fleet_admin.models.prompts import Prompt as Asked
from fleet_edge.batching.judging import Case, judge_batch
from fleet_edge.batching.shaping import shape_rows
from fleet_edge.verifiers.contract import Item, Logits, Verifier
from schemas.policy import Mode

_TOGETHER = 8


@dataclass(slots=True)
class Slot:
    """A text under way."""

    prompt: Prompt
    text: list[int] = field(default_factory=list)
    said: dict[int, Dist] = field(default_factory=dict)
    drafted: list[Proposal] = field(default_factory=list)

    @property
    def known(self) -> tuple[int, ...]:
        return (*self.prompt.tokens, *self.text)


class Together:
    """An `Engine`: in a step the draft model drafts for all texts and the target verifies all drafts."""

    def __init__(self, target: Verifier, draft: Verifier, *, length: int) -> None:
        self._target = target
        self._draft = draft
        self._length = length
        self._slots: dict[int, Slot] = {}
        self.ended: dict[int, Slot] = {}

    def begin(self, slot: int, prompt: Prompt) -> None:
        """Begin a text in a slot that has none."""
        self._slots[slot] = Slot(prompt)
        self.ended.pop(slot, None)
        self._target.open(slot)
        self._draft.open(slot)

    def step(self) -> Mapping[int, Written]:
        """Compute once for all slots; return what each got, those that got nothing left out."""
        writing = {number: slot for number, slot in self._slots.items() if self._ready(number, slot)}
        self._propose(writing)
        items, cases = [], []
        for number, slot in writing.items():
            tokens = tuple(each.token for each in slot.drafted)
            counts = None
            if slot.prompt.policy.mode is not Mode.COUPLED:
                counts = tuple(each.count or 0 for each in slot.drafted)
            new = slot.known[self._target.computed(number) :]
            items.append(Item(number, (*new, *tokens), len(tokens) + 1))
            cases.append(Case(tokens, counts, slot.prompt.policy, len(slot.text), bonus=True))
        if prompts := self._prompts(CHUNK if items else STEP):
            self._draft.score(prompts)
        judged = judge_batch(self._target.score([*items, *prompts]), cases)
        return {
            number: self._take(number, slot, judgement)
            for (number, slot), judgement in zip(writing.items(), judged, strict=True)
        }

    def _ready(self, number: int, slot: Slot) -> bool:
        """Whether all of a text but its last token is computed, so that it can be drafted for."""
        return self._target.computed(number) >= len(slot.prompt.tokens) - 1

    def _propose(self, writing: Mapping[int, Slot]) -> None:
        for slot in writing.values():
            slot.drafted = []
        for _ in range(self._length):
            going = {
                number: slot
                for number, slot in writing.items()
                if len(slot.text) + len(slot.drafted) < slot.prompt.most
            }
            if not going:
                return
            items = []
            for number, slot in going.items():
                known = (*slot.known, *(each.token for each in slot.drafted))
                items.append(Item(number, known[self._draft.computed(number) :], 1))
            policies = [slot.prompt.policy for slot in going.values()]
            shaped = shape_rows(_array(self._draft.score(items)), policies, policies[0].top_k)
            for row, slot in enumerate(going.values()):
                position = len(slot.text) + len(slot.drafted)
                slot.said[position] = shaped.row(row)
                slot.drafted.append(propose(slot.said[position], policy=slot.prompt.policy, position=position))

    def _prompts(self, room: int) -> Sequence[Item]:
        """Return the next pieces of prompts that are not computed."""
        items = []
        for number, slot in self._slots.items():
            if not self._ready(number, slot) and room > 0:
                begin = self._target.computed(number)
                tokens = slot.prompt.tokens[begin:-1][:room]
                items.append(Item(number, tokens, 0))
                room -= len(tokens)
        return items

    def _take(self, number: int, slot: Slot, judged: Judgement | None) -> Written:
        assert judged is not None
        new = [*(each.token for each in slot.drafted[: judged.accepted]), self._token(slot, judged)]
        ends = self._target.info.end_tokens
        end = next((place + 1 for place, each in enumerate(new) if each in ends), len(new))
        new = new[: min(end, slot.prompt.most - len(slot.text))]
        slot.text += new
        ended = slot.text[-1] in ends or len(slot.text) >= slot.prompt.most
        if ended:
            self.ended[number] = self._slots.pop(number)
            self._target.close(number)
            self._draft.close(number)
        else:
            known = len(slot.prompt.tokens) + len(slot.text) - 1
            self._target.truncate(number, min(known, self._target.computed(number)))
            self._draft.truncate(number, min(known, self._draft.computed(number)))
        return Written(tuple(new), ended)

    def _token(self, slot: Slot, judged: Judgement) -> int:
        """Return the token behind the accepted ones; in residual mode as a device draws it."""
        if judged.token is not None:
            return judged.token
        quantized = slot.drafted[judged.accepted].quantized
        assert judged.p is not None
        assert quantized is not None
        token = correct(
            dense(judged.p, self._target.info.vocabulary.size),
            quantized,
            policy=slot.prompt.policy,
            position=len(slot.text) + judged.accepted,
        )
        assert token is not None
        return token


def _array(logits: Logits) -> NDArray[np.float32]:
    return logits if isinstance(logits, np.ndarray) else logits.float().cpu().numpy()


def record_residual(
    bench: Bench, coupled: Recording, asked: Sequence[Asked], *, length: int, tokens: int, threads: int
) -> Recording:
    """Return the recording of a pair in residual mode; made now, or taken from the cache."""
    residual = [text.policy.model_copy(update={"mode": Mode.RESIDUAL}) for text in coupled.texts]
    file = cache_of(bench, f"residual-{length}-{coupled.draft}", coupled.draft, asked, tokens)
    if not file.exists():
        say(f"recording what the target and {coupled.draft} generate together in residual mode, once")
        draft = bench.model(f"{coupled.draft}.gguf")
        target, drafting = (
            verifier_over(path, threads=threads, batch_invariant=stable)
            for path, stable in ((bench.target(), True), (draft, False))
        )
        prompts = [Prompt(text.prompt, policy, tokens) for text, policy in zip(coupled.texts, residual, strict=True)]
        slots = write_all(Together(target, drafting, length=length), prompts)
        save(file, {"texts": [slot.text for slot in slots]}, {"draft": [said_along(slot) for slot in slots]})
    ints, dists = load(file)
    recorded = (
        replace(text, policy=policy, tokens=tuple(map(int, own)), dists=said)
        for text, policy, own, said in zip(coupled.texts, residual, ints["texts"], dists["draft"], strict=True)
    )
    return replace(coupled, texts=tuple(recorded))


def write_all(together: Together, prompts: Sequence[Prompt]) -> list[Slot]:
    """Let both models write all texts, some at a time; return them in order."""
    slots: list[Slot] = []
    for first in range(0, len(prompts), _TOGETHER):
        some = prompts[first : first + _TOGETHER]
        for number, prompt in enumerate(some):
            together.begin(number, prompt)
        while len(together.ended) < len(some):
            together.step()
        slots += [together.ended.pop(number) for number in range(len(some))]
    return slots


def said_along(slot: Slot) -> list[Dist]:
    """Return what was said at each position; where the target wrote behind a draft nothing was, nor will be asked."""
    return [slot.said.get(place, Dist(np.array([token]), np.array([1.0]))) for place, token in enumerate(slot.text)]
