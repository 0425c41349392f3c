"""Random grammars that are hard to compile or to follow."""

import json
import random
from collections.abc import Callable
from typing import Any, Final

from schemas.policy import MAX_GRAMMAR_BYTES, Grammar, GrammarKind


def random_bomb(rng: random.Random) -> Grammar:
    """Return a random grammar of one of the kinds below, within the length limit of grammars."""
    kind = rng.choice(_KINDS)
    size = int(10 ** rng.uniform(0.5, 4.5))
    while True:
        made = kind(rng, size)
        if len(made.text.encode()) <= MAX_GRAMMAR_BYTES:
            return made
        size = size * 2 // 3


def _reference_chain(rng: random.Random, size: int) -> Grammar:
    word = rng.choice(["items", "additionalProperties", "allOf", "anyOf", "oneOf"])
    references = [{"$ref": f"#/$defs/{number + 1:x}"} for number in range(size)]
    definitions: dict[str, Any] = {
        f"{number:x}": {word: [each] if word.endswith("Of") else each} for number, each in enumerate(references)
    }
    return _schema({"$defs": definitions | {f"{size:x}": {"type": "string"}}, "$ref": "#/$defs/0"})


def _scattered_references(rng: random.Random, size: int) -> Grammar:
    """Definitions that refer to random others, in chains that have to be followed."""
    names = [f"{number:x}" for number in range(size)]
    definitions: dict[str, Any] = {
        name: {"properties": {key: {"$ref": f"#/$defs/{rng.choice(names)}"} for key in "ab"}, "required": ["a"]}
        for name in names
    }
    return _schema({"$defs": definitions, "$ref": f"#/$defs/{names[0]}"})


def _doubling(rng: random.Random, size: int) -> Grammar:
    """Definitions, each of which combines the next with itself."""
    word, depth = rng.choice(["allOf", "anyOf", "oneOf"]), min(size, 600)
    definitions: dict[str, Any] = {
        f"d{level}": {word: [{"$ref": f"#/$defs/d{level + 1}"}] * 2} for level in range(depth)
    }
    return _schema({"$defs": definitions | {f"d{depth}": {"type": "integer"}}, "$ref": "#/$defs/d0"})


def _nested(rng: random.Random, size: int) -> Grammar:
    forms = [('{"items":', "}"), ('{"anyOf":[', ",{}]}"), ('{"properties":{"a":', "}}"), ("[", "]")]
    before, behind = rng.choice(forms)
    depth = min(size, 20_000 // (len(before) + len(behind)))
    return _grammar(GrammarKind.JSON_SCHEMA, before * depth + "{}" + behind * depth)


def _properties(rng: random.Random, size: int) -> Grammar:
    properties = {f"{number:x}": {"type": rng.choice(["string", "integer", "number"])} for number in range(size)}
    return _schema(
        {"type": "object", "properties": properties, "required": list(properties)[: rng.randrange(size + 1)]}
    )


def _constants(rng: random.Random, size: int) -> Grammar:
    number = rng.choice([1, 2, 10, max(1, size // 8)])
    letters = rng.choice(["a", "ab", "\u00e9\u4e2d", " ", "0123456789"])
    long = max(1, size // number)
    return _schema({"enum": ["".join(rng.choice(letters) for _ in range(long)) for _ in range(number)]})


def _lengths(rng: random.Random, size: int) -> Grammar:
    inner = {"type": "string", "minLength": rng.randrange(size + 1), "maxLength": size, "pattern": _pattern(rng, 3)}
    return _schema({"type": "array", "items": inner, "minItems": rng.randrange(size + 1), "maxItems": size})


def _regex(rng: random.Random, size: int) -> Grammar:
    return _grammar(GrammarKind.REGEX, _pattern(rng, min(size, 40)))


def _repetitions(rng: random.Random, size: int) -> Grammar:
    pattern = "x"
    for _ in range(min(size, rng.randrange(1, 12))):
        pattern = f"({pattern}){{{rng.randrange(3)},{rng.randrange(3, 200)}}}"
    return _grammar(GrammarKind.REGEX, pattern)


def _states(rng: random.Random, size: int) -> Grammar:
    parts = [f".*{rng.choice('abc')}.{{{rng.randrange(2, max(3, min(size, 60)))}}}" for _ in range(rng.randrange(1, 5))]
    return _grammar(GrammarKind.REGEX, rng.choice(["|", ""]).join(f"({part}.*)" for part in parts))


def _terminals(rng: random.Random, size: int) -> Grammar:
    form = rng.choice(['{} "a"', '"a" {}', "{}+ /b/", "{}? {}", "({} | /[a-z]+/)", "~{} & /[a-z]*/", "{} /.*/"])
    lines = [f"A{number}: {form.replace('{}', f'A{number + 1}')}" for number in range(size)]
    return _grammar(GrammarKind.LARK, "\n".join(["start: A0", *lines, f'A{size}: "a"', ""]))


def _rules(rng: random.Random, size: int) -> Grammar:
    form = rng.choice(['{} "a"', '"a" {}', "{} {}", "{}* /b/", "({} | )"])
    lines = [f"r{number}: {form.replace('{}', f'r{number + 1}')}" for number in range(size)]
    return _grammar(GrammarKind.LARK, "\n".join(["start: r0", *lines, f'r{size}: "a"', ""]))


def _ambiguous(rng: random.Random, size: int) -> Grammar:
    """Rules under which one output can be parsed in very many ways."""
    number = min(size, 30)
    names = [f"r{each}" for each in range(number)]
    lines = ["start: r0"]
    for name in names:
        ways = [" ".join(rng.choices(names, k=rng.randrange(1, 4))) for _ in range(rng.randrange(1, 5))]
        ways.append(rng.choice(["/[a-z]/", "/[a-z]+/", '""', "/.*/"]))
        lines.append(f"{name}: {' | '.join(ways)}")
    return _grammar(GrammarKind.LARK, "\n".join([*lines, ""]))


def _garbage(rng: random.Random, size: int) -> Grammar:
    """Random characters that are special to parsers."""
    text = "".join(rng.choices('{}[]():"\\/|*+?.,%$~&^#-0aA\n ', k=size))
    return _grammar(rng.choice([GrammarKind.REGEX, GrammarKind.LARK, GrammarKind.JSON_SCHEMA]), text)


def _pattern(rng: random.Random, depth: int) -> str:
    if depth <= 0:
        return rng.choice(["a", "b", ".", "[^a]", r"\w", r"\d", "\u00e9"])
    inner = [_pattern(rng, depth - rng.randrange(1, 8)) for _ in range(rng.randrange(1, 3))]
    form = rng.choice(["({})*", "({})+", "({})?", "({}){{2,9}}", "({})", "(?:{})|a"])
    return form.format(rng.choice(["", "|"]).join(inner))


def _schema(schema: dict[str, Any]) -> Grammar:
    return _grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema, separators=(",", ":"), ensure_ascii=False))


def _grammar(kind: GrammarKind, text: str) -> Grammar:
    return Grammar.model_construct(kind=kind, text=text)  # it may be too long yet


_KINDS: Final[tuple[Callable[[random.Random, int], Grammar], ...]] = (
    _reference_chain, _scattered_references, _doubling, _nested, _properties, _constants, _lengths, _regex,
    _repetitions, _states, _terminals, _rules, _ambiguous, _garbage,
)  # fmt: skip
