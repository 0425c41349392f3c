import logging
from collections.abc import Iterator

import pytest

from fleet_edge.batching.warm_prompts import WarmPrompts
from fleet_edge.settings import PrefixSharing
from fleet_edge.verifiers.contract import Item, KeptPrefix
from fleet_edge.verifiers.prefix_cache import WARM, PrefixCache
from tests.fleet_edge.test_orchestrator import opened
from tests.support.memory_fleet import MemoryFleet
from tests.support.scheduled_edge import SCRIPT, Edge
from tests.support.scripted_verifier import ScriptedVerifier

SYSTEM = tuple(1 + place * place % 8 for place in range(500))


def work(warm: WarmPrompts, *, chunks: int = 1 << 20) -> int:
    """Compute chunks, as many as there are at most; return their number."""
    for number in range(chunks):
        chunk = warm.next_chunk(brief=True)
        if chunk is None:
            return number
        chunk()
    return chunks


def known(edge: Edge, tokens: tuple[int, ...], owner: str = "device-9") -> int:
    return edge.scheduler._verifier.known(tokens, owner=owner, stable=False)


@pytest.mark.parametrize("sharing", [PrefixSharing.DEVICE, PrefixSharing.ALL])
def test_devices_share_what_was_computed_ahead(sharing: PrefixSharing) -> None:
    edge = Edge(sharing=sharing)
    edge.scheduler.warm.add([SYSTEM])
    assert work(edge.scheduler.warm) == -(-len(SYSTEM) // 16)
    sessions = [edge.session(prompt=(*SYSTEM, *range(1, 4 + number)), device=f"device-{number}") for number in range(3)]
    edge.run()
    assert [session.counters.reused_tokens for session in sessions] == [500, 500, 500]
    for session in sessions:
        edge.sessions.remove(session)
        edge.scheduler.forget(session)
    assert known(edge, (*SYSTEM, 9)) == 500, "it is not given away"


def test_one_device_does_not_share_with_another_because_of_it() -> None:
    edge = Edge(sharing=PrefixSharing.DEVICE)
    edge.scheduler.warm.add([SYSTEM])
    work(edge.scheduler.warm)
    mine = (*SYSTEM, *(2, 3, 4, 5) * 30)
    edge.session(prompt=mine, device="device-1")
    edge.run()
    assert known(edge, (*mine, 1), owner="device-1") > 600
    assert known(edge, (*mine, 1), owner="device-2") == 500


def test_it_is_evicted_last() -> None:
    edge = Edge(sharing=PrefixSharing.DEVICE, kv_tokens=1200)
    edge.scheduler.warm.add([SYSTEM])
    work(edge.scheduler.warm)
    for number in range(8):
        session = edge.session(prompt=(1 + number, *(7,) * 300), device=f"device-{number}")
        edge.run()
        edge.sessions.remove(session)
        edge.scheduler.forget(session)
        assert known(edge, (*SYSTEM, 9)) == 500
    edge.session(prompt=(8,) * 1100)
    edge.run()
    assert known(edge, (*SYSTEM, 9)) == 0, "a session needs the room"


def test_a_session_takes_the_room_of_a_prompt_that_is_being_computed() -> None:
    edge = Edge(sharing=PrefixSharing.DEVICE, kv_tokens=600)
    edge.scheduler.warm.add([SYSTEM])
    work(edge.scheduler.warm, chunks=20)
    session = edge.session(prompt=(8,) * 550)
    edge.run()
    assert edge.scheduler._verifier.computed(session.handle) == 549
    edge.sessions.remove(session)
    edge.scheduler.forget(session)
    work(edge.scheduler.warm)
    assert known(edge, (*SYSTEM, 9)) == 500


def test_what_does_not_fit_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    edge = Edge(sharing=PrefixSharing.DEVICE, kv_tokens=400)
    edge.scheduler.warm.add([SYSTEM])
    with caplog.at_level(logging.WARNING):
        work(edge.scheduler.warm)
    assert "kv_bytes" in caplog.text
    assert edge.scheduler.warm.left == 0


def test_after_a_restart_only_what_is_missing_is_computed() -> None:
    cache = PrefixCache(ScriptedVerifier(SCRIPT, SCRIPT.words), sharing=PrefixSharing.DEVICE)
    cache.open(1)
    cache.expect(1, SYSTEM[:400], owner=WARM)
    cache.score([Item(1, SYSTEM[:400], 0)])
    cache.close(1)
    warm = WarmPrompts(cache)
    warm.add([SYSTEM])
    assert work(warm) == -(-100 // 16)
    assert cache.retained_tokens == 500


class DeletableVerifier(ScriptedVerifier):
    """Keeps prefixes for a next start, until somebody deletes them."""

    is_forgotten = False

    def restore(self, _keys: Iterator[int], **_options: float) -> list[KeptPrefix]:
        return []

    def own(self, sequence: int, owner: str) -> None:
        """Do nothing."""

    def erase_free(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize("chunks", [3, 1 << 20], ids=["being computed", "computed"])
def test_after_a_deletion_they_are_computed_again_at_once(chunks: int) -> None:
    verifier = DeletableVerifier(SCRIPT, SCRIPT.words)
    edge = Edge(verifier=verifier, sharing=PrefixSharing.DEVICE)
    edge.scheduler.warm.add([SYSTEM])
    session = edge.session(prompt=(8,) * 100, device="device-1")
    edge.run()
    edge.sessions.remove(session)
    edge.scheduler.forget(session)
    work(edge.scheduler.warm, chunks=chunks)
    verifier.is_forgotten = True
    edge.scheduler.expire_prefixes()
    assert known(edge, (*(8,) * 100, 1), owner="device-1") == 0
    assert edge.scheduler.warm.left == 1
    work(edge.scheduler.warm)
    edge.scheduler.expire_prefixes()
    edge.session(prompt=(7,) * 30)
    assert known(edge, (*SYSTEM, 9)) == 500, "it stays, though what devices leave is dropped from now on"
    assert edge.scheduler.warm.left == 0


def test_an_idle_edge_computes_ahead_and_sessions_come_first() -> None:
    fleet = MemoryFleet()
    device = opened(fleet, 1)
    warm = fleet.edge.scheduler.warm
    warm.add([SYSTEM[:20], SYSTEM[:48]])
    device.act()
    fleet.broker.pump()
    assert fleet.step()
    fleet.broker.pump()
    assert device.messages, "its draft is verified at once"
    assert warm.left == 2
    while fleet.step():
        pass
    assert warm.left == 0
