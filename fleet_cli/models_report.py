"""Report on a pair of models: sentences and a table for people, JSON for programs."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from fleet_admin.models.acceptance import LONGEST_DRAFT, MeasuredPair, PairAcceptance
from fleet_admin.models.facts import ModelFacts
from fleet_admin.models.pair import UNIT, CheckedPair, EngineMemory, device_need, edge_needs, file_bytes
from fleet_cli.options import show_check
from fleet_cli.tables import Column, print_table

_MEGA: Final = 1_000_000

_NEEDS: Final[list[Column[tuple[str, EngineMemory]]]] = [
    Column("where", lambda row: row[0], rank=0),
    Column("engine", lambda row: row[1].engine, rank=0),
    Column("number format", lambda row: row[1].number_format, rank=0),
    Column("weights", lambda row: row[1].weight_bytes, "bytes", rank=0),
    Column(f"keys and values for {UNIT:,} tokens", lambda row: row[1].kv_bytes, "bytes", rank=0),
]

Measured = Mapping[str, Any]
"""What was measured of a pair, as in JSON."""

_MODES: Final = (("residual", False), ("coupled", True))


def _share(mode: str) -> Callable[[tuple[str, Measured]], str]:
    def show_share(row: tuple[str, Measured]) -> str:
        mean, error = row[1][mode]["acceptance"], row[1][mode]["standard_error"]
        return f"{mean:.3f}" if error is None else f"{mean:.3f} ± {error:.3f}"

    return show_share


_ACCEPTANCE: Final[list[Column[tuple[str, Measured]]]] = [
    Column("prompts", lambda row: row[0], rank=0),
    Column("texts", lambda row: row[1]["texts"], "count"),
    Column("tokens", lambda row: row[1]["tokens"], "count"),
    *(Column(f"{mode} ± standard error", _share(mode), "number", rank=0) for mode, _ in _MODES),
]

_VERDICTS: Final[list[Column[tuple[str, Measured]]]] = [
    Column("draft tokens", lambda row: row[0], "number", rank=0),
    Column("residual", lambda row: row[1]["residual"]["tokens_per_verdict"][row[0]], "ratio", rank=0),
    Column("coupled", lambda row: row[1]["coupled"]["tokens_per_verdict"][row[0]], "ratio", rank=0),
]


def show(pair: CheckedPair) -> None:
    for finding in pair.findings:
        show_check(finding)
    rows = [("device", device_need(pair.draft)), *(("edge", need) for need in edge_needs(pair.target))]
    print_table("Memory", _NEEDS, rows)
    draft, target = file_bytes(pair.draft) / _MEGA, file_bytes(pair.target) / _MEGA
    print(
        f"Disk: {draft:,.0f} MB on each device, {target:,.0f} MB on each edge; the largest file twice while it is sent."
    )
    print("The pair does not fit." if pair.refused else "The pair fits.", flush=True)


def show_measured(found: Measured) -> None:
    from fleet_cli.edge_advise import balance_sentence  # needs the session log's packages, as measuring does

    parts = found["categories"]
    rows = [*(parts.items() if len(parts) > 1 else ()), ("all", found)]
    print_table(f"Acceptance on {found['texts']} texts of the target", _ACCEPTANCE, rows)
    print_table(
        "Tokens per verdict", _VERDICTS, [(length, found) for length in found["residual"]["tokens_per_verdict"]]
    )
    steps = found["steps"]
    print(
        f"A step with one new token takes {steps['1x1_ms']:.1f} ms, with five {steps['1x5_ms']:.1f} ms "
        f"({steps['runs_on']}). {balance_sentence(steps['balance_tokens'])}",
        flush=True,
    )


_CLAIMS: Final[list[Column[tuple[str, str]]]] = [
    Column("on this machine", lambda row: row[0], rank=0),
    Column("figure", lambda row: row[1], "number", rank=0),
]


def show_claims(found: Measured) -> None:
    """Print the README's claims with the figures of this machine, from `as_json` and the report of a demo."""
    measured, demo = found["measured"], found["demo"]
    steps, compared = measured["steps"], demo["comparisons"][0]
    ways = [compared[way] for way in ("edge_only", "drafting", "chosen")]
    claims = [
        ("acceptance, residual / coupled", " / ".join(f"{measured[mode]['acceptance']:.2f}" for mode, _ in _MODES)),
        ("tokens per verdict, drafts of 4", f"{measured['residual']['tokens_per_verdict']['4']:.2f}"),
        ("step of one / five new tokens", f"{steps['1x1_ms']:.1f} / {steps['1x5_ms']:.1f} ms"),
        ("tokens in the time of two steps", f"{steps['balance_tokens']}"),
        ("edge-only / drafting / chosen, tokens/s", " / ".join(f"{way['tokens_per_s']:.1f}" for way in ways)),
        ("edge-only / drafting / chosen, bytes a token", " / ".join(f"{way['bytes_per_token']:.1f}" for way in ways)),
    ]
    print_table(f"{demo['draft']} for {demo['target']}, one device", _CLAIMS, claims, whole=True)
    print(f"The device chose: {compared['plan']}.")


def as_json(pair: CheckedPair, measured: MeasuredPair | None = None) -> dict[str, Any]:
    return {
        "fits": not pair.refused,
        "draft": _model(pair.draft),
        "target": _model(pair.target),
        "findings": pair.findings,
        "memory": {"device": _need(device_need(pair.draft)), "edge": [_need(need) for need in edge_needs(pair.target)]},
        "disk": {"device": file_bytes(pair.draft), "edge": file_bytes(pair.target)},
        "measured": None if measured is None else measured_json(measured),
    }


def measured_json(measured: MeasuredPair) -> dict[str, Any]:
    categories = measured.acceptance.by_category()
    return {
        **_acceptance(measured.acceptance),
        "categories": {name: _acceptance(part) for name, part in categories.items()},
        "steps": {
            "runs_on": measured.steps.runs_on,
            "machine": measured.steps.machine,
            "balance_tokens": measured.steps.balance(),
            **{f"1x{tokens:.0f}_ms": ms for tokens, ms in measured.steps.rows[1]},
        },
    }


def _acceptance(acceptance: PairAcceptance) -> dict[str, Any]:
    return {
        "texts": len(acceptance.texts),
        "tokens": acceptance.tokens,
        **{mode: _mode(acceptance, coupled=coupled) for mode, coupled in _MODES},
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
        "chat_template": model.chat is not None,
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
