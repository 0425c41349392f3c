"""An independent reader of the messages of protocol 1; uses no line of `schemas`."""

import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final

Check = Callable[[Any], Any]
"""Converts a value from the wire to messages.toml's spelling, or raises `Unreadable`."""

_MISSING: Final = object()


class Unreadable(Exception):  # noqa: N818 - reads as what it says
    """It is no message of protocol 1."""


# The part of CBOR


_TYPED: Final = {69: "H", 70: "I", 85: "f"}
_MOST_ITEMS, _MOST_DEPTH = 256, 6


def _cbor(payload: bytes, bound: int) -> Any:
    """Decode one item: definite lengths, few items, no tags but typed arrays, which become pairs of tag and values."""
    _need(len(payload) <= bound, "too large")
    items = 0

    def item(at: int, depth: int) -> tuple[Any, int]:  # noqa: PLR0911 - one for each major type
        nonlocal items
        items += 1
        _need(items <= _MOST_ITEMS and depth <= _MOST_DEPTH, "too many items, or too deep")
        major, short = payload[at] >> 5, payload[at] & 31
        _need(short <= 27, "indefinite length")
        width = 0 if short < 24 else 1 << (short - 24)
        raw, at = payload[at + 1 : at + 1 + width], at + 1 + width
        _need(len(raw) == width, "cut short")
        argument = int.from_bytes(raw, "big") if width else short
        if major in (0, 1):
            return (argument if major == 0 else -1 - argument), at
        if major in (2, 3):
            text = payload[at : at + argument]
            _need(len(text) == argument, "cut short")
            return (text if major == 2 else text.decode()), at + argument
        if major == 6:
            inner, at = item(at, depth + 1)
            _need(argument in _TYPED and isinstance(inner, bytes), f"tag {argument}")
            values = struct.iter_unpack("<" + _TYPED[argument], inner)
            return (argument, [value for (value,) in values]), at
        if major == 7:
            if short in (25, 26, 27):
                return struct.unpack({25: ">e", 26: ">f", 27: ">d"}[short], raw)[0], at
            _need(short in (20, 21, 22), "a simple value")
            return {20: False, 21: True, 22: None}[short], at
        parts = []
        for _ in range(argument * (2 if major == 5 else 1)):
            part, at = item(at, depth + 1)
            parts.append(part)
        if major == 4:
            return parts, at
        _need(len({str(key) for key in parts[::2]}) == argument, "a key twice")
        return dict(zip(parts[::2], parts[1::2], strict=True)), at

    value, end = item(0, 0)
    _need(end == len(payload), "bytes behind the end")
    return value


def _need(condition: bool, complaint: str) -> None:
    if not condition:
        raise Unreadable(complaint)


# Values


_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_WORD: Final = re.compile(r"[a-z][a-z0-9-]{0,39}")


def _whole(low: int, below: int) -> Check:
    def check(value: Any) -> int:
        _need(type(value) is int and low <= value < below, f"not a number from {low} to below {below}: {value!r}")
        return int(value)

    return check


def _real(low: float, high: float = math.inf, *, open_below: bool = False) -> Check:
    def check(value: Any) -> float:
        _need(type(value) in (int, float) and math.isfinite(value) and low <= value <= high, f"not in range: {value!r}")
        _need(not open_below or value > low, f"not above {low}")
        return float(value)

    return check


def _text(most: int) -> Check:
    def check(value: Any) -> str:
        _need(type(value) is str and len(value) <= most, f"not a text of at most {most} characters")
        return str(value)

    return check


def _raw(length: int) -> Check:
    def check(value: Any) -> str:
        _need(type(value) is bytes and len(value) == length, f"not {length} bytes")
        return bytes(value).hex()

    return check


def _flag(value: Any) -> bool:
    _need(type(value) is bool, "neither true nor false")
    return bool(value)


def _name(value: Any) -> str:
    _need(type(value) is str and _NAME.fullmatch(value) is not None, "not a name")
    return str(value)


def _word(*known: str, otherwise: str) -> Check:
    def check(value: Any) -> str:
        _need(type(value) is str and _WORD.fullmatch(value) is not None, "not a word")
        return str(value) if value in known else otherwise

    return check


def _ids(most: int) -> Check:
    def check(value: Any) -> list[int]:
        _need(type(value) is tuple and value[0] in (69, 70) and len(value[1]) <= most, "not token ids")
        return [_token(token) for token in value[1]]

    return check


def _probabilities(value: Any) -> list[float]:
    _need(type(value) is tuple and value[0] == 85, "not probabilities")
    return [float(_real(0.0, 1.0 + 1e-6, open_below=True)(share)) for share in value[1]]


def _maybe(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


_U16, _U32, _POSITION = _whole(0, 1 << 16), _whole(0, 1 << 32), _whole(0, 1 << 20)
_token = _whole(0, 1 << 21)
_LABEL, _SENTENCE, _SESSION, _MS = _text(200), _text(500), _raw(8), _real(0.0)

# Maps


def _map(value: Any, known: Mapping[str, Check], *, optional: Mapping[str, Any] = {}, closed: bool = False) -> Any:
    """Read a map; `optional` has the defaults of missing keys. Unknown keys are ignored unless the map is closed."""
    _need(type(value) is dict and all(type(key) is str for key in value), "not a map with text keys")
    _need(not closed or set(value) <= set(known), "a key that must be understood")
    found = {}
    for key, check in known.items():
        _need(key in value or key in optional, f"{key} is missing")
        found[key] = check(value[key]) if key in value else optional[key]
    return found


def _vocabulary(value: Any) -> Any:
    return _map(value, {"size": _whole(2, (1 << 21) + 1), "fingerprint": _raw(32)})


def _mode(value: Any) -> Any:
    _need(value in ("residual", "coupled"), "an unknown mode")
    return value


def _grammar(value: Any) -> Any:
    _need(type(value) is dict and set(value) <= {"kind", "text"}, "not a grammar that can be understood")
    _need(value.get("kind") in ("json-schema", "json-object", "regex", "lark"), "an unknown kind of grammar")
    text = value.get("text", "")
    _need(type(text) is str and len(text.encode()) <= 1 << 16, "too large a grammar")
    return {"kind": value["kind"], "text": text}


def _policy(value: Any) -> Any:
    known = {
        "mode": _mode,
        "temperature": _real(0.0, 100.0),
        "top_k": _whole(0, 1_000_001),
        "top_p": _real(0.0, 1.0, open_below=True),
        "seed": _whole(0, 1 << 64),
    }
    if type(value) is dict and "grammar" in value:
        known["grammar"] = _grammar
    # Ignoring a setting would change the target distribution.
    return _map(
        value, known, optional={"mode": "residual", "temperature": 0.7, "top_k": 50, "top_p": 0.95}, closed=True
    )


_REASON = _word("stop", "length", "cancelled", "lost", "failed", otherwise="failed")
_REFUSAL = _word(
    *("protocol", "vocabulary-mismatch", "prompt-empty", "prompt-too-long", "token-out-of-vocabulary"),
    *("max-new-tokens", "busy", "draining", "over-quota", "logprobs", "fenced", "grammar"),
    otherwise="other",
)
_FAULT = _word(
    *("malformed", "unknown-session", "desync", "draft-too-long", "token-out-of-vocabulary", "counts", "over-quota"),
    "internal",
    otherwise="other",
)
_RETRY_S: Final = _maybe(_real(0.0))
_LOGPROBS: Final = _whole(0, 21)
_TIMES: Final = ("writing_ms", "step_ms", "text_ms", "token_ms")


def _load(value: Any) -> Any:
    if value is None:
        return None
    _need(type(value) is list and len(value) >= 7, "not a load")
    texts, *times, acceptance, free = value[:7]
    known = zip(_TIMES, map(_maybe(_MS), times), strict=True)
    return {
        "texts": _whole(1, 1 << 16)(texts),
        **dict(known),
        "acceptance": _maybe(_real(0.0, 1.0))(acceptance),
        "free": _whole(0, 65)(free),
    }


def _app(value: Any) -> str:
    _need(type(value) is str and 0 < len(value) <= 40, "no name of an application")
    return str(_LABEL(value))


def _code(value: Any) -> Any:
    _need(type(value) is str and _WORD.fullmatch(value) is not None, "no code")
    return value


_COUNTED = dict.fromkeys(("drafted", "tested", "accepted", "rounds", "uplink_bytes", "downlink_bytes"), _U32)
_MAPS: Final[Mapping[str, tuple[Mapping[str, Check], Mapping[str, Any]]]] = {
    "open": (
        {
            "protocol": _whole(1, 2),
            "session": _SESSION,
            "attempt": _U32,
            "vocabulary": _vocabulary,
            "draft_model": _LABEL,
            "quantization": _LABEL,
            "policy": _policy,
            "prompt": _ids(1 << 17),
            "max_new_tokens": _whole(0, (1 << 17) + 1),
            "resume": _ids(1 << 17),
            "logprobs": _LOGPROBS,
            "app": _app,
            "blocks": _flag,
        },
        {"protocol": 1, "attempt": 0, "resume": None, "logprobs": None, "app": None, "blocks": None},
    ),
    "opened": (
        {
            "session": _SESSION,
            "attempt": _U32,
            "handle": _U16,
            "edge": _name,
            "target": _LABEL,
            "position": _POSITION,
            "max_new_tokens": _whole(1, (1 << 17) + 1),
            "max_draft": _whole(0, 65),
            "window": _whole(1, 65),
            "lease_s": _real(0.0, open_below=True),
            "end_tokens": _ids(1 << 18),
            "logprobs": _LOGPROBS,
            "load": _load,
            "blocks": _flag,
        },
        {"attempt": 0, "logprobs": None, "load": None, "blocks": None},
    ),
    "refused": ({"session": _SESSION, "code": _REFUSAL, "sentence": _SENTENCE, "retry_s": _RETRY_S}, {"retry_s": None}),
    "fault": (
        {
            "handle": _U16,
            "round": _U32,
            "code": _FAULT,
            "action": _word("resume", "wait", "give-up", otherwise="give-up"),
            "sentence": _SENTENCE,
            "retry_s": _RETRY_S,
        },
        {"handle": None, "round": None, "retry_s": None},
    ),
    "close": (
        {
            "session": _SESSION,
            "handle": _maybe(_U16),
            "edge": _name,
            "reason": _REASON,
            "tokens": _POSITION,
            "fix": _token,
            "digest": _U32,
            **_COUNTED,
            "draft_ms": _MS,
            "wait_ms": _MS,
            "wall_ms": _MS,
            "unverified": _maybe(_U32),
            "age_s": _RETRY_S,
            "code": _maybe(_code),
            "sentence": _maybe(_SENTENCE),
            "app": _maybe(_app),
        },
        dict.fromkeys(("edge", "fix", "unverified", "age_s", "code", "sentence", "app")),
    ),
    "closed": (
        {
            "session": _SESSION,
            "attempt": _U32,
            "reason": _REASON,
            "tokens": _POSITION,
            "rounds": _U32,
            "mean_batch": _real(0.0),
            "queue_ms": _MS,
            "compute_ms": _MS,
            "reused": _U32,
        },
        {"attempt": None, "reused": None},
    ),
}


def _read_map(payload: bytes, bound: int, kinds: tuple[str, ...]) -> Any:
    value = _cbor(payload, bound)
    _need(type(value) is dict and value.get("kind") in kinds, "not of this kind")
    known, optional = _MAPS[value["kind"]]
    return {"kind": value["kind"], **_map(value, known, optional=optional)}


# Arrays


def _counts(value: Any) -> list[int]:
    _need(type(value) is tuple and value[0] == 69, "not counts")
    return [count + 1 for count in value[1]]


def _form(value: Any) -> Any:
    if value is None or type(value) is int:
        return _maybe(_token)(value)
    _need(type(value) is list and len(value) > 1 and type(value[0]) is int, "neither a token nor a form")
    number, *parts = value
    if number in (4, 5):
        return (_tries if number == 4 else _rows)(parts)
    _need(number in (1, 2, 3), "a form of which this release can draw nothing")
    if number == 3:
        _need(type(parts[0]) is bytes and len(parts[0]) >= 8 and len(parts[0]) % 4 == 0, "not dense")
        values = struct.unpack(f"<{len(parts[0]) // 4}f", parts[0])
        _need(min(values) >= 0.0 and abs(math.fsum(values) - 1.0) <= 1e-3, "not a distribution")
        return {"kind": "dense", "probs": parts[0].hex()}
    _need(len(parts) >= number + 1, "a form that is cut short")
    ids, probs = _ids(1 << 18)(parts[number - 1]), _probabilities(parts[number])
    _need(0 < len(ids) == len(probs), "not as many ids as probabilities")
    if number == 2:
        _need(len(ids) <= 1024, "too many samples")
        return {"kind": "samples", "start": _whole(0, 1 << 20)(parts[0]), "ids": ids, "probs": probs}
    _need(len(set(ids)) == len(ids) and abs(math.fsum(probs) - 1.0) <= 1e-3, "not a distribution")
    return {"kind": "sparse", "ids": ids, "probs": probs}


def _tries(parts: list[Any]) -> Any:
    _need(len(parts) >= 3 and type(parts[0]) is bytes, "tries that are cut short")
    heads, ids, bounds = parts[0], _ids(1 << 18)(parts[1]), _floats(parts[2])
    _need(0 < len(heads) == len(ids) == len(bounds) <= 1024, "not as many of each, or too many")
    _need(all(0.0 <= each <= 1.0 + 1e-6 for each in bounds), "no probability")
    return {"kind": "tries", "heads": heads.hex(), "ids": ids, "bounds": bounds}


def _rows(parts: list[Any]) -> Any:
    _need(len(parts) >= 4, "rows that are cut short")
    reached, sizes = _floats(parts[0]), _ids(64)(parts[1])
    ids, probs = _ids(1 << 18)(parts[2]), _probabilities(parts[3])
    _need(0 < len(reached) == len(sizes) <= 64 and len(ids) == len(probs) == sum(sizes), "not as many of each")
    _need(all(0.0 <= each <= 1.0 + 1e-6 for each in reached), "no probability")
    begin = 0
    for size in sizes:
        row, begin = slice(begin, begin + size), begin + size
        distinct = 0 < size == len(set(ids[row]))
        _need(distinct and abs(math.fsum(probs[row]) - 1.0) <= 1e-3, "not a distribution")
    return {"kind": "rows", "reached": reached, "sizes": sizes, "ids": ids, "probs": probs}


def _finish(value: Any) -> int:
    number = int(_whole(0, 256)(value))
    return number if number in (0, 1, 2) else 2


def _floats(value: Any) -> list[float]:
    _need(type(value) is tuple and value[0] == 85, "not a typed array of float32")
    return list(value[1])


def _logprobs(value: Any) -> Any:
    if value is None:
        return None
    _need(type(value) is list and len(value) >= 3, "not log-probabilities")
    own, ids, values = _floats(value[0]), _ids(1 << 18)(value[1]), _floats(value[2])
    _need(len(own) > 0 and len(ids) == len(values), "not as many ids as log-probabilities")
    _need(len(ids) % len(own) == 0 and len(ids) <= 20 * len(own), "not as many for each place")
    _need(all(abs(each) <= 1e6 for each in own), "no log-probability")
    _need(all(-9999.0 <= each <= 1e-3 for each in values), "no log-probability")
    return {"own": own, "ids": ids, "values": values}


_DRAFT: Final[Mapping[str, Check]] = {
    "handle": _U16,
    "round": _U32,
    "epoch": _U32,
    "base": _POSITION,
    "fix": _maybe(_token),
    "tokens": _ids(64),
    "counts": _maybe(_counts),
    "more": _flag,
    "digest": _U32,
    "tried": _maybe(_whole(1, 1 << 20)),
    "write": _maybe(_whole(0, (1 << 17) + 1)),
}
_VERDICT: Final[Mapping[str, Check]] = {
    "handle": _U16,
    "round": _U32,
    "accepted": _whole(0, 65),
    "next": _form,
    "finish": _finish,
    "queue_ms": _MS,
    "compute_ms": _MS,
    "base": _maybe(_POSITION),
    "written": _maybe(_ids(1 << 17)),
    "load": _load,
    "chained": _maybe(_whole(1, 4097)),
    "logprobs": _logprobs,
}


def _read_array(payload: bytes, bound: int, known: Mapping[str, Check], least: int) -> Any:
    value = _cbor(payload, bound)
    _need(type(value) is list and len(value) >= least, "not an array of so many fields")
    # After the mandatory fields, a byte string and everything after it is padding; a missing field is null.
    end = next((at for at in range(least, len(value)) if type(value[at]) is bytes), len(value))
    return {name: check(value[at] if at < end else None) for at, (name, check) in enumerate(known.items())}


def _read_draft(payload: bytes) -> Any:
    draft = _read_array(payload, 1024, _DRAFT, 9)
    _need(draft["counts"] is None or len(draft["counts"]) == len(draft["tokens"]), "not as many counts as tokens")
    idle = not draft["tokens"] and not draft["more"]
    _need(draft["tried"] is None or (idle and draft["fix"] is None), "a request for samples that carries a draft")
    _need(draft["write"] is None or (idle and draft["tried"] is None), "a request to write that carries a draft")
    return draft


def _read_verdict(payload: bytes) -> Any:
    verdict = _read_array(payload, 1 << 20, _VERDICT, 7)
    written = verdict["written"] is not None
    _need(written is (verdict["base"] is not None), "written where, or what?")
    _need(not written or (verdict["accepted"] == 0 and verdict["next"] is None), "two answers in one")
    return verdict


# JSON


def _instant(value: Any) -> datetime:
    _need(type(value) is str, "not an instant")
    return datetime.fromisoformat(value)


def _setting(value: Any) -> Any:
    _need(type(value) in (bool, int, float, str), "neither a truth, a number nor a text")
    if type(value) is str:
        _need(len(value) <= 300, "a text of more than 300 characters")
    elif type(value) is not bool:
        _need(-(2**53) < value < 2**64, "a number out of range")
    return value


def _table(of: Check, most: int) -> Check:
    def check(value: Any) -> dict[str, Any]:
        _need(type(value) is dict and len(value) <= most, f"not a table of at most {most}")
        _need(all(1 <= len(name) <= 80 for name in value), "a name that is none")
        return {name: of(each) for name, each in value.items()}

    return check


def _names(value: Any) -> list[str]:
    _need(type(value) is list and len(value) <= 64, "not a list of at most 64")
    _need(all(type(name) is str and 1 <= len(name) <= 80 for name in value), "a name that is none")
    return list(value)


def _command_id(value: Any) -> str:
    _need(type(value) is str and re.fullmatch("[0-9a-f]{8,32}", value) is not None, "not the id of a command")
    return str(value)


_VERSION, _WHO = _whole(0, 1 << 53), _text(100)
_PRESENCE = _word("online", "draining", "offline", otherwise="draining")
_STATES: Final[Mapping[str, Mapping[str, Check]]] = {
    "DeviceState": {
        "presence": _PRESENCE,
        "software": _LABEL,
        "draft_model": _LABEL,
        "quantization": _LABEL,
        "since": _instant,
        "certificate_until": _maybe(_instant),
    },
    "EdgeState": {
        "presence": _PRESENCE,
        "software": _LABEL,
        "edge": _name,
        "target": _LABEL,
        "vocabulary": _LABEL,
        "since": _instant,
        "certificate_until": _maybe(_instant),
        "sessions_per_device": _maybe(_whole(1, (1 << 16) + 1)),
    },
    "Telemetry": {
        "sessions": _whole(0, 1 << 63),
        "tokens": _whole(0, 1 << 63),
        "acceptance": _maybe(_real(0.0, 1.0)),
        "mean_draft": _maybe(_MS),
        "draft_ms_per_token": _maybe(_MS),
        "round_trip_ms": _maybe(_MS),
        "streamed": _maybe(_whole(0, 1 << 63)),
        "plan": _maybe(_LABEL),
        "unverified": _maybe(_whole(0, 1 << 63)),
    },
    "Alert": {
        "id": _text(64),
        "fleet": _maybe(_name),
        "rule": _text(64),
        "subject": _LABEL,
        "device": _maybe(_name),
        "severity": _text(16),
        "state": _word("open", "cleared", otherwise="open"),
        "sentence": _text(2000),
        "value": _maybe(_real(-math.inf)),
        "threshold": _maybe(_real(-math.inf)),
        "since": _instant,
        "at": _instant,
    },
    "DesiredSettings": {
        "version": _whole(1, 1 << 53),
        "values": _table(_setting, 64),
        "who": _WHO,
        "at": _maybe(_instant),
    },
    "ReportedSettings": {
        "version": _VERSION,
        "applied": _VERSION,
        "values": _table(_setting, 64),
        "refused": _table(_SENTENCE, 64),
        "needs_restart": _names,
        "fixed": _names,
        "at": _maybe(_instant),
    },
    "CommandRequest": {
        "id": _command_id,
        "command": _text(40),
        "arguments": _table(_setting, 8),
        "deadline": _instant,
        "who": _WHO,
    },
    "CommandResponse": {
        "id": _command_id,
        "outcome": _word("ok", "refused", otherwise="failed"),
        "sentence": _SENTENCE,
        "result": _maybe(_text(8192)),
        "part": _whole(0, 32),
        "parts": _whole(1, 33),
    },
}
_STATE_MAY_LACK: Final = {"certificate_until": None}
_MAY_LACK: Final[Mapping[str, Mapping[str, Any]]] = {
    "DeviceState": _STATE_MAY_LACK,
    "EdgeState": {**_STATE_MAY_LACK, "sessions_per_device": None},
    "Telemetry": dict.fromkeys(
        ("acceptance", "mean_draft", "draft_ms_per_token", "round_trip_ms", "streamed", "plan", "unverified")
    ),
    "Alert": dict.fromkeys(("fleet", "device", "value", "threshold")),
    "DesiredSettings": {"who": "", "at": None},
    "ReportedSettings": {"refused": {}, "needs_restart": [], "fixed": [], "at": None},
    "CommandRequest": {"arguments": {}, "who": ""},
    "CommandResponse": {"result": None, "part": 0, "parts": 1},
}


def _read_json(payload: bytes, kind: str) -> Any:
    _need(len(payload) <= 64 << 10, "too large")
    read = _map(json.loads(payload), _STATES[kind], optional=_MAY_LACK[kind])
    _need(kind != "CommandResponse" or read["part"] < read["parts"], "a part that is beyond the last")
    return read


READERS: Final[Mapping[str, Callable[[bytes], Any]]] = {
    "open": lambda payload: _read_map(payload, 1 << 20, ("open",)),
    "reply": lambda payload: _read_map(payload, 16 << 10, ("opened", "refused", "closed", "fault")),
    "close": lambda payload: _read_map(payload, 1024, ("close",)),
    "draft": _read_draft,
    "verdict": _read_verdict,
    **{kind: lambda payload, kind=kind: _read_json(payload, kind) for kind in _STATES},
}
"""Decoder of a payload's fields, by messages.toml's `reads`. They raise `Unreadable`."""
