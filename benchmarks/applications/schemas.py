"""Schemas of the benchmark, each with what is asked for. Lengths and numbers are bounded, so that every text ends."""

from typing import Any, Final

Schema = dict[str, Any]


def _object(**properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _text(most: int) -> Schema:
    return {"type": "string", "minLength": 1, "maxLength": most}


def _whole(least: int, most: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def _list(items: Schema, most: int, least: int = 1) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


_POINT: Final = _object(latitude={"type": "number", "minimum": -90, "maximum": 90}, longitude=_whole(-180, 180))

_MAIL: Final = {"type": "string", "pattern": "^[a-z]{2,8}@[a-z]{2,8}\\.org$"}

SCHEMAS: Final[dict[str, tuple[str, Schema]]] = {
    "reading": (
        "Report the state of a water pump that runs hot.",
        _object(
            device=_text(20),
            status={"enum": ["normal", "warning", "critical"]},
            temperature=_whole(-40, 200),
            needs_inspection={"type": "boolean"},
        ),
    ),
    "nested": (
        "Describe a sensor on a roof, with its place and its owner.",
        _object(
            sensor=_object(name=_text(20), place=_POINT),
            owner=_object(name=_text(20), contact=_object(email=_MAIL)),
        ),
    ),
    "enums": (
        "Classify the message: the machine stopped and makes a loud noise.",
        _object(
            kind={"enum": ["question", "complaint", "report", "praise"]},
            urgency={"enum": ["low", "medium", "high"]},
            language={"enum": ["English", "German", "French", "Spanish"]},
            part={"enum": ["motor", "belt", "valve", "display", "unknown"]},
        ),
    ),
    "array": (
        "List three things to check before a machine is started.",
        _object(steps=_list(_text(40), 3, 3)),
    ),
    "objects": (
        "List the parts of a bicycle with their number.",
        _object(parts=_list(_object(name=_text(15), count=_whole(1, 9), spare={"type": "boolean"}), 4)),
    ),
    "patterns": (
        "Write an order for spare parts.",
        _object(
            order={"type": "string", "pattern": "^ORD-[0-9]{4}-[A-Z]{2}$"},
            date={"type": "string", "format": "date"},
            items=_list({"type": "string", "pattern": "^[A-Z]{3}[0-9]{3}$"}, 3),
        ),
    ),
    "unicode": (
        "Schreibe einen kurzen Gruß mit Umlauten für Käufer aus München.",
        _object(
            gruß=_text(40),
            städte=_list({"enum": ["München", "Köln", "Zürich", "東京", "Łódź"]}, 3),
            zeichen={"enum": ["✓", "✗", "→"]},
        ),
    ),
    "choice": (
        "Say how to reach the service: by phone or by mail.",
        {
            "anyOf": [
                _object(by={"const": "phone"}, number={"type": "string", "pattern": "^[0-9]{5,9}$"}),
                _object(by={"const": "mail"}, street=_text(25), house=_whole(1, 200)),
            ]
        },
    ),
    "numbers": (
        "Give measurements of a day: temperature, pressure and wind.",
        _object(
            temperature=_whole(-30, 45),
            pressure=_whole(950, 1060),
            wind={"type": "array", "prefixItems": [_whole(0, 120), {"enum": ["N", "E", "S", "W"]}], "items": False,
                  "minItems": 2},
            rain={"type": ["integer", "null"], "minimum": 0, "maximum": 99},
        ),
    ),
    "recursive": (
        "Describe a folder with a folder in it.",
        {
            "$ref": "#/$defs/top",
            "$defs": {
                "top": _object(name=_text(12), inner=_list({"$ref": "#/$defs/folder"}, 2)),
                "folder": _object(name=_text(12), files=_list(_text(12), 2, 0)),
            },
        },
    ),
}  # fmt: skip
"""By name, what is asked for and the schema of the answer."""
