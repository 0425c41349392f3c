"""The AsyncAPI document says what the code does."""

import json
from typing import Any

import cbor2
import pytest

from schemas.asyncapi import DRAFT_LAYOUT, MESSAGES, VERDICT_LAYOUT, document
from schemas.codec import encode_draft, encode_verdict
from schemas.messages import Draft, Verdict
from schemas.reasons import Finish
from schemas.topics import TREE, Role, Topic, build

DOCUMENT = document()


def test_every_topic_is_a_channel_and_every_role_in_it_an_operation() -> None:
    addresses = {channel["address"] for channel in DOCUMENT["channels"].values()}
    assert addresses == {f"dssd/v1/{{fleet}}/{rule.template}" for rule in TREE}
    assert len(DOCUMENT["operations"]) == sum(len(rule.writers) + len(rule.readers) for rule in TREE)
    verdict = DOCUMENT["operations"]["edgeSendsDownVerdict"]
    assert verdict["action"] == "send"
    assert verdict["tags"] == [{"name": Role.EDGE}]
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


def test_the_layouts_are_those_of_the_encoded_arrays() -> None:
    draft = Draft(handle=1, round=2, epoch=3, base=4, fix=5, tokens=(), counts=(), more=True, digest=6)
    array = cbor2.loads(encode_draft(draft))
    shown = dict(zip(DRAFT_LAYOUT, array, strict=False))
    for field in ("handle", "round", "epoch", "base", "fix", "more", "digest"):
        assert shown[field] == getattr(draft, field)
    asking = Draft(handle=1, round=2, epoch=3, base=4, digest=6, tried=7)
    assert dict(zip(DRAFT_LAYOUT, cbor2.loads(encode_draft(asking)), strict=True))["tried"] == 7
    verdict = Verdict(handle=1, round=2, accepted=3, next=9, finish=Finish.LENGTH, queue_ms=0.5, compute_ms=0.25)
    assert dict(zip(VERDICT_LAYOUT, cbor2.loads(encode_verdict(verdict)), strict=True)) == verdict.model_dump()


def test_fields_that_a_message_has_are_fields_of_its_schema() -> None:
    for models in MESSAGES.values():
        for model in models:
            assert set(DOCUMENT["components"]["schemas"][model.__name__]["properties"]) == set(model.model_fields)


def test_the_document_is_json() -> None:
    assert json.loads(json.dumps(DOCUMENT, allow_nan=False)) == DOCUMENT


def test_reserved_fields_are_marked_as_reserved() -> None:
    for topic in set(Topic) - set(MESSAGES):
        channel = "".join(part.capitalize() if number else part for number, part in enumerate(topic.value.split("/")))
        assert "Reserved" in DOCUMENT["channels"][channel]["description"]
