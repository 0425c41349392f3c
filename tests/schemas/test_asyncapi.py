import json
from pathlib import Path
from typing import Any

import cbor2
import pytest

from schemas.asyncapi import MESSAGES, document
from schemas.codec import DRAFT_LAYOUT, VERDICT_LAYOUT, encode_draft, encode_verdict
from schemas.fields import EdgeLoad, Logprobs
from schemas.messages import Draft, Verdict
from schemas.reasons import Finish
from schemas.topics import TREE, ClientRole, Topic, build

DOCUMENT = document()
SCHEMAS = DOCUMENT["components"]["schemas"]
VECTORS = Path(__file__).parents[2] / "docs" / "vectors"


def test_every_topic_is_a_channel_and_every_role_in_it_an_operation() -> None:
    addresses = {channel["address"] for channel in DOCUMENT["channels"].values()}
    assert addresses == {f"dssd/v1/{{fleet}}/{rule.template}" for rule in TREE}
    assert len(DOCUMENT["operations"]) == sum(len(rule.writers) + len(rule.readers) for rule in TREE)
    verdict = DOCUMENT["operations"]["edgeSendsDownVerdict"]
    assert verdict["action"] == "send"
    assert verdict["tags"] == [{"name": ClientRole.EDGE}]
    assert verdict["bindings"]["mqtt"] == {
        "qos": 1,
        "retain": False,
        "messageExpiryInterval": 30,
        "bindingVersion": "0.2.0",
    }


@pytest.mark.parametrize("rule", TREE, ids=lambda rule: rule.topic.value)
def test_an_address_filled_in_is_the_topic(rule: Any) -> None:
    (channel,) = [
        channel for channel in DOCUMENT["channels"].values() if channel["address"].endswith("}/" + rule.template)
    ]
    names = {"fleet": "home", "device": "d", "edge": "e"}
    given = {name: names[name] for name in channel["parameters"]}
    assert channel["address"].format(**given) == build(rule.topic, **given)


def test_every_reference_leads_somewhere() -> None:
    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if "$ref" in value else []
            return own + [found for item in value.values() for found in references(item)]
        return [found for item in value for found in references(item)] if isinstance(value, list) else []

    found = references(DOCUMENT)
    assert len(found) > 50
    for reference in found:
        here: Any = DOCUMENT
        for part in reference.removeprefix("#/").split("/"):
            here = here[part]


TOLD = Logprobs(own=(-0.5,), ids=(4, 5), values=(-0.5, -1.5))


def test_the_layouts_are_those_of_the_encoded_arrays() -> None:
    draft = Draft(handle=1, round=2, epoch=3, base=4, fix=5, tokens=(), counts=(), more=True, digest=6)
    array = cbor2.loads(encode_draft(draft))
    shown = dict(zip(DRAFT_LAYOUT, array, strict=False))
    for field in ("handle", "round", "epoch", "base", "fix", "more", "digest"):
        assert shown[field] == getattr(draft, field)
    asking = Draft(handle=1, round=2, epoch=3, base=4, digest=6, tried=7)
    assert dict(zip(DRAFT_LAYOUT, cbor2.loads(encode_draft(asking)), strict=False))["tried"] == 7
    asking = Draft(handle=1, round=2, epoch=3, base=4, digest=6, write=8)
    assert dict(zip(DRAFT_LAYOUT, cbor2.loads(encode_draft(asking)), strict=True))["write"] == 8
    verdict = Verdict(handle=1, round=2, accepted=3, next=9, finish=Finish.LENGTH, queue_ms=0.5, compute_ms=0.25)
    there = verdict.model_dump(exclude_none=True)
    assert dict(zip(VERDICT_LAYOUT, cbor2.loads(encode_verdict(verdict)), strict=False)) == there
    written = Verdict(
        handle=1,
        round=2,
        accepted=0,
        base=3,
        written=(4,),
        load=EdgeLoad(texts=7, writing_ms=12.0),
        chained=8,
        logprobs=TOLD,
        prompt=TOLD,
    )
    assert dict(zip(VERDICT_LAYOUT, cbor2.loads(encode_verdict(written)), strict=True))["base"] == 3


def test_fields_that_a_message_has_are_fields_of_its_schema() -> None:
    for models in MESSAGES.values():
        for model in models:
            schema = SCHEMAS[model.__name__]
            named = schema.get("properties") or [place["title"] for place in schema["items"]]
            assert set(named) == set(model.model_fields)


def test_no_binary_message_has_a_plain_array_of_numbers() -> None:
    def arrays(value: Any) -> list[Any]:
        if isinstance(value, dict):
            own = [value] if value.get("type") == "array" else []
            return own + [found for key, item in value.items() if key != "x-cbor-items" for found in arrays(item)]
        return [found for item in value for found in arrays(item)] if isinstance(value, list) else []

    assert {array["title"] for array in arrays(SCHEMAS)} == {
        "Draft",
        "Verdict",
        "Sparse",
        "Samples",
        "Tries",
        "Rows",
        "Dense",
        "Logprobs",
        "EdgeLoad",
    }


WIDTHS = {69: 2, 70: 4, 85: 4}


def conforms(schema: Any, value: Any) -> bool:  # noqa: C901, PLR0911 - a case for each kind of value
    """Check decoded CBOR against a schema, with as much of JSON Schema as the document uses."""
    if "$ref" in schema:
        return conforms(SCHEMAS[schema["$ref"].rpartition("/")[2]], value)
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return any(conforms(part, value) for part in schema[union])
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")]) and type(value) is not bool
    match schema["type"], value:
        case "string", cbor2.CBORTag(tag=tag, value=raw):
            return tag in schema.get("x-cbor-tags", ()) and typed(schema, WIDTHS[tag], raw)
        case "string", str() | bytes():
            kind = bytes if schema.get("format") == "binary" else str
            return "x-cbor-tags" not in schema and type(value) is kind and within(schema, len(value), "Length")
        case "array", list():
            places = zip(schema["items"], value, strict=False)
            return len(value) >= schema["minItems"] and all(conforms(*place) for place in places)
        case "object", dict():
            named = value.keys() if schema.get("additionalProperties", True) else value.keys() & schema["properties"]
            known = [conforms(schema["properties"][key], value[key]) for key in value if key in schema["properties"]]
            return value.keys() == named and set(schema.get("required", ())) <= value.keys() and all(known)
        case ("null", None) | ("boolean", bool()):
            return True
        case ("integer", int()) | ("number", float()):
            return type(value) is not bool and within(schema, value, "imum")
        case _:
            return False


def typed(schema: Any, width: int, raw: bytes) -> bool:
    numbers = [int.from_bytes(raw[at : at + width], "little") for at in range(0, len(raw), width)]
    fit = schema["x-cbor-items"]["type"] == "number" or all(conforms(schema["x-cbor-items"], each) for each in numbers)
    return len(raw) % width == 0 and within(schema, len(raw), "Length") and fit


def within(schema: Any, size: float, kind: str) -> bool:
    high, low = schema.get(f"max{kind}", size), schema.get(f"min{kind}", size)
    above, below = schema.get("exclusiveMaximum", size + 1), schema.get("exclusiveMinimum", size - 1)
    return bool(low <= size <= high and (kind == "Length" or below < size < above))


def binary_messages() -> list[Any]:
    found = json.loads((VECTORS / "messages.json").read_text(encoding="utf-8"))["messages"]["cases"]
    return [pytest.param(case, id=case["name"]) for case in found if "hex" in case]


def named(case: Any) -> str:
    return str(case["name"]).partition(":")[0].capitalize()


@pytest.mark.parametrize("case", binary_messages())
def test_every_message_is_what_the_document_says(case: Any) -> None:
    message = cbor2.loads(bytes.fromhex(case["hex"]))
    assert conforms(SCHEMAS[named(case)], message)
    assert not conforms(SCHEMAS[named(case)], plain(message)) or plain(message) == message


@pytest.mark.parametrize("case", binary_messages())
def test_the_check_of_messages_can_fail(case: Any) -> None:
    message = cbor2.loads(bytes.fromhex(case["hex"]))
    schema = SCHEMAS[named(case)]
    if isinstance(message, list):
        for place, field in enumerate(message[: len(schema["items"])]):
            assert not conforms(schema, [*message[:place], "words", *message[place + 1 :]]), field
        assert not conforms(schema, message[: schema["minItems"] - 1])
    else:
        for key in message.keys() & schema["properties"]:
            assert not conforms(schema, message | {key: []}), key
        for key in schema["required"]:
            assert not conforms(schema, {name: value for name, value in message.items() if name != key}), key


def plain(value: Any) -> Any:
    match value:
        case cbor2.CBORTag():
            return [1, 2]
        case dict():
            return {key: plain(part) for key, part in value.items()}
        case list():
            return [plain(part) for part in value]
        case _:
            return value


def test_the_document_is_json() -> None:
    assert json.loads(json.dumps(DOCUMENT, allow_nan=False)) == DOCUMENT


def test_reserved_fields_are_marked_as_reserved() -> None:
    for topic in set(Topic) - set(MESSAGES):
        channel = "".join(part.capitalize() if number else part for number, part in enumerate(topic.value.split("/")))
        assert "Reserved" in DOCUMENT["channels"][channel]["description"]
