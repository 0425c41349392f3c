"""Screen of incoming MQTT packets: drops messages that nobody wants, and takes the others before the library does.

A message costs the MQTT library 30 to 60 µs before it reaches the first line of ours, and an acknowledgement nearly as
much. A screen walks the packets in the bytes as they come and asks about every PUBLISH: what is refused is acknowledged
here and goes no further; what is accepted, whole and well formed is told from here, and so are acknowledgements. The
rest is handed on to the library as it came, and with it the messages behind it, so that all stay in order. No socket
and no clock are in here: bytes in, bytes out.

Acknowledgements leave in the order in which the messages came (MQTT 5, 4.6): some brokers end a connection over one
that is out of turn. So that of a refused message waits for those of the accepted messages before it, which the library
writes once it has dispatched them.
"""

from collections import deque
from collections.abc import Callable
from typing import Final

from fleet_common.mqtt.counters import Accepts, Guard
from fleet_common.mqtt.link import Message

PUBLISH: Final = 0x30
PUBACK: Final = 0x40
TYPE: Final = 0xF0
RETAIN: Final = 0x01
QOS_1: Final = 0x02
QOS_2: Final = 0x04
TOPIC_LENGTH: Final = 2  # bytes
IDENTIFIER: Final = 2
MORE: Final = 0x80  # of a variable byte integer
MAX_LENGTH_BYTES: Final = 4
MAX_OWED_BYTES: Final = 4 * 65_535  # a PUBACK for every packet identifier
_PUBACK_HEAD: Final = b"\x40\x02"


class BrokenStream(Exception):  # noqa: N818 - reads as what it says
    """What came is no MQTT, or more than was agreed. Its text says how."""


class Screen:
    """The screen of one connection. Belongs to the link's thread.

    Args:
        max_packet_bytes: Largest packet that we take, as our CONNECT says.
        accepts: Asked for every PUBLISH; None lets all pass.
        guard: Of the link: counts what is dropped, and survives what `accepts` raises.
        on_message: Told what is accepted, QoS 0 and 1; MUST NOT raise. None leaves it to the library.
        on_answer: Told packet identifier and reason code of what the broker has acknowledged, of QoS 1; MUST NOT raise.
            None leaves it to the library.

    Attributes:
        accepts: As above.
        passed: Packets told or handed on.
        owed: Acknowledgements to write: whole packets.
        within: Whether what came last was all of one packet that has not ended: a large one on a slow line.
    """

    def __init__(
        self,
        *,
        max_packet_bytes: int,
        accepts: Accepts | None = None,
        guard: Guard | None = None,
        on_message: Callable[[Message], None] | None = None,
        on_answer: Callable[[int, int], None] | None = None,
    ) -> None:
        self.accepts = accepts
        self._on_message = on_message
        self._on_answer = on_answer
        self.passed = 0
        self._guard = guard if guard is not None else Guard()
        self.owed = bytearray()
        self._max_packet_bytes = max_packet_bytes
        self._head = b""  # of a packet of which too little has come to judge it
        self._rest = 0  # bytes still to come of one that was judged
        self.within = False
        self._dropping = False  # whether those are dropped
        self._behind: deque[tuple[int, bytearray]] = deque()  # what is owed after so many of the library's answers
        self._handed_on = 0  # messages of QoS 1, which the library answers
        self._answered = 0  # those that it has

    @property
    def dropped(self) -> int:
        """Messages dropped, over all connections of the link."""
        return self._guard.counters.screened

    def feed(self, data: bytes) -> bytes:
        """Take what came and return what of it is for the library.

        Raises:
            BrokenStream: The connection must end.
        """
        data = self._head + data
        end = len(data)
        at = self._rest  # where the next packet begins
        self.within = at > end
        start = at if self._dropping else 0  # what was kept begins here
        self._head = b""
        kept: list[bytes] = []
        while at < end:
            after, taken = self._judge(data, at, end, first=start == at and not kept)
            if not after:
                self._head = data[at:]
                break
            if taken:
                if start < at:
                    kept.append(data[start:at])
                start = after
            at = after
        self._rest = max(0, at - end)
        self._dropping = start > end
        if start < min(at, end):
            kept.append(data[start:at])
        if len(self.owed) > MAX_OWED_BYTES:
            raise BrokenStream("the broker sends messages without waiting for their acknowledgements")
        return kept[0] if len(kept) == 1 else b"".join(kept)

    def answered(self, puback: bytes) -> None:
        """Take an acknowledgement that the library writes, into its place among ours."""
        self.owed += puback
        self._answered += 1
        while self._behind and self._behind[0][0] <= self._answered:
            self.owed += self._behind.popleft()[1]

    def _judge(self, data: bytes, at: int, end: int, *, first: bool) -> tuple[int, bool]:
        """Return where the packet at `at` ends, 0 if too little of it has come, and whether it is done with.

        Args:
            data: What has come.
            at: Where the packet begins.
            end: Of the data.
            first: Whether nothing before it waits for the library.
        """
        if at + 1 >= end:
            return 0, False
        length, body = data[at + 1], at + 2
        if length & MORE:
            length, body = _length(data, at + 1)
            if not body:
                return 0, False
        after = body + length
        if after - at > self._max_packet_bytes:
            raise BrokenStream(f"the broker sent a packet of {after - at} bytes, more than was agreed")
        taken = False
        kind = data[at] & TYPE
        # We subscribe at QoS 1 at most; what is neither 0 nor 1 is for the library to judge.
        if kind == PUBLISH and not data[at] & QOS_2 and length >= TOPIC_LENGTH:
            judged = self._judge_message(data, at, body, after, first=first)
            if judged is None:
                return 0, False
            taken = judged
        elif kind == PUBACK and self._on_answer is not None and length >= IDENTIFIER:
            if after > end:
                return 0, False
            reason = data[body + IDENTIFIER] if length > IDENTIFIER else 0
            self._on_answer(data[body] << 8 | data[body + 1], reason)
            self.passed += 1
            return after, True
        if not taken:
            self.passed += 1
        return after, taken

    def _judge_message(self, data: bytes, at: int, body: int, after: int, *, first: bool) -> bool | None:
        """Return whether a PUBLISH is done with, None if too little of it has come; note what is owed for it."""
        name = body + TOPIC_LENGTH
        if name > len(data):
            return None
        name_end = name + (data[body] << 8 | data[body + 1])
        identifier_end = name_end + (data[at] & QOS_1)  # its bit has the value of the identifier's bytes
        if identifier_end > after:
            return False  # malformed: the library says so
        if identifier_end > len(data):
            return None
        retained = bool(data[at] & RETAIN)
        accepts = self.accepts
        if accepts is None or self._guard.ask(accepts, data[name:name_end], after - at, retained=retained):
            message = self._message(data, name, name_end, identifier_end, after, retained) if first else None
            if message is None:
                if identifier_end > name_end:
                    self._handed_on += 1
                return False
            assert self._on_message is not None
            self._on_message(message)
            self.passed += 1
        else:
            self._guard.counters.screened += 1
        if identifier_end > name_end:
            self._owe(_PUBACK_HEAD + data[name_end:identifier_end])
        return True

    def _message(
        self, data: bytes, name: int, name_end: int, properties: int, after: int, retained: bool
    ) -> Message | None:
        """Return the message of a PUBLISH, or None if the library is to judge it."""
        if self._on_message is None or after > len(data) or name == name_end:
            return None
        if properties >= after:
            return None
        length, begins = data[properties], properties + 1
        if length & MORE:
            length, begins = _length(data[:after], properties)
            if not begins:
                return None
        payload = begins + length
        if payload > after:
            return None
        try:
            topic = data[name:name_end].decode()
        except UnicodeDecodeError:
            return None
        return Message(topic, data[payload:after], retained)

    def _owe(self, puback: bytes) -> None:
        if self._handed_on == self._answered:
            self.owed += puback
        elif self._behind and self._behind[-1][0] == self._handed_on:
            self._behind[-1][1].extend(puback)
        else:
            self._behind.append((self._handed_on, bytearray(puback)))


def _length(data: bytes, at: int) -> tuple[int, int]:
    """Return the variable byte integer at `at` and where it ends; zeros if it has not come whole.

    Raises:
        BrokenStream: It has more bytes than MQTT allows.
    """
    length = 0
    for place, byte in enumerate(data[at : at + MAX_LENGTH_BYTES]):
        length |= (byte & ~MORE) << 7 * place
        if not byte & MORE:
            return length, at + place + 1
    if len(data) - at >= MAX_LENGTH_BYTES:
        raise BrokenStream("the broker sent a packet whose length is not MQTT")
    return 0, 0
