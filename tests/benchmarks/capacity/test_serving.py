from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks.capacity.devices import Arrival, Timing
from benchmarks.capacity.serving import Prompt, Written, serve
from schemas.policy import Mode, SamplingPolicy
from tests.support.toy_pair import END_TOKENS
from tests.support.toy_transformer import ToyTransformer

GREEDY = SamplingPolicy(mode=Mode.COUPLED, temperature=1.0, top_k=1, top_p=1.0, seed=0)


class Clock:
    """A clock that others move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Steady:
    """An engine whose step takes a tenth of a second, and gives each text a token."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._left: dict[int, int] = {}

    def begin(self, slot: int, prompt: Prompt) -> None:
        assert slot not in self._left
        self._left[slot] = prompt.most

    def step(self) -> Mapping[int, Written]:
        self._clock.now += 0.1
        found = {slot: Written((7,), left == 1) for slot, left in self._left.items()}
        self._left = {slot: left - 1 for slot, left in self._left.items() if left > 1}
        return found


def test_clients_ask_for_text_after_text_and_are_counted_from_when_all_have_had_a_token() -> None:
    clock = Clock()
    text = Prompt((1,), GREEDY, 5)
    asked = [iter([Arrival(0.0, text)] * 99), iter([Arrival(2.0, text)] * 99)]
    clients, window = serve(Steady(clock), asked, Timing(3.0, 0.5, 60.0), clock=clock, sleep=clock.sleep)
    assert window.begin == pytest.approx(100.0 + 2.1 + 0.5, abs=0.11)
    assert window.seconds == pytest.approx(3.0)
    assert [each.asked_at for each in clients[0].texts[:3]] == pytest.approx([100.0, 100.5, 101.0])
    # The other pauses for two seconds before each text, which takes half a second.
    assert [each.asked_at for each in clients[1].texts[:2]] == pytest.approx([102.0, 104.5], abs=0.11)
    assert [each.tokens for each in clients[0].texts[:-1]] == [5] * (len(clients[0].texts) - 1)
    assert clients[0].tokens(window) == 30


def test_devices_that_learn_are_counted_later() -> None:
    clock = Clock()
    asked = [iter([Arrival(0.0, Prompt((1,), GREEDY, 5))] * 99) for _ in range(2)]
    _, window = serve(Steady(clock), asked, Timing(1.0, 0.0, 60.0, tokens=12), clock=clock, sleep=clock.sleep)
    assert window.begin == pytest.approx(101.2, abs=0.11)


def test_whoever_gets_no_token_is_not_waited_for_without_end() -> None:
    clock = Clock()
    asked = [iter([Arrival(0.0, Prompt((1,), GREEDY, 500))]), iter([Arrival(1e6, Prompt((1,), GREEDY, 5))])]
    _, window = serve(Steady(clock), asked, Timing(1.0, 0.5, 4.0), clock=clock, sleep=clock.sleep)
    assert window.begin == pytest.approx(104.0 + 2 * 0.3, abs=0.11)


def test_raw_llama_cpp_writes_the_models_own_texts_in_all_slots_at_once(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from benchmarks.capacity.raw_engine import RawEngine  # noqa: PLC0415 - needs llama.cpp

    toy = ToyTransformer(size=6, seed=51, sharpness=1.8)
    engine = RawEngine(
        toy.write_gguf(tmp_path / "toy.gguf", end_token=END_TOKENS[0]), slots=3, cells=256, threads=1, flash=False
    )
    prompts = [(1, 2, 3), (4,), (5, 1) * 90]
    for slot, prompt in enumerate(prompts):
        engine.begin(slot, Prompt(prompt, GREEDY, 8))
    texts: list[list[int]] = [[], [], []]
    going = {0, 1, 2}
    while going:
        for slot, written in engine.step().items():
            texts[slot] += written.new
            going -= {slot} if written.ended else set()
    assert texts == [greedy(toy, prompt) for prompt in prompts]


def greedy(toy: ToyTransformer, prompt: tuple[int, ...]) -> list[int]:
    text: list[int] = []
    while len(text) < 8 and not (text and text[-1] in END_TOKENS):
        text.append(int(toy.logits((*prompt, *text)).argmax()))
    return text
