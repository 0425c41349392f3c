"""How release 0.2 reads messages: as 0.1 does, and when to ask again after a refusal or a fault."""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from tests.schemas.golden import rules_0_1 as before

__all__ = ["READERS"]

_RETRY_S: Final = before._maybe(before._real(0.0))
_REFUSAL: Final = before._word(
    *("malformed", "protocol", "vocabulary-mismatch", "prompt-empty", "prompt-too-long", "token-out-of-vocabulary"),
    *("max-new-tokens", "busy", "draining", "over-quota", "logprobs", "fenced", "grammar"),
    otherwise="other",
)
_FAULT: Final = before._word(
    *("malformed", "unknown-session", "desync", "draft-too-long", "token-out-of-vocabulary", "counts", "over-quota"),
    *("round", "internal"),
    otherwise="other",
)
_TIMES: Final = ("writing_ms", "step_ms", "text_ms", "token_ms")


def _load(value: Any) -> Any:
    if value is None:
        return None
    before._need(type(value) is list and len(value) >= 7, "not a load")
    texts, *times, acceptance, free = value[:7]
    known = zip(_TIMES, map(before._maybe(before._MS), times), strict=True)
    return {
        "texts": before._whole(1, 1 << 16)(texts),
        **dict(known),
        "acceptance": before._maybe(before._real(0.0, 1.0))(acceptance),
        "free": before._whole(0, 65)(free),
    }


_CHANGED: Final[Mapping[str, Mapping[str, before.Check]]] = {
    "refused": {"code": _REFUSAL, "retry_s": _RETRY_S},
    "fault": {
        "code": _FAULT,
        "action": before._word("resume", "wait", "give-up", otherwise="give-up"),
        "retry_s": _RETRY_S,
    },
    "opened": {
        "logprobs": before._whole(0, 21),
        "load": _load,
    },
    "closed": {"reused": before._U32},
}
_ADDED: Final = {
    "refused": ("retry_s",),
    "fault": ("retry_s",),
    "opened": ("logprobs", "load"),
    "closed": ("reused",),
}


def _read_reply(payload: bytes) -> Any:
    value = before._cbor(payload, 16 << 10)
    kind = value.get("kind") if type(value) is dict else None
    if kind not in _CHANGED:
        return before.READERS["reply"](payload)
    known, optional = before._MAPS[kind]
    return {
        "kind": kind,
        **before._map(value, {**known, **_CHANGED[kind]}, optional={**optional, **dict.fromkeys(_ADDED[kind])}),
    }


def _grammar(value: Any) -> Any:
    before._need(type(value) is dict and set(value) <= {"kind", "text"}, "not a grammar that can be understood")
    before._need(value.get("kind") in ("json-schema", "json-object", "regex", "lark"), "an unknown kind of grammar")
    text = value.get("text", "")
    before._need(type(text) is str and len(text.encode()) <= 1 << 16, "too large a grammar")
    return {"kind": value["kind"], "text": text}


def _read_open(payload: bytes) -> Any:
    value = before._cbor(payload, 1 << 20)
    held = value.get("policy") if type(value) is dict and value.get("kind") == "open" else None
    before._need(type(value) is dict and value.get("kind") == "open", "no Open")
    known, optional = before._MAPS["open"]
    known = {**known, "logprobs": _TOP, "app": _app}
    optional = {**optional, "logprobs": None, "app": None}
    if type(held) is not dict or "grammar" not in held:
        return {"kind": "open", **before._map(value, known, optional=optional)}

    def policy(found: Any) -> Any:
        rest = {name: each for name, each in found.items() if name != "grammar"}
        return before._policy(rest) | {"grammar": _grammar(found["grammar"])}

    return {"kind": "open", **before._map(value, {**known, "policy": policy}, optional=optional)}


_WRITE: Final = before._maybe(before._whole(0, (1 << 17) + 1))
_BASE: Final = before._maybe(before._POSITION)
_CHAINED: Final = before._maybe(before._whole(1, 4097))
_WRITTEN: Final = before._maybe(before._ids(1 << 17))
_TOP: Final = before._whole(0, 21)


def _app(value: Any) -> str:
    before._need(type(value) is str and 0 < len(value) <= 40, "no name of an application")
    return str(before._LABEL(value))


def _floats(value: Any) -> list[float]:
    before._need(type(value) is tuple and value[0] == 85, "not a typed array of float32")
    return list(value[1])


def _logprobs(value: Any) -> Any:
    if value is None:
        return None
    before._need(type(value) is list and len(value) >= 3, "not log-probabilities")
    own, ids, values = _floats(value[0]), before._ids(1 << 18)(value[1]), _floats(value[2])
    before._need(len(own) > 0 and len(ids) == len(values), "not as many ids as log-probabilities")
    before._need(len(ids) % len(own) == 0 and len(ids) <= 20 * len(own), "not as many for each place")
    before._need(all(abs(each) <= 1e6 for each in own), "no log-probability")
    before._need(all(-9999.0 <= each <= 1e-3 for each in values), "no log-probability")
    return {"own": own, "ids": ids, "values": values}


def _behind(payload: bytes, bound: int, first: int, known: Mapping[str, before.Check]) -> Any:
    """Read the fields behind those of 0.1: a byte string there, and what follows, only fills the message up."""
    rest = before._cbor(payload, bound)[first:]
    filling = next((at for at, field in enumerate(rest) if type(field) is bytes), len(rest))
    return {name: check(rest[at] if at < filling else None) for at, (name, check) in enumerate(known.items())}


def _read_draft(payload: bytes) -> Any:
    draft = before.READERS["draft"](payload) | _behind(payload, 1024, 10, {"write": _WRITE})
    idle = not draft["tokens"] and draft["tried"] is None and not draft["more"]
    before._need(draft["write"] is None or idle, "a request to write that carries a draft")
    return draft


def _read_verdict(payload: bytes) -> Any:
    verdict = before.READERS["verdict"](payload)
    known = {"base": _BASE, "written": _WRITTEN, "load": _load, "chained": _CHAINED, "logprobs": _logprobs}
    verdict |= _behind(payload, 1 << 20, 7, known)
    written = verdict["written"] is not None
    before._need(written is (verdict["base"] is not None), "written where, or what?")
    before._need(not written or (verdict["accepted"] == 0 and verdict["next"] is None), "two answers in one")
    return verdict


def _code(value: Any) -> Any:
    before._need(type(value) is str and re.fullmatch(r"[a-z][a-z0-9-]{0,39}", value) is not None, "no code")
    return value


def _read_close(payload: bytes) -> Any:
    value = before._cbor(payload, 1024)
    before._need(type(value) is dict and value.get("kind") == "close", "no Close")
    known, optional = before._MAPS["close"]
    known = {**known, "unverified": before._maybe(before._U32), "age_s": _RETRY_S}
    known |= {"code": before._maybe(_code), "sentence": before._maybe(before._SENTENCE)}
    known["app"] = before._maybe(_app)
    younger = dict.fromkeys(("unverified", "age_s", "code", "sentence", "app"))
    return {"kind": "close", **before._map(value, known, optional={**optional, **younger})}


def _read_telemetry(payload: bytes) -> Any:
    before._need(len(payload) <= 64 << 10, "too large")
    whole = before._maybe(before._whole(0, 1 << 63))
    known = {**before._STATES["Telemetry"], "streamed": whole, "plan": _PLAN, "unverified": whole}
    optional = {**before._MAY_LACK, "streamed": None, "plan": None, "unverified": None}
    return before._map(json.loads(payload), known, optional=optional)


def _setting(value: Any) -> Any:
    before._need(type(value) in (bool, int, float, str), "neither a truth, a number nor a text")
    if type(value) is str:
        before._need(len(value) <= 300, "a text of more than 300 characters")
    elif type(value) is not bool:
        before._need(-(2**53) < value < 2**64, "a number out of range")
    return value


def _table(of: before.Check, most: int) -> before.Check:
    def check(value: Any) -> dict[str, Any]:
        before._need(type(value) is dict and len(value) <= most, f"not a table of at most {most}")
        before._need(all(1 <= len(name) <= 80 for name in value), "a name that is none")
        return {name: of(each) for name, each in value.items()}

    return check


def _names(value: Any) -> list[str]:
    before._need(type(value) is list and len(value) <= 64, "not a list of at most 64")
    before._need(all(type(name) is str and 1 <= len(name) <= 80 for name in value), "a name that is none")
    return list(value)


def _command_id(value: Any) -> str:
    before._need(type(value) is str and re.fullmatch("[0-9a-f]{8,32}", value) is not None, "not the id of a command")
    return str(value)


_VERSION: Final = before._whole(0, 1 << 53)
_SENTENCE, _WHO = before._text(500), before._text(100)
_STEERING: Final[Mapping[str, tuple[Mapping[str, before.Check], Mapping[str, Any]]]] = {
    "DesiredSettings": (
        {
            "version": before._whole(1, 1 << 53),
            "values": _table(_setting, 64),
            "who": _WHO,
            "at": before._maybe(before._instant),
        },
        {"who": "", "at": None},
    ),
    "ReportedSettings": (
        {
            "version": _VERSION,
            "applied": _VERSION,
            "values": _table(_setting, 64),
            "refused": _table(_SENTENCE, 64),
            "needs_restart": _names,
            "fixed": _names,
            "at": before._maybe(before._instant),
        },
        {"refused": {}, "needs_restart": [], "fixed": [], "at": None},
    ),
    "CommandRequest": (
        {
            "id": _command_id,
            "command": before._text(40),
            "arguments": _table(_setting, 8),
            "deadline": before._instant,
            "who": _WHO,
        },
        {"arguments": {}, "who": ""},
    ),
    "CommandResponse": (
        {
            "id": _command_id,
            "outcome": before._word("ok", "refused", otherwise="failed"),
            "sentence": _SENTENCE,
            "result": before._maybe(before._text(8192)),
            "part": before._whole(0, 32),
            "parts": before._whole(1, 33),
        },
        {"result": None, "part": 0, "parts": 1},
    ),
}


def _read_steering(payload: bytes, kind: str) -> Any:
    before._need(len(payload) <= 64 << 10, "too large")
    known, optional = _STEERING[kind]
    read = before._map(json.loads(payload), known, optional=optional)
    before._need(kind != "CommandResponse" or read["part"] < read["parts"], "a part that is beyond the last")
    return read


_PLAN: Final = before._maybe(before._LABEL)

_ALERT: Final[Mapping[str, before.Check]] = {
    "id": before._text(64),
    "fleet": before._maybe(before._name),
    "rule": before._text(64),
    "subject": before._LABEL,
    "device": before._maybe(before._name),
    "severity": before._text(16),
    "state": before._word("open", "cleared", otherwise="open"),
    "sentence": before._text(2000),
    "value": before._maybe(before._real(-math.inf)),
    "threshold": before._maybe(before._real(-math.inf)),
    "since": before._instant,
    "at": before._instant,
}
_ALERT_MAY_LACK: Final = dict.fromkeys(("fleet", "device", "value", "threshold"))


def _read_alert(payload: bytes) -> Any:
    before._need(len(payload) <= 64 << 10, "too large")
    return before._map(json.loads(payload), _ALERT, optional=_ALERT_MAY_LACK)


READERS: Final[Mapping[str, Callable[[bytes], Any]]] = {
    **before.READERS,
    "Alert": _read_alert,
    "Telemetry": _read_telemetry,
    "open": _read_open,
    "close": _read_close,
    "reply": _read_reply,
    "draft": _read_draft,
    "verdict": _read_verdict,
    **{kind: lambda payload, kind=kind: _read_steering(payload, kind) for kind in _STEERING},
}
"""From a payload to its fields, by the kind that 0.2.toml gives as `reads`. They raise `Unreadable`."""
