"""Memory and disk that a pair takes: weights, keys and values by tokens of a text, and files, at both ends."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fleet_cli.models.pair.facts import Form, ModelFacts

__all__ = ["UNIT", "Need", "device_need", "edge_needs", "file_bytes"]

UNIT: Final = 1000
"""Tokens of a text, prompt included, that memory for keys and values is given for."""

_HALF: Final = 2
_WHOLE: Final = 4


@dataclass(frozen=True, slots=True)
class Need:
    """What an engine takes, its working memory left out: some 100 MB with llama.cpp, 300 MB with torch.

    Attributes:
        engine: In the words of the settings.
        number_format: Of the weights.
        weight_bytes: Of all weights.
        kv_bytes: Of the keys and values of a text of `UNIT` tokens.
    """

    engine: str
    number_format: str
    weight_bytes: int
    kv_bytes: int


def device_need(draft: ModelFacts) -> Need:
    """Return what drafting takes. A device writes one text at a time, and takes memory for its whole `context`."""
    return _llama(draft)


def edge_needs(target: ModelFacts) -> list[Need]:
    """Return what verifying takes, for each engine that serves such files; keys and values of one session."""
    torch = [
        Need("torch", name, target.parameters * size, target.kv_bytes(tokens=UNIT, number_bytes=size))
        for name, size in (("bfloat16", _HALF), ("float32", _WHOLE))
    ]
    return [_llama(target), *torch] if target.form is Form.GGUF else torch


def file_bytes(model: ModelFacts) -> int:
    """Return what a model's file, or all files of its folder, take on a disk."""
    path = Path(model.source)
    return (
        path.stat().st_size if path.is_file() else sum(each.stat().st_size for each in path.iterdir() if each.is_file())
    )


def _llama(model: ModelFacts) -> Need:
    kv_bytes = model.kv_bytes(tokens=UNIT, number_bytes=_HALF)
    return Need("llama.cpp", model.number_format, model.weight_bytes, kv_bytes)
