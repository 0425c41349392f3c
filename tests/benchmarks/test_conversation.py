"""A conversation, and a system prompt that many share, from device to session log, over a model of a few kilobytes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from benchmarks.conversation.counted import BLOCK, Shared, Turn, beyond_new, counts_of, first_ratio
from benchmarks.conversation.questions import QUESTIONS, rules, system_of
from benchmarks.conversation.report import missed_goals
from benchmarks.conversation.together import common_tokens, write_together
from benchmarks.conversation.turns import MeteredDrafter, Written, converse
from fleet_device.device import Device
from fleet_device.drafters.gguf import GgufModel
from fleet_device.drafters.llama_cpp import LlamaCppSettings
from fleet_device.settings import DeviceSettings
from fleet_device.texts.chat import ChatMessage, encode_chat
from fleet_edge.counters import SegmentCounters
from fleet_edge.edge import Edge
from fleet_edge.settings import EdgeSettings, PrefixSharing
from fleet_edge.verifiers.llama_cpp.target import open_target
from fleet_edge.verifiers.llama_cpp.verifier import LlamaCppVerifier
from fleet_link.settings import LinkSettings
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_link import MemoryLink
from tests.support.tiny_gguf import Row, tiny_gguf

FLEET = "talking"
CONTEXT = 1024
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def letters() -> list[Row]:
    """A vocabulary of printable characters: whatever is written is a text."""
    words = [chr(0x10A), chr(0x120), *map(chr, range(ord("!"), ord("~") + 1)), "th", "the"]
    control = [(word, gguf.TokenType.CONTROL) for word in CONTROL]
    return [*control, *((word, gguf.TokenType.NORMAL) for word in words)]


def model(path: Path, *, noise: float = 0.0) -> Path:
    """Write a model whose likeliest token is never a control token; with noise it differs from the one without."""
    tiny_gguf(path, rows=letters(), context=CONTEXT)
    (output,) = (tensor for tensor in gguf.GGUFReader(path, "r+").tensors if tensor.name == "output.weight")
    output.data[:] += noise * np.random.default_rng(3).standard_normal(output.data.shape).astype(np.float32)
    output.data[: len(CONTROL)] = 0.0
    return path


class Site:
    """Broker and edge; the log is whole when the edge has ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = MemoryBroker()
        self.target = model(folder / "target.gguf")
        self.draft = model(folder / "draft.gguf", noise=0.2)
        self.log = f"sqlite:///{folder / 'log.sqlite3'}"

    @contextmanager
    def edge(self, **given: Any) -> Iterator[None]:
        settings = EdgeSettings.model_validate(
            {"fleet": FLEET, "db": self.log, "spool": self.folder / "spool", "gather_share": 0.0, **given}
        )
        verifier = LlamaCppVerifier(
            open_target(self.target, gpu_layers=0), budget_bytes=64 << 20, context=CONTEXT, threads=1
        )
        with self.broker.running(), Edge(settings, verifier=verifier, make_link=self.link):
            yield

    def link(self, settings: LinkSettings) -> MemoryLink:
        return MemoryLink(self.broker, settings.client_id, will=settings.will)

    def talk(
        self,
        turns: int,
        *,
        conversations: int = 1,
        drafter: Callable[[LlamaCppSettings], MeteredDrafter] = MeteredDrafter,
    ) -> None:
        """Talk to an edge that is there."""
        settings = DeviceSettings(
            fleet=FLEET, device="device-1", temperature=0.0, context=CONTEXT, draft_length=4, stream=False
        )
        drafts = drafter(LlamaCppSettings(path=self.draft, threads=1, context=CONTEXT))
        with Device(settings, load=lambda _settings: drafts, make_link=self.link) as device:
            assert device.wait_for_edge(10.0)
            self.written = converse(
                device,
                drafts,
                QUESTIONS[:turns],
                systems=[system_of(number) for number in range(conversations)],
                tokens=12,
            )

    def turns(self) -> list[Turn]:
        """Return what both ends have counted, once the edge has gone."""
        written = [(number, turn) for number, turns in enumerate(self.written) for turn in turns]
        counts = counts_of(self.log, [turn.session for _, turn in written])
        alone = len(self.written) == 1
        return [Turn("llama.cpp", number, alone, turn, counts[turn.session]) for number, turn in written]


class Forgetful(MeteredDrafter):
    """Computes every text from its beginning."""

    def reset(self, tokens: Sequence[int]) -> None:
        self.truncate(0)
        super().reset(tokens)


def test_each_turn_of_a_conversation_computes_what_is_new_at_both_ends(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with site.edge():
        site.talk(5)
    turns = site.turns()
    assert [turn.device.turn for turn in turns] == [1, 2, 3, 4, 5]
    assert turns[0].device.new == turns[0].device.prompt
    assert all(turn.device.written == 12 for turn in turns)
    assert all(turn.device.new > 60 for turn in turns), "a question has more than a block"
    assert beyond_new(turns) <= BLOCK
    assert all(turn.edge_computed + turn.edge.reused_tokens == turn.device.prompt for turn in turns)
    assert any(turn.edge.accepted < turn.edge.tested for turn in turns), "also where drafts were rejected"
    assert missed_goals([replace(turn, device=replace(turn.device, first_ms=1.0)) for turn in turns], []) == []


def test_conversations_that_take_turns_at_a_device_compute_what_is_new_at_both_ends(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with site.edge():
        site.talk(2, conversations=3)
    turns = site.turns()
    assert [(turn.conversation, turn.device.turn) for turn in turns] == [(n, t) for n in range(3) for t in (1, 2)]
    assert beyond_new(turns) <= BLOCK
    assert first_ratio(turns) is None


def test_an_edge_that_keeps_nothing_and_a_device_that_keeps_nothing_are_told(tmp_path: Path) -> None:
    for name, given, drafter in (("edge", {"prefix_sharing": "off"}, MeteredDrafter), ("device", {}, Forgetful)):
        (tmp_path / name).mkdir()
        site = Site(tmp_path / name)
        with site.edge(**given):
            site.talk(2, drafter=drafter)
        turns = site.turns()
        assert beyond_new(turns[:1]) <= BLOCK
        assert beyond_new(turns) == turns[1].device.prompt - turns[1].device.new
        assert any("tokens beside its new ones" in sentence for sentence in missed_goals(turns, []))


@pytest.mark.parametrize(("sharing", "once"), [(PrefixSharing.ALL, True), (PrefixSharing.DEVICE, False)])
def test_a_system_prompt_that_devices_begin_with_at_once_is_computed_once(
    tmp_path: Path, sharing: PrefixSharing, once: bool
) -> None:
    site = Site(tmp_path)
    codec = GgufModel(site.target, vocabulary_only=True)
    system = ChatMessage("system", rules(lambda text: len(codec.encode(text)), tokens=500))
    prompts = [encode_chat(codec, [system, ChatMessage("user", f"{number}: why?")]) for number in range(8)]
    with site.edge(prefix_sharing=sharing):
        sessions = write_together(
            prompts,
            make_link=lambda name: MemoryLink(site.broker, name),
            fleet=FLEET,
            codec=codec,
            tokens=2,
        )
    codec.close()
    assert len(set(sessions)) == 8
    common = common_tokens(prompts)
    assert common >= 500
    found = Shared.of("llama.cpp", prompts, common=common, counts=counts_of(site.log, sessions).values())
    assert found.own == sum(map(len, prompts)) - 8 * common
    assert (found.computed <= found.allowed) is once
    assert (missed_goals([], [found]) == []) is once
    assert found.computed + found.reused == sum(map(len, prompts))


def spoken(turn: int, first_ms: float) -> Turn:
    written = Written(session="", turn=turn, prompt=9, new=9, computed=9, written=1, first_ms=first_ms)
    return Turn("packed", 0, alone=True, device=written, edge=SegmentCounters(prefill_tokens=8))


def test_the_last_turns_first_token_is_held_against_the_seconds() -> None:
    turns = [spoken(turn, ms) for turn, ms in ((1, 900.0), (2, 100.0), (2, 120.0), (2, 500.0), (3, 180.0))]
    assert first_ratio(turns) == pytest.approx(1.5)
    (sentence,) = missed_goals(turns, [])
    assert "1.50 times as long" in sentence
    assert first_ratio(turns[:2]) is None


def test_common_is_what_all_begin_with() -> None:
    assert common_tokens([[1, 2, 3], [1, 2, 4, 5], [1, 2]]) == 2
    assert common_tokens([[1], [2]]) == 0
