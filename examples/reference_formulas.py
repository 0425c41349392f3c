"""Formulas, written from docs/formulas.md alone; nothing of this project is imported."""

import hashlib
import zlib
from typing import Any

import numpy as np

DRAFT, RESIDUAL, THIN, GUMBEL = 1, 4, 6, 7  # purposes of random numbers
SPARSE, SAMPLES, DENSE = 1, 2, 3  # forms of p
TOTAL = 65536


def uniform(seed: int, position: int, purpose: int, index: int = 0) -> float:
    """Return the random number in [0, 1) of one decision."""
    h = seed
    for word in (purpose, position + 1, index + 1):
        h = (h + 0x9E3779B97F4A7C15 * word) % 2**64
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB % 2**64
        h ^= h >> 31
    return (h >> 11) / 2**53


def gumbel(seed: int, position: int, token: int) -> float:
    """Return the noise of a token."""
    return float(-np.log(-np.log(min(uniform(seed, position, GUMBEL, token) + 2**-54, 1 - 2**-53))))


def adjust(
    logits: list[float], policy: dict[str, Any], prompt: list[int], generated: list[int], ends: list[int]
) -> list[float]:
    """Return the logits to shape behind a prompt and generated tokens; `ends` are the tokens that end an output."""
    scores = np.array(logits, dtype=np.float32)
    if len(generated) < policy.get("min_tokens", 0):
        scores[ends] = -np.inf
    for token, bias in policy.get("logit_bias", []):
        scores[token] += bias
    factor = policy.get("repetition_penalty", 1.0)
    for token in {*prompt, *generated}:
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token in set(generated):
        scores[token] -= policy.get("frequency_penalty", 0.0) * generated.count(token)
        scores[token] -= policy.get("presence_penalty", 0.0)
    return list(map(float, scores))


def shape(logits: list[float], policy: dict[str, Any]) -> dict[int, float]:
    """Return the distribution that is sampled from: probabilities by token, falling if any are cut, else by id."""
    scores, temperature = np.array(logits, dtype=float), policy["temperature"]
    if temperature == 0:
        return {int(np.argmax(scores)): 1.0}
    ids, cut = np.arange(len(scores)), 0 < policy["top_k"] < len(scores) or policy["top_p"] < 1
    if cut:
        ids = np.argsort(-scores, kind="stable")[: policy["top_k"] or None]
    weights = np.exp((scores[ids] - scores.max()) / temperature)
    weights[weights < policy.get("min_p", 0.0)] = 0
    weights /= weights.sum()
    if policy["top_p"] < 1:
        weights = weights[: np.searchsorted(np.cumsum(weights), policy["top_p"]) + 1]
        weights /= weights.sum()
    probs = weights.astype(np.float32).tolist()
    return {token: prob for token, prob in zip(ids.tolist(), probs, strict=False) if prob > 0}


def quantize(q: dict[int, float]) -> dict[int, int]:
    """Return the counts of 1/65,536 by token."""
    exact = np.array(list(q.values())) * (TOTAL / sum(q.values()))
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: TOTAL - counts.sum()]] += 1
    return {token: count for token, count in zip(q, counts.tolist(), strict=True) if count}


def invert(weights: dict[int, Any], u: float) -> int:
    """Draw a token from weights by inversion, in their order."""
    mass = np.cumsum(list(weights.values()))
    return list(weights)[min(int(np.searchsorted(mass, u * mass[-1], side="right")), len(mass) - 1)]


def couple(q: dict[int, float], seed: int, position: int) -> int:
    """Draw a token in coupled mode."""
    return max(q, key=lambda token: np.log(q[token]) + gumbel(seed, position, token))


def correct(form: list[Any], counts: dict[int, int], seed: int, position: int, tried: int = 0) -> int | None:
    """Draw the correction of a rejected token from a form of p; None if more samples are needed.

    Args:
        form: As in the verdict, its typed arrays as lists.
        counts: What the rejected token was drawn from.
        seed: Of the policy.
        position: The rejected one.
        tried: Samples that have failed.
    """
    q = {token: count / TOTAL for token, count in counts.items()}
    match form:
        case [number, start, ids, probs, *_] if number == SAMPLES and start == tried:
            for index, (token, prob) in enumerate(zip(ids, probs, strict=True), start):
                if uniform(seed, position, THIN, index) * prob >= q.get(token, 0.0):
                    return int(token)
            return None
        case [number, ids, probs, *_] if number == SPARSE:
            p = dict(zip(ids, probs, strict=True))
        case [number, raw, *_] if number == DENSE:
            p = {token: prob for token, prob in enumerate(np.frombuffer(raw, "<f4").tolist()) if prob > 0}
        case _:
            raise ValueError(f"The edge sent p in form {form[0]}, from which this client cannot draw.")
    rest = {token: prob - q.get(token, 0.0) for token, prob in p.items() if prob > q.get(token, 0.0)}
    return invert(rest or p, uniform(seed, position, RESIDUAL))


def digest(tokens: list[int]) -> int:
    """Return the digest of a text."""
    return zlib.crc32(np.array(tokens, "<u4").tobytes())


def fingerprint(strings: list[str]) -> bytes:
    """Return the fingerprint of a vocabulary's token strings."""
    raw = [string.encode("utf-8", "surrogatepass") for string in strings]
    return hashlib.sha256(b"".join(len(each).to_bytes(4, "little") + each for each in raw)).digest()
