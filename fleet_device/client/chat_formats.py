"""Chat templates of the target models: taken from the edges once, kept by their hash, and chosen for each request.

A device's draft model has a chat template too, but its output follows the target model, which was trained with another
one if they are of different families. What an edge sends is the program of somebody else, as is the template in a
model's file: it is rendered in the same bounded process.
"""

import logging
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from fleet_common.host import write_atomically
from fleet_common.mqtt.link import Link, Message
from fleet_device.client.messaging import EdgePresences
from fleet_device.drafters.contract import TextCodec, control_texts_with
from fleet_device.errors import EdgeUnavailable, InvalidRequest
from schemas.control import MAX_CHAT_FORMAT_BYTES, ChatFormat, EdgeState, Presence, chat_format_name, decode_json
from schemas.errors import CodecError, FleetError
from schemas.printable import printable_line
from schemas.topics import Topic, build
from schemas.vocabulary import Vocabulary

_log = logging.getLogger(__name__)

_KEPT: Final = 16
"""Chat formats on disk, and those that are fetched at a time: a fleet has one or two targets."""

_FIRST_STATE_S: Final = 1.0
"""Wait of the first request for the states of edges, which the broker sends right after the connection is up."""

_WAIT_S: Final = 10.0
"""Wait for the chat format of an edge; the broker has it, since it is published before the edge's state."""

_FILE: Final = re.compile(r"[0-9a-f]+\.json")


@dataclass(frozen=True, slots=True)
class ChosenFormat:
    """The chat format of a request: None for the draft model's own.

    `target_id` is set if the request names a target, or edges with other formats are online: an edge with this target
    must serve the request.
    """

    format: ChatFormat | None = None
    target_id: bytes | None = None


@dataclass(slots=True)
class ChatFormats:
    """The chat formats of the edges. `folder` keeps them; None where there is no place for files."""

    link: Link
    fleet: str
    edges: EdgePresences
    own: TextCodec
    vocabulary: Vocabulary
    folder: Path | None
    own_name: str | None = field(init=False)
    _known: dict[str, ChatFormat] = field(default_factory=dict)
    _fetching: dict[str, str] = field(default_factory=dict)  # topics, by the hash
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _turns: "count[int]" = field(default_factory=count)
    _reported: set[str] = field(default_factory=set)
    _waited: bool = False

    def __post_init__(self) -> None:
        self.own_name = _name_of(self.own)
        self.edges.on_state = self.note_state

    def note_state(self, edge: str, state: EdgeState) -> None:
        """Fetch the chat format of an edge unless it is here. Called on the link's thread."""
        name = state.chat_format
        if name is None or name == self.own_name:
            return
        topic = build(Topic.EDGE_CHAT, fleet=self.fleet, edge=edge)
        with self._changed:
            if name in self._known or topic in self._fetching.values() or len(self._fetching) >= _KEPT:
                return
            if (kept := self._read(name)) is not None:
                self._add(name, kept)
                return
            self._fetching[name] = topic
        self.link.subscribe(topic, self._receive)

    def codec(self, codec: TextCodec, target: str = "", *, any_name: bool = False) -> "ChatCodec":
        """Return a codec for one request, which chooses a chat format when it needs one; that may take seconds.

        `target` names the only target that may serve it; rendering raises InvalidRequest if no edge has had that one.
        With `any_name` an unknown name has no effect as long as all edges have the same target.
        """
        return ChatCodec(codec, self._choose, _Wanted(target, any_name=any_name))

    def _receive(self, message: Message) -> None:
        name = chat_format_name(message.payload)
        with self._changed:
            if self._fetching.get(name) != message.topic:
                return  # of an earlier run of the edge; its new one follows
            try:
                self._add(name, decode_json(ChatFormat, message.payload))
            except CodecError as error:
                _log.warning("The chat template on %s is ignored: %s", message.topic, error)
                return
            del self._fetching[name]
            self._write(name, message.payload)
        self.link.unsubscribe(message.topic)

    def _add(self, name: str, chat_format: ChatFormat) -> None:
        if len(self._known) >= _KEPT:
            del self._known[next(iter(self._known))]
        self._known[name] = chat_format
        self._changed.notify_all()

    def _choose(self, wanted: "_Wanted") -> ChosenFormat:
        if not self._waited and self.link.connected:
            self._waited = True
            self.edges.wait_known(_FIRST_STATE_S)
        names, target = self.edges.targets(), wanted.target
        if wanted.any_name and target not in names and len(names) <= 1:
            target = ""
        known = [state for state in self.edges.known() if target in ("", state.target)]
        edges = [state for state in known if state.presence is Presence.ONLINE] or known
        if target or not self.edges.online():
            edges = [state for state in edges if state.target_id]
        if target and not edges:
            raise self._unknown(target, names)
        served = [state for state in edges if state.vocabulary == str(self.vocabulary)] or list(edges)
        if not served:
            return ChosenFormat(self._last_used())
        state = served[next(self._turns) % len(served)]
        differ = bool(target) or len({each.chat_format for each in served}) > 1
        target_id = bytes.fromhex(state.target_id) if differ and state.target_id else None
        return ChosenFormat(self._format_of(state), target_id)

    def _unknown(self, target: str, names: Sequence[str]) -> FleetError:
        if target in names:
            return EdgeUnavailable(f"No edge has loaded the target model {target!r} yet; ask again when one has.")
        return InvalidRequest(
            f"No edge of fleet {self.fleet!r} has a target model {printable_line(target)!r}; "
            f"there are: {', '.join(names) or 'none'}.",
            param="model",
            code="model_not_found",
        )

    def _format_of(self, state: EdgeState) -> ChatFormat | None:
        name = state.chat_format
        if name is None or name == self.own_name:
            return None
        with self._changed:
            if not self._changed.wait_for(lambda: name in self._known, _WAIT_S):
                raise EdgeUnavailable(
                    f"The chat template of edge {state.edge!r} has not come within {_WAIT_S:g} s; check that the "
                    "broker's access rules are of this release, or send a plain prompt."
                )
            found = self._known[name]
            self._report(name, state, found)
        if self.folder is not None:
            with suppress(OSError):
                (self.folder / f"{name}.json").touch()
        return found

    def _report(self, name: str, state: EdgeState, found: ChatFormat) -> None:
        if name not in self._reported and found.template != self.own.chat_template:
            _log.info("Chats are rendered with the template of target %s: the draft model's differs.", state.target)
        self._reported.add(name)

    # On disk

    def _files(self) -> list[Path]:
        """Return the kept files, the last used first."""
        if self.folder is None:
            return []
        with suppress(OSError):
            files = [path for path in self.folder.iterdir() if _FILE.fullmatch(path.name)]
            return sorted(files, key=lambda path: -path.stat().st_mtime)
        return []

    def _last_used(self) -> ChatFormat | None:
        return next((found for path in self._files() if (found := self._read(path.stem)) is not None), None)

    def _read(self, name: str) -> ChatFormat | None:
        if self.folder is None:
            return None
        try:
            with (self.folder / f"{name}.json").open("rb") as file:
                payload = file.read(MAX_CHAT_FORMAT_BYTES + 1)
            return decode_json(ChatFormat, payload) if chat_format_name(payload) == name else None
        except (OSError, CodecError):
            return None  # it is fetched again

    def _write(self, name: str, payload: bytes) -> None:
        if self.folder is None:
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(self.folder / f"{name}.json", payload)
            for path in self._files()[_KEPT:]:
                path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("The chat template of an edge cannot be kept in %s: %s.", self.folder, error.strerror or error)


def _name_of(codec: TextCodec) -> str | None:
    try:
        return ChatFormat(
            template=codec.chat_template or "",
            bos=codec.special_text("bos"),
            eos=codec.special_text("eos"),
            end_tokens=tuple(sorted(codec.end_tokens)),
        ).name
    except ValidationError:
        return None


@dataclass(frozen=True, slots=True)
class _Wanted:
    target: str
    any_name: bool


class ChatCodec:
    """`TextCodec` of one request over the device's, with the chat format of the target model."""

    def __init__(self, codec: TextCodec, choose: Callable[[_Wanted], ChosenFormat], wanted: _Wanted) -> None:
        self._codec, self._choose, self._wanted = codec, choose, wanted
        self.encode, self.piece = codec.encode, codec.piece

    @cached_property
    def _choice(self) -> ChosenFormat:
        return self._choose(self._wanted)

    @property
    def target_id(self) -> bytes | None:
        """Identity of the target that the prompt was rendered for, if not every edge can serve it."""
        return self._choice.target_id if self._wanted.target or "_choice" in vars(self) else None

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The target's once a chat was rendered for it, else the draft model's."""
        chosen = vars(self).get("_choice", ChosenFormat()).format
        return chosen.end_tokens if chosen is not None and chosen.end_tokens else self._codec.end_tokens

    @property
    def chat_template(self) -> str | None:
        chosen = self._choice.format
        return self._codec.chat_template if chosen is None else chosen.template

    @property
    def control_texts(self) -> tuple[str, ...]:
        chosen = self._choice.format
        return self._codec.control_texts if chosen is None else control_texts_with(self._codec, chosen.template)

    def special_text(self, name: str) -> str:
        chosen = self._choice.format
        if chosen is None:
            return self._codec.special_text(name)
        return {"bos": chosen.bos, "eos": chosen.eos}[name]
