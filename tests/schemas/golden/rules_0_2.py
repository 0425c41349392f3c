"""How release 0.2 reads messages: as 0.1 does, and when to ask again after a refusal or a fault."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from tests.schemas.golden import rules_0_1 as before

__all__ = ["READERS"]

_RETRY_S: Final = before._maybe(before._real(0.0))
_REFUSAL: Final = before._word(
    *("malformed", "protocol", "vocabulary-mismatch", "prompt-empty", "prompt-too-long", "token-out-of-vocabulary"),
    *("max-new-tokens", "busy", "draining", "over-quota", "fenced"),
    otherwise="other",
)
_FAULT: Final = before._word(
    *("malformed", "unknown-session", "desync", "draft-too-long", "token-out-of-vocabulary", "counts", "over-quota"),
    *("round", "internal"),
    otherwise="other",
)
_CHANGED: Final[Mapping[str, Mapping[str, before.Check]]] = {
    "refused": {"code": _REFUSAL, "retry_s": _RETRY_S},
    "fault": {
        "code": _FAULT,
        "action": before._word("resume", "wait", "give-up", otherwise="give-up"),
        "retry_s": _RETRY_S,
    },
}


def _read_reply(payload: bytes) -> Any:
    value = before._cbor(payload, 16 << 10)
    kind = value.get("kind") if type(value) is dict else None
    if kind not in _CHANGED:
        return before.READERS["reply"](payload)
    known, optional = before._MAPS[kind]
    return {
        "kind": kind,
        **before._map(value, {**known, **_CHANGED[kind]}, optional={**optional, "retry_s": None}),
    }


READERS: Final[Mapping[str, Callable[[bytes], Any]]] = {**before.READERS, "reply": _read_reply}
"""From a payload to its fields, by the kind that 0.2.toml gives as `reads`. They raise `Unreadable`."""
