"""Report on a pair: sentences and a table for people, JSON for programs."""

from typing import Any, Final

from fleet_cli.models.pair.check import CheckedPair
from fleet_cli.models.pair.facts import ModelFacts
from fleet_cli.models.pair.findings import Finding
from fleet_cli.models.pair.memory import UNIT, Need, device_need, edge_needs
from fleet_cli.tables import Column, print_table
from schemas.printable import printable_line

__all__ = ["as_json", "show"]

_MEGA: Final = 1_000_000

_NEEDS: Final[list[Column[tuple[str, Need]]]] = [
    Column("where", lambda row: row[0]),
    Column("engine", lambda row: row[1].engine),
    Column("weights", lambda row: row[1].number_format),
    Column("weights, MB", lambda row: round(row[1].weight_bytes / _MEGA)),
    Column(
        f"keys and values, MB for {UNIT:,} tokens",
        lambda row: row[1].kv_bytes / _MEGA,
        narrow=f"keys and values,\nMB for {UNIT:,} tokens",
    ),
]


def show(pair: CheckedPair) -> None:
    """Print what was found."""
    for finding in pair.findings:
        print(f"{finding.outcome:<8} {finding.aspect:<14} {printable_line(finding.sentence)}")
    rows = [("device", device_need(pair.draft)), *(("edge", need) for need in edge_needs(pair.target))]
    print_table("Memory", _NEEDS, rows)
    print("The pair does not fit." if pair.refused else "The pair fits.", flush=True)


def as_json(pair: CheckedPair) -> dict[str, Any]:
    """Return what was found as JSON values."""
    return {
        "fits": not pair.refused,
        "draft": _model(pair.draft),
        "target": _model(pair.target),
        "findings": [_finding(finding) for finding in pair.findings],
        "memory": {
            "device": _need(device_need(pair.draft)),
            "edge": [_need(need) for need in edge_needs(pair.target)],
        },
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {"aspect": finding.aspect, "outcome": finding.outcome.value, "sentence": finding.sentence}


def _model(model: ModelFacts) -> dict[str, Any]:
    return {
        "source": model.source,
        "form": model.form.value,
        "architecture": model.architecture,
        "number_format": model.number_format,
        "tokens": model.vocabulary.size,
        "fingerprint": model.vocabulary.fingerprint.hex(),
        "end_tokens": list(model.end_tokens),
        "end_texts": list(model.end_texts),
        "chat_template": model.chat_template is not None,
        "context": model.context,
        "parameters": model.parameters,
        "weight_bytes": model.weight_bytes,
        "layers": len(model.layers),
        "layers_with_window": sum(layer.window is not None for layer in model.layers),
    }


def _need(need: Need) -> dict[str, Any]:
    return {
        "engine": need.engine,
        "weights": need.number_format,
        "weight_bytes": need.weight_bytes,
        "kv_bytes_per_1000_tokens": need.kv_bytes,
    }
