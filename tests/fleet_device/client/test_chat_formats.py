"""A device renders chats with the template of the target whose edge can serve the request."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet_device.client import chat_formats
from fleet_device.client.chat_formats import ChatFormats
from fleet_device.client.messaging import Inbox
from fleet_device.errors import EdgeUnavailable, InvalidRequest
from fleet_device.requests.chat import ConversationCodec, chat_prompt
from fleet_device.requests.structured import ChatMessage
from fleet_device.requests.template import ChatError
from schemas.control import ChatFormat, EdgeState, Presence, encode_json
from schemas.topics import Topic, build
from schemas.vocabulary import Vocabulary
from tests.support.letter_codec import LetterCodec
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_fleet import DRAFT, FLEET, edge_state
from tests.support.memory_link import MemoryLink

OWN = "own {{ messages[0].content }}"
CHAT = [ChatMessage("user", "hi")]
THEIRS = ChatFormat(template="{{ bos_token }}theirs {{ messages[0].content }}", bos="<b>", end_tokens=(3, 7))
OTHER = ChatFormat(template="other {{ messages[0].content }}")


class Site:
    def __init__(self, folder: Path) -> None:
        self.broker = MemoryBroker()
        self.link = MemoryLink(self.broker, "device-1")
        inbox = Inbox()
        self.codec = ConversationCodec(LetterCodec(OWN))
        vocabulary = Vocabulary.of(DRAFT.words)
        self.formats = ChatFormats(self.link, FLEET, inbox.edges, self.codec, vocabulary, folder)
        inbox.subscribe(self.link, fleet=FLEET, device="device-1")
        self.link.start(timeout_s=1.0)
        self.edges = MemoryLink(self.broker, "edges")
        self.edges.start(timeout_s=1.0)

    def publish(self, edge: str, payload: bytes) -> None:
        self.edges.publish(build(Topic.EDGE_CHAT, fleet=FLEET, edge=edge), payload, retain=True)

    def announce(self, edge: str, known: ChatFormat | str | None, **given: object) -> EdgeState:
        name = known.name if isinstance(known, ChatFormat) else known
        state = edge_state(edge=edge, chat_format=name, **{"presence": Presence.ONLINE, **given})
        self.edges.publish(build(Topic.EDGE_STATE, fleet=FLEET, edge=edge), encode_json(state), retain=True)
        self.broker.pump()
        return state

    def rendered(self) -> tuple[str, bytes | None, tuple[int, ...]]:
        codec = self.formats.codec(self.codec)
        text = b"".join(map(codec.piece, chat_prompt(codec, CHAT).tokens)).decode()
        return text, codec.target_id, codec.end_tokens


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(chat_formats, "_WAIT_S", 0.0)
    monkeypatch.setattr(chat_formats, "_FIRST_STATE_S", 0.0)
    return Site(tmp_path / "chat")


def test_the_targets_template_is_fetched_once_and_kept(site: Site, tmp_path: Path) -> None:
    site.publish("edge-1", encode_json(THEIRS))
    site.announce("edge-1", THEIRS)
    assert site.rendered() == ("<b>theirs hi", None, (3, 7))
    assert not [each for each in site.link._routes if "/chat" in each.filter]
    again = Site(tmp_path / "chat")
    assert again.rendered()[0] == "<b>theirs hi"  # that of the last request, before any edge is known
    again.announce("edge-1", THEIRS)  # whose format its broker does not have
    assert again.rendered()[0] == "<b>theirs hi"


@pytest.mark.parametrize("known", [None, "own"])
def test_without_a_template_of_the_target_or_with_the_same_one_the_drafts_is_used(
    site: Site, known: str | None
) -> None:
    assert site.formats.own_name is not None
    site.announce("edge-1", known and site.formats.own_name)
    assert site.rendered() == ("own hi", None, site.codec.end_tokens)
    assert not [each for each in site.link._routes if "/chat" in each.filter]


def test_the_template_of_the_last_request_is_used_before_an_edge_is_known(site: Site, tmp_path: Path) -> None:
    for edge, known in (("edge-1", THEIRS), ("edge-2", OTHER)):
        site.publish(edge, encode_json(known))
        site.announce(edge, known)
    for written_at, known in enumerate((THEIRS, OTHER)):
        os.utime(tmp_path / "chat" / f"{known.name}.json", (written_at, written_at))
    assert Site(tmp_path / "chat").rendered()[0] == "other hi"
    site.announce("edge-2", OTHER, presence=Presence.OFFLINE)
    assert site.rendered()[0] == "<b>theirs hi"
    assert Site(tmp_path / "chat").rendered()[0] == "<b>theirs hi"


@pytest.mark.parametrize("known", [THEIRS, ChatFormat(template=OWN, bos="<b>")], ids=["another", "same"])
def test_a_template_other_than_the_drafts_is_reported_once(
    site: Site, known: ChatFormat, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=chat_formats.__name__)
    site.publish("edge-1", encode_json(known))
    site.announce("edge-1", known)
    for _ in range(2):
        site.rendered()
    assert len(caplog.records) == (known is THEIRS)


def test_of_two_targets_each_request_names_the_one_that_it_is_rendered_for(site: Site) -> None:
    expected = {}
    for number, (known, text) in enumerate([(THEIRS, "<b>theirs hi"), (OTHER, "other hi"), (None, "own hi")]):
        if known is not None:
            site.publish(f"edge-{number}", encode_json(known))
        site.announce(f"edge-{number}", known, target_id=f"{number:016x}")
        expected[text] = number.to_bytes(8, "big")
    seen = {text: target for text, target, _ in (site.rendered() for _ in range(3))}
    assert seen == expected
    site.announce("edge-1", OTHER, target_id=f"{1:016x}", presence=Presence.OFFLINE)
    site.announce("edge-2", None, target_id=f"{2:016x}", presence=Presence.DRAINING)
    assert site.rendered()[:2] == ("<b>theirs hi", None)


def test_an_edge_whose_vocabulary_is_another_is_not_chosen(site: Site) -> None:
    site.publish("edge-1", encode_json(THEIRS))
    site.announce("edge-1", THEIRS, vocabulary="another", target_id=f"{1:016x}")
    site.announce("edge-2", None)
    assert {site.rendered()[:2] for _ in range(4)} == {("own hi", None)}


def test_a_prompt_without_a_template_needs_no_edge_and_names_none(site: Site) -> None:
    site.announce("edge-1", THEIRS, target_id=f"{1:016x}")
    site.announce("edge-2", None)
    codec = site.formats.codec(site.codec)
    codec.encode("hi")
    assert codec.target_id is None
    assert codec.end_tokens == site.codec.end_tokens


@pytest.mark.parametrize(
    "payload",
    [b"", b"{}", b'{"template": ""}', encode_json(OTHER), b"\xff", b"[" * 100_000, b" " * (1 << 19)],
    ids=["nothing", "empty", "no-template", "another", "no-text", "deep", "long"],
)
def test_another_message_than_the_state_names_is_ignored(site: Site, tmp_path: Path, payload: bytes) -> None:
    site.publish("edge-1", payload)
    site.announce("edge-1", THEIRS)
    with pytest.raises(EdgeUnavailable):
        site.rendered()
    assert not (tmp_path / "chat").exists()
    site.publish("edge-1", encode_json(THEIRS))
    site.broker.pump()
    assert site.rendered()[0] == "<b>theirs hi"


@pytest.mark.parametrize("payload", [b'{"template": "', b"x" * (1 << 18 | 1)])
def test_a_message_that_has_the_right_hash_and_is_none_is_ignored(site: Site, payload: bytes) -> None:
    site.announce("edge-1", chat_formats.chat_format_name(payload))
    site.publish("edge-1", payload)
    site.broker.pump()
    with pytest.raises(EdgeUnavailable):
        site.rendered()


def test_a_hostile_template_runs_in_the_sandbox(site: Site) -> None:
    hostile = ChatFormat(template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    site.publish("edge-1", encode_json(hostile))
    site.announce("edge-1", hostile)
    with pytest.raises(ChatError):
        site.rendered()


def test_many_edges_with_many_formats_fetch_and_keep_a_few(site: Site, tmp_path: Path) -> None:
    formats = [ChatFormat(template=f"{number}") for number in range(100)]
    for number, each in enumerate(formats):
        site.announce(f"edge-{number}", each)
    assert len([each for each in site.link._routes if each.filter.endswith("/chat")]) == chat_formats._KEPT
    for number, each in enumerate(formats):
        site.publish(f"edge-{number}", encode_json(each))
        site.broker.pump()
        site.announce(f"edge-{number}", each)
    assert len(list((tmp_path / "chat").iterdir())) <= chat_formats._KEPT


def test_a_damaged_file_is_fetched_again(site: Site, tmp_path: Path) -> None:
    site.publish("edge-1", encode_json(THEIRS))
    site.announce("edge-1", THEIRS)
    (file,) = (tmp_path / "chat").iterdir()
    file.write_bytes(b"damaged")
    again = Site(tmp_path / "chat")
    assert again.rendered()[0] == "own hi"
    again.publish("edge-1", encode_json(THEIRS))
    again.announce("edge-1", THEIRS)
    assert again.rendered()[0] == "<b>theirs hi"
    assert file.read_bytes() == encode_json(THEIRS)


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self/mem").exists(), reason="needs a path that is no folder")
def test_without_a_place_for_files_it_is_kept_in_memory(site: Site) -> None:
    site.formats.folder = Path("/proc/self/mem/chat")
    site.publish("edge-1", encode_json(THEIRS))
    site.announce("edge-1", THEIRS)
    assert site.rendered()[0] == "<b>theirs hi"


def test_a_request_that_names_a_target_is_for_its_edges_alone(site: Site) -> None:
    small, large = bytes(8), bytes([1] * 8)
    site.announce("edge-1", None, target="small", target_id=small.hex())
    site.announce("edge-2", None, target="large", target_id=large.hex())

    def chosen(name: str, *, any_name: bool = False) -> bytes | None:
        return site.formats.codec(site.codec, name, any_name=any_name).target_id

    assert (chosen(""), chosen("small"), chosen("large")) == (None, small, large)
    site.announce("edge-2", None, target="large", target_id=large.hex(), presence=Presence.OFFLINE)
    assert chosen("large", any_name=True) == large  # it waits for one
    with pytest.raises(InvalidRequest) as unknown:
        chosen("huge", any_name=True)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")


def test_where_all_edges_have_one_target_an_application_may_write_any_name(site: Site) -> None:
    site.announce("edge-1", None, target="small", target_id=bytes(8).hex())
    assert site.formats.codec(site.codec, "gpt", any_name=True).target_id is None
    with pytest.raises(InvalidRequest):
        _ = site.formats.codec(site.codec, "gpt").target_id


def test_a_target_that_no_edge_has_loaded_yet_is_not_chosen(site: Site) -> None:
    site.announce("edge-1", None, target="small", target_id=None)
    with pytest.raises(EdgeUnavailable):
        _ = site.formats.codec(site.codec, "small").target_id
