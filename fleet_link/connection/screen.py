"""Screen of incoming MQTT packets: drops messages that nobody wants before anything of them is decoded.

A message costs the MQTT library 30 to 60 µs before it reaches the first line of ours. A screen walks the packets in the
bytes as they come and asks about every PUBLISH; what is refused is acknowledged here and goes no further, the rest is
handed on as it came. No socket and no clock are in here: bytes in, bytes out.

Acknowledgements leave in the order in which the messages came (MQTT 5, 4.6): some brokers end a connection over one
that is out of turn. So that of a refused message waits for those of the accepted messages before it, which the library
writes once it has dispatched them.
"""

from collections import deque
from typing import Final

from fleet_link.counters import Accepts, Guard

__all__ = ["PUBACK", "BrokenStream", "Screen"]

PUBLISH: Final = 0x30
PUBACK: Final = 0x40
TYPE: Final = 0xF0
RETAIN: Final = 0x01
QOS_1: Final = 0x02
QOS_2: Final = 0x04
TOPIC_LENGTH: Final = 2  # bytes
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

    Attributes:
        accepts: As above.
        passed: Packets handed on.
        owed: Acknowledgements to write: whole packets.
    """

    def __init__(self, *, max_packet_bytes: int, accepts: Accepts | None = None, guard: Guard | None = None) -> None:
        self.accepts = accepts
        self.passed = 0
        self._guard = guard if guard is not None else Guard()
        self.owed = bytearray()
        self._max_packet_bytes = max_packet_bytes
        self._head = b""  # of a packet of which too little has come to judge it
        self._rest = 0  # bytes still to come of one that was judged
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
        start = at if self._dropping else 0  # what was kept begins here
        self._head = b""
        kept = []
        while at < end:
            after, dropped = self._judge(data, at, end)
            if not after:
                self._head = data[at:]
                break
            if dropped:
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

    def _judge(self, data: bytes, at: int, end: int) -> tuple[int, bool]:
        """Return where the packet that begins at `at` ends, 0 if too little of it has come, and whether to drop it."""
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
        # We subscribe at QoS 1 at most; what is neither 0 nor 1 is for the library to judge.
        dropped = False
        if data[at] & (TYPE | QOS_2) == PUBLISH and length >= TOPIC_LENGTH:
            judged = self._refuses(data, at, body, after)
            if judged is None:
                return 0, False
            dropped = judged
        if not dropped:
            self.passed += 1
        return after, dropped

    def _refuses(self, data: bytes, at: int, body: int, after: int) -> bool | None:
        """Return whether a PUBLISH is refused, None if too little of it has come; note what is owed for it."""
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
            if identifier_end > name_end:
                self._handed_on += 1
            return False
        self._guard.counters.screened += 1
        if identifier_end > name_end:
            self._owe(_PUBACK_HEAD + data[name_end:identifier_end])
        return True

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
