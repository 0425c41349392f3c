#!/usr/bin/env python3
"""Writes docs/vectors from the code that both ends run, all but the messages; --check only compares."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cbor2
import numpy as np

from sampling.distribution import Dist, QuantizedDist, draw_draft, quantize, shape
from sampling.downlink import correct, dense, samples, sparse
from sampling.drawing import Purpose, accepts, coupled_token, gumbel, random_uniform, residual
from sampling.verification import judge
from schemas.downlink import DownlinkForm, pack_form
from schemas.policy import ADJUSTMENTS, Mode, SamplingPolicy
from schemas.vocabulary import EMPTY_DIGEST, Vocabulary, extend_digest, token_strings

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "vectors"
TOLERANCE = 1e-12  # of a float64: exponentials and logarithms differ in their last bits between machines

SEEDS = (0, 1, 20_261_125, 2**63 - 1, 2**64 - 1)
P = ((3, 0, 7, 5), (0.5, 0.25, 0.1875, 0.0625))
Q = ((0, 3, 9), (30_000, 20_000, 15_536))


def dist(ids: Any, probs: Any) -> Dist:
    return Dist(np.array(ids, dtype=np.int64), np.array(probs, dtype=np.float64))


def quantized(ids: Any, counts: Any) -> QuantizedDist:
    return QuantizedDist(np.array(ids, dtype=np.int64), np.array(counts, dtype=np.int64))


def policy(**fields: Any) -> SamplingPolicy:
    """Return a policy that does nothing but what is said."""
    return SamplingPolicy(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0, **fields})


def shown(found: Dist) -> dict[str, Any]:
    """Return a distribution for JSON."""
    return {"ids": found.ids.tolist(), "probs": found.probs.tolist()}


# What both ends compute


def uniforms() -> Iterator[dict[str, Any]]:
    """Uniform numbers, and the 64-bit words that they are made of."""
    places = [(seed, position, 0) for seed in SEEDS for position in (0, 1, 1000)]
    for purpose in Purpose:
        for seed, position, index in [*places, (7, 3, 1), (7, 3, 1023)]:
            found = random_uniform(seed, position, purpose, index)
            yield {
                "seed": seed,
                "position": position,
                "purpose": int(purpose),
                "index": index,
                "k": int(found * 2**53),
                "uniform": found,
            }


def noises() -> Iterator[dict[str, Any]]:
    """Gumbel noise."""
    tokens = [0, 1, 2, 255, 49_151, 262_143]
    for seed in SEEDS:
        for position in (0, 17):
            noise = gumbel(seed, position, np.array(tokens)).tolist()
            yield {"seed": seed, "position": position, "tokens": tokens, "noise": noise}


def shapes() -> Iterator[dict[str, Any]]:
    """Logits to distributions. Minus infinity is null."""
    plain, ties = [0.5, 2.0, -1.0, 1.25, 0.0], [1.0, 3.0, 3.0, 2.0, 2.0, 2.0]
    for name, logits, temperature, top_k, top_p in (
        ("softmax", plain, 1.0, 0, 1.0),
        ("temperature", plain, 0.7, 0, 1.0),
        ("greedy", plain, 0.0, 50, 0.95),
        ("greedy: of equals the lower id", ties, 0.0, 0, 1.0),
        ("top_k", plain, 0.7, 3, 1.0),
        ("top_k above the vocabulary", plain, 0.7, 50, 1.0),
        ("top_k: of equals the lower ids", ties, 1.0, 4, 1.0),
        ("top_p", plain, 0.7, 0, 0.9),
        ("top_p counts after top_k", plain, 0.7, 3, 0.9),
        ("top_p keeps one at least", plain, 0.7, 0, 0.01),
        ("an impossible token", [0.0, None, 1.0], 1.0, 0, 1.0),
        ("what rounds to 0 in float32 is left out", [0.0, -200.0, 1.0], 1.0, 0, 1.0),
        ("next to greedy", plain, 1e-5, 0, 1.0),
    ):
        numbers = np.array([-math.inf if logit is None else logit for logit in logits])
        found = shape(numbers, policy(temperature=temperature, top_k=top_k, top_p=top_p))
        given = {"logits": logits, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        yield {"name": name, **given, **shown(found)}
    yield from adjusted_shapes()


def adjusted_shapes() -> Iterator[dict[str, Any]]:
    """Shapes after `min_p` and what adjusts logits; a policy without a field leaves it at no effect."""
    plain = [0.5, 2.0, -1.0, 1.25, 0.0]
    given = {"logits": plain, "temperature": 0.5, "top_k": 4, "top_p": 1.0}
    prompt, generated, ends = [0, 2, 0], [1, 3, 1], [1]
    before = {"prompt": prompt, "generated": generated, "end_tokens": ends}
    penalties = {"repetition_penalty": 2.0, "frequency_penalty": 0.25, "presence_penalty": -0.5}
    for name, fields in (
        ("min_p", {"min_p": 0.2}),
        ("min_p counts after top_k and before top_p", {"min_p": 0.02, "top_p": 0.96}),
        ("min_p keeps one at least", {"min_p": 1.0}),
        ("logit_bias", {"logit_bias": [[0, 1.5], [1, -100.0]]}),
        ("repetition_penalty: prompt and output, by sign", {"repetition_penalty": 2.0}),
        ("frequency_penalty: the output, each time", {"frequency_penalty": 0.25}),
        ("presence_penalty: the output, once", {"presence_penalty": 0.5}),
        ("min_tokens: not reached", {"min_tokens": 4}),
        ("min_tokens: reached", {"min_tokens": 3}),
        ("all, in their order", {"min_tokens": 4, "logit_bias": [[2, 2.0], [3, -2.0]], **penalties}),
        ("adjusted, then greedy", {"temperature": 0.0, "logit_bias": [[4, 4.0]]}),
        ("nothing generated yet", {**penalties, "generated": []}),
    ):
        case = given | (before if fields.keys() & set(ADJUSTMENTS) else {}) | fields
        settings = {field: case[field] for field in SamplingPolicy.model_fields if field in case}
        settings["logit_bias"] = tuple(map(tuple, case.get("logit_bias", ())))
        at = policy(**settings).after(prompt, case.get("generated", ()), ends)
        yield {"name": name, **case, **shown(shape(np.array(plain), at))}


def quantizations() -> Iterator[dict[str, Any]]:
    """Distributions to counts of 1/65,536."""
    for name, ids, probs in (
        ("certain", [4], [1.0]),
        ("exact", [2, 0], [0.75, 0.25]),
        ("thirds: of equal remainders the first", [5, 6, 7], [1 / 3, 1 / 3, 1 / 3]),
        ("sixths", [0, 1, 2, 3, 4, 5], [1 / 6] * 6),
        ("what rounds to 0 drops out", [3, 9, 1], [0.5, 0.499999, 0.000001]),
        ("what does not sum to 1 is scaled", [3, 9, 1], [0.6, 0.3, 0.3]),
    ):
        found = quantize(dist(ids, probs))
        counts = {"q_ids": found.ids.tolist(), "counts": found.counts.tolist()}
        yield {"name": name, "ids": ids, "probs": probs, **counts}


# What the device decides


def drafts() -> Iterator[dict[str, Any]]:
    """Draft tokens in residual mode."""
    for seed in SEEDS:
        for position in (0, 1, 2):
            uniform = random_uniform(seed, position, Purpose.DRAFT)
            token, count = draw_draft(quantized(*Q), uniform)
            given = {"seed": seed, "position": position, "q_ids": Q[0], "counts": Q[1]}
            yield {**given, "uniform": uniform, "token": token, "count": count}


def corrections() -> Iterator[dict[str, Any]]:
    """Corrections from each form. A token of null: more samples are to be asked for."""
    p, q = dist(*P), quantized(*Q)
    left = residual(p, q)
    for seed in SEEDS:
        at = policy(seed=seed, top_k=4)
        for position in (0, 5):
            forms: tuple[tuple[str, DownlinkForm], ...] = (
                ("sparse", sparse(p)),
                ("dense", dense(p, 10)),
                ("samples", samples(p, policy=at, position=position, start=0, number=3)),
                ("samples: further ones", samples(p, policy=at, position=position, start=3, number=3)),
            )
            for name, form in forms:
                wire = cbor2.dumps(pack_form(form)).hex()
                token = correct(form, q, policy=at, position=position)
                given = {"seed": seed, "position": position, "q_ids": Q[0], "counts": Q[1]}
                yield {"name": name, **given, "form": wire, "residual": shown(left), "token": token}
    alike = dist((0, 1), (0.5, 0.5))
    form = sparse(alike)
    yield {
        "name": "nothing is left of p: drawn from p",
        "seed": 1,
        "position": 0,
        "q_ids": [0, 1],
        "counts": [32_768, 32_768],
        "form": cbor2.dumps(pack_form(form)).hex(),
        "residual": shown(alike),
        "token": correct(form, quantized((0, 1), (32_768, 32_768)), policy=policy(seed=1), position=0),
    }


def couplings() -> Iterator[dict[str, Any]]:
    """Tokens in coupled mode: drafted from q, or the target's own from p."""
    for seed in SEEDS:
        for position in (0, 1, 2):
            token = coupled_token(dist(*P), seed, position)
            yield {"seed": seed, "position": position, "ids": P[0], "probs": P[1], "token": token}


# What the edge decides


def acceptances() -> Iterator[dict[str, Any]]:
    """Whether a draft token stands."""
    for p, count, uniform in (
        (0.5, 32_768, 0.999),
        (0.25, 32_768, 0.499),
        (0.25, 32_768, 0.5),
        (0.0, 1, 0.0),
        (1.0, 65_536, 1 - 2**-53),
    ):
        yield {"p": p, "count": count, "uniform": uniform, "stands": accepts(p, count, uniform)}


def judgements() -> Iterator[dict[str, Any]]:
    """Whole drafts. Every row of p is the same."""
    for mode in Mode:
        for seed in SEEDS:
            for bonus in (True, False):
                tokens, counts = [3, 0, 3], [20_000, 30_000, 20_000]
                sent = counts if mode is Mode.RESIDUAL else None
                at = policy(seed=seed, mode=mode)
                found = judge(lambda _row: dist(*P), tokens, sent, policy=at, base=4, bonus=bonus)
                given = {"mode": mode.value, "seed": seed, "ids": P[0], "probs": P[1], "base": 4}
                yield {
                    **given,
                    "tokens": tokens,
                    "counts": sent,
                    "more": not bonus,
                    "accepted": found.accepted,
                    "rejected": found.rejected,
                    "token": found.token,
                }


def draws() -> Iterator[dict[str, Any]]:
    """Samples of p."""
    for seed in SEEDS:
        found = samples(dist(*P), policy=policy(seed=seed), position=4, start=2, number=5)
        yield {"seed": seed, "position": 4, "ids": P[0], "probs": P[1], "start": 2, "samples": list(found.ids)}


# Digests and fingerprints


def digests() -> Iterator[dict[str, Any]]:
    """Digests of committed text."""
    for tokens in ([], [0], [1, 2, 3], [49_151, 262_143]):
        yield {"tokens": tokens, "digest": extend_digest(EMPTY_DIGEST, tokens)}


def vocabularies() -> Iterator[dict[str, Any]]:
    """Fingerprints. `rows` is what a model's file stores, `tokens` what is hashed."""
    for name, rows in (
        ("plain", ["<s>", "a", "Ġthe", "▁the", "é"]),
        ("padding at the end is left out", ["a", "[PAD7]", "b", "[PAD3]", "[PAD4]"]),
        ("a NUL ends a string, an empty one is named", ["a", "b\0c", "", "\0"]),
        ("a byte that is no UTF-8", ["a", "\udcff"]),
    ):
        tokens = token_strings(rows)
        found = Vocabulary.of(tokens)
        yield {
            "name": name,
            "rows": rows,
            "tokens": tokens,
            "size": found.size,
            "fingerprint": found.fingerprint.hex(),
        }


# Messages


def stored(part: str) -> list[dict[str, Any]]:
    """Return what no code computes: the messages of protocol 1 and what both ends rely on stay as they are."""
    cases: list[dict[str, Any]] = json.loads((FOLDER / "messages.json").read_text(encoding="utf-8"))[part]["cases"]
    return cases


def messages() -> Iterator[dict[str, Any]]:
    """Every kind of message, its fields and its bytes. Byte strings among the fields are in hexadecimal."""
    for case in stored("messages"):
        yield case | {"diagnostic": diagnostic(bytes.fromhex(case["hex"]))} if "hex" in case else case


def words() -> Iterator[dict[str, Any]]:
    """Values of the enumerations."""
    yield from stored("words")


def bounds() -> Iterator[dict[str, Any]]:
    """Limits that both ends rely on."""
    yield from stored("bounds")


def diagnostic(wire: bytes) -> str:
    """Return CBOR in its diagnostic notation (RFC 8949, 8), with the fields of a map in their order."""
    longest = 60

    def tell(value: Any) -> str:
        match value:
            case cbor2.CBORTag(tag=tag, value=inner):
                return f"{tag}({tell(inner)})"
            case bytes():
                return f"h'{value.hex()}'" if len(value) <= longest else f"h'{value[:longest].hex()}…'"
            case str():
                return json.dumps(value, ensure_ascii=False)
            case None | True | False | int() | float():
                return json.dumps(value)
            case list() | tuple():
                return f"[{', '.join(map(tell, value))}]"
            case _:
                return "{" + ", ".join(f"{tell(key)}: {tell(part)}" for key, part in value.items()) + "}"

    return tell(cbor2.loads(wire))


FILES = {
    "random-numbers.json": (uniforms, noises),
    "distributions.json": (shapes, quantizations),
    "device.json": (drafts, corrections, couplings),
    "edge.json": (acceptances, judgements, draws),
    "identity.json": (digests, vocabularies),
    "messages.json": (messages, words, bounds),
}


def written(parts: Any) -> str:
    """Return a file: for each part what it is, and its cases, one a line."""
    sections = []
    for part in parts:
        cases = ",\n    ".join(json.dumps(case) for case in part())
        about = json.dumps((part.__doc__ or "").strip())
        sections.append(f'  "{part.__name__}": {{\n   "about": {about},\n   "cases": [\n    {cases}\n   ]\n  }}')
    return "{\n" + ",\n".join(sections) + "\n}\n"


def alike(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal, but for the last bits of their floats."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return type(one) is type(other) and bool(one == other)


def main() -> int:
    """Write or check the files."""
    check = sys.argv[1:] == ["--check"]
    stale = []
    FOLDER.mkdir(exist_ok=True)
    for name, parts in FILES.items():
        path, wanted = FOLDER / name, written(parts)
        if not check:
            path.write_text(wanted, encoding="utf-8")
        elif not path.exists() or not alike(json.loads(path.read_text(encoding="utf-8")), json.loads(wanted)):
            stale.append(name)
    if stale:
        print(
            f"docs/vectors is not what the code computes ({', '.join(stale)}): run scripts/vectors.py", file=sys.stderr
        )
    return int(bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
