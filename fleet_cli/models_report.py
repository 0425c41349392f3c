"""Report on a pair of models: sentences and a table for people, JSON for programs."""

from collections.abc import Callable
from typing import Any, Final

from fleet_admin.models.acceptance import LONGEST_DRAFT, PairAcceptance
from fleet_admin.models.facts import ModelFacts
from fleet_admin.models.pair import UNIT, CheckedPair, EngineMemory, device_need, edge_needs, file_bytes
from fleet_cli.tables import Column, print_table
from schemas.printable import printable_line

_MEGA: Final = 1_000_000

_NEEDS: Final[list[Column[tuple[str, EngineMemory]]]] = [
    Column("where", lambda row: row[0], rank=0),
    Column("engine", lambda row: row[1].engine, rank=0),
    Column("number format", lambda row: row[1].number_format, rank=0),
    Column("weights", lambda row: row[1].weight_bytes, "bytes", rank=0),
    Column(f"keys and values for {UNIT:,} tokens", lambda row: row[1].kv_bytes, "bytes", rank=0),
]

_MODES: Final = (("residual", False), ("coupled", True))


def _share(*, coupled: bool) -> Callable[[tuple[str, PairAcceptance]], str]:
    def show_share(row: tuple[str, PairAcceptance]) -> str:
        error = row[1].error(coupled=coupled)
        mean = f"{row[1].mean(coupled=coupled):.3f}"
        return mean if error is None else f"{mean} ± {error:.3f}"

    return show_share


_ACCEPTANCE: Final[list[Column[tuple[str, PairAcceptance]]]] = [
    Column("prompts", lambda row: row[0], rank=0),
    Column("texts", lambda row: len(row[1].texts), "count"),
    Column("tokens", lambda row: row[1].tokens, "count"),
    *(Column(f"{mode} ± standard error", _share(coupled=coupled), "number", rank=0) for mode, coupled in _MODES),
]

_VERDICTS: Final[list[Column[tuple[int, PairAcceptance]]]] = [
    Column("draft tokens", lambda row: row[0], "count", rank=0),
    Column("residual", lambda row: row[1].tokens_per_verdict(row[0], coupled=False), "ratio", rank=0),
    Column("coupled", lambda row: row[1].tokens_per_verdict(row[0], coupled=True), "ratio", rank=0),
]


def show(pair: CheckedPair) -> None:
    for finding in pair.findings:
        print(f"{finding.outcome:<8} {finding.aspect:<14} {printable_line(finding.sentence)}")
    rows = [("device", device_need(pair.draft)), *(("edge", need) for need in edge_needs(pair.target))]
    print_table("Memory", _NEEDS, rows)
    draft, target = file_bytes(pair.draft) / _MEGA, file_bytes(pair.target) / _MEGA
    print(
        f"Disk: {draft:,.0f} MB on each device, {target:,.0f} MB on each edge; the largest file twice while it is sent."
    )
    print("The pair does not fit." if pair.refused else "The pair fits.", flush=True)


def show_acceptance(acceptance: PairAcceptance) -> None:
    parts = acceptance.by_category()
    rows = [*(parts.items() if len(parts) > 1 else ()), ("all", acceptance)]
    print_table(f"Acceptance on {len(acceptance.texts)} texts of the target", _ACCEPTANCE, rows)
    lengths = [(length, acceptance) for length in range(1, LONGEST_DRAFT + 1)]
    print_table("Tokens per verdict", _VERDICTS, lengths)


def as_json(pair: CheckedPair, acceptance: PairAcceptance | None = None) -> dict[str, Any]:
    return {
        "fits": not pair.refused,
        "draft": _model(pair.draft),
        "target": _model(pair.target),
        "findings": pair.findings,
        "memory": {"device": _need(device_need(pair.draft)), "edge": [_need(need) for need in edge_needs(pair.target)]},
        "disk": {"device": file_bytes(pair.draft), "edge": file_bytes(pair.target)},
        "measured": None if acceptance is None else _acceptance(acceptance),
    }


def _acceptance(acceptance: PairAcceptance) -> dict[str, Any]:
    return {
        "texts": len(acceptance.texts),
        "tokens": acceptance.tokens,
        **{mode: _mode(acceptance, coupled=coupled) for mode, coupled in _MODES},
        "categories": {
            name: {
                "texts": len(part.texts),
                "tokens": part.tokens,
                **{mode: part.mean(coupled=coupled) for mode, coupled in _MODES},
            }
            for name, part in acceptance.by_category().items()
        },
    }


def _mode(acceptance: PairAcceptance, *, coupled: bool) -> dict[str, Any]:
    return {
        "acceptance": acceptance.mean(coupled=coupled),
        "standard_error": acceptance.error(coupled=coupled),
        "tokens_per_verdict": {
            str(length): acceptance.tokens_per_verdict(length, coupled=coupled)
            for length in range(1, LONGEST_DRAFT + 1)
        },
    }


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


def _need(need: EngineMemory) -> dict[str, Any]:
    return {
        "engine": need.engine,
        "weights": need.number_format,
        "weight_bytes": need.weight_bytes,
        "kv_bytes_per_1000_tokens": need.kv_bytes,
    }
