import random
from collections.abc import Sequence
from math import sqrt
from pathlib import Path

import numpy as np
import pytest

from fleet_admin.models.acceptance import (
    LONGEST_DRAFT,
    MeasuredPosition,
    MeasuredText,
    PairAcceptance,
    _verdicts,
    compare,
    write_texts,
)
from fleet_admin.models.facts import ModelsError
from fleet_admin.models.prompts import read_prompts_by_category
from fleet_cli import models
from fleet_cli.models_report import show_claims
from fleet_device.drafters.without_model import ScriptedDrafter
from sampling.distribution import quantize, shape
from schemas.policy import Mode
from tests.support.command import Run, as_json, refused
from tests.support.memory_fleet import DRAFT, END, TARGET, Device, MemoryFleet, lossless_text, terms
from tests.support.prepared_models import prepared
from tests.support.scripted_verifier import ScriptedVerifier
from tests.support.tiny_gguf import tiny_gguf

PROMPT = (1, 2)


def verifier(context: int = 256) -> ScriptedVerifier:
    return ScriptedVerifier(TARGET, TARGET.words, context=context, end_tokens=(END,))


def measured(seeds: Sequence[int], *, tokens: int) -> PairAcceptance:
    policies = [terms(seed, mode=Mode.COUPLED).policy for seed in seeds]
    written = write_texts(verifier(), [PROMPT] * len(policies), policies=policies, tokens=tokens)
    drafter = ScriptedDrafter(DRAFT, DRAFT.words, end_tokens=(END,))
    return PairAcceptance(
        tuple(
            compare(drafter, PROMPT, text, policy=policy, category="toy")
            for text, policy in zip(written, policies, strict=True)
        )
    )


def really(seeds: Sequence[int], *, tokens: int, length: int, mode: Mode) -> list[tuple[int, int]]:
    """Return, for each generation of a device and an edge, the numbers of tokens and of verdicts."""
    found = []
    for seed in seeds:
        fleet = MemoryFleet()
        asked = terms(seed, mode=mode, max_new_tokens=tokens)
        device = Device(fleet, "device-1", asked, length=length, ahead=False)
        while not device.done:
            while device.act():
                pass
            fleet.settle()
        found.append((len(device.session.committed), device.session.counters.rounds))
    return found


def test_the_target_writes_the_texts_that_it_writes_in_a_fleet() -> None:
    asked = [terms(seed, mode=Mode.COUPLED, max_new_tokens=30) for seed in range(20)]
    served = verifier()
    written = write_texts(served, [PROMPT] * 20, policies=[each.policy for each in asked], tokens=30)
    assert [list(text.tokens) for text in written] == [lossless_text(each) for each in asked]
    assert len({len(text.tokens) for text in written}) > 1, "some ended by themselves"
    assert served.capacity() == 1 << 20, "and nothing is left open"


def test_overlap_and_acceptance_are_those_of_the_two_distributions() -> None:
    (text,) = measured([3], tokens=20).texts
    asked = terms(3, mode=Mode.COUPLED)
    prefix = list(PROMPT)
    for position, token in zip(
        text.positions, lossless_text(terms(3, mode=Mode.COUPLED, max_new_tokens=20)), strict=True
    ):
        p, q = (shape(script.logits(prefix), asked.policy) for script in (TARGET, DRAFT))
        reported = quantize(q)
        assert position.overlap == pytest.approx(
            sum(min(p.probability(each), reported.count(each) / 65_536) for each in range(TARGET.size))
        )
        assert position.accepted == pytest.approx(min(1.0, reported.count(token) / 65_536 / p.probability(token)))
        prefix.append(token)


@pytest.mark.parametrize("length", [0, 1, 2, 5, LONGEST_DRAFT])
def test_in_coupled_mode_a_fleet_needs_exactly_the_verdicts_that_were_foretold(length: int) -> None:
    seeds = range(16)
    found = really(seeds, tokens=40, length=length, mode=Mode.COUPLED)
    expected = measured(seeds, tokens=40).tokens_per_verdict(length, coupled=True)
    assert sum(tokens for tokens, _ in found) / sum(rounds for _, rounds in found) == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("length", [2, pytest.param(6, marks=pytest.mark.exhaustive)])
def test_in_residual_mode_a_fleet_needs_the_verdicts_that_were_foretold(length: int) -> None:
    """Fixed seeds; 300 outputs on each side, 4 standard errors: a false alarm in 16,000 seeds."""
    found = really(range(1000, 1300), tokens=40, length=length, mode=Mode.RESIDUAL)
    texts = measured(range(300), tokens=40).texts
    expected = PairAcceptance(texts).tokens_per_verdict(length, coupled=False)
    foretold = [(len(text.positions), _verdicts([each.accepted for each in text.positions], length)) for text in texts]
    error = sqrt(ratio_variance(found) + ratio_variance(foretold))
    mean = sum(tokens for tokens, _ in found) / sum(rounds for _, rounds in found)
    assert abs(mean - expected) < 4 * error
    assert error < 0.05 * expected, "the bound is tight enough to tell"


def ratio_variance(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the variance of sum(a) / sum(b) over pairs drawn independently."""
    a, b = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    ratio = a.sum() / b.sum()
    return float(((a - ratio * b) ** 2).sum() / b.sum() ** 2)


def test_verdicts_are_those_of_rounds_played_at_random() -> None:
    rng = random.Random(2)
    accepted = [rng.random() for _ in range(12)]
    for length in (0, 1, 3, 8):
        rounds = 0
        for _ in range(4000):
            place = 0
            while place < len(accepted):
                rounds += 1
                end = min(place + length, len(accepted))
                while place < end and rng.random() < accepted[place]:
                    place += 1
                place += 1  # the token in a rejected one's place, or the one after the draft
        # An output takes 12 verdicts at most, so the mean of 4,000 is within 0.2 of the expectation: 6 standard errors.
        assert rounds / 4000 == pytest.approx(_verdicts(accepted, length), abs=0.2)
    assert _verdicts([1.0] * 12, 3) == 3.0
    assert _verdicts([0.0] * 12, 3) == 12.0


def text(*overlaps: float, category: str = "toy") -> MeasuredText:
    return MeasuredText(category, tuple(MeasuredPosition(each, each, agrees=each > 0.5) for each in overlaps))


def test_means_weigh_tokens_and_errors_texts() -> None:
    found = PairAcceptance((text(1.0, 0.0), text(0.6, 0.6, 0.6, category="other"), text(0.8)))
    assert found.tokens == 6
    assert found.mean(coupled=False) == pytest.approx(3.6 / 6)
    assert found.mean(coupled=True) == pytest.approx(5 / 6)
    apart = (1.0 - 1.2) ** 2 + (1.8 - 1.8) ** 2 + (0.8 - 0.6) ** 2
    assert found.error(coupled=False) == pytest.approx(sqrt(apart * 3 / 2) / 6)
    assert PairAcceptance((text(0.5),)).error(coupled=False) is None
    parts = found.by_category()
    assert {name: part.tokens for name, part in parts.items()} == {"toy": 3, "other": 3}


def test_a_prompt_that_the_target_has_no_room_for_is_told() -> None:
    with pytest.raises(ModelsError, match="200"):
        write_texts(verifier(), [PROMPT * 100], policies=[terms(1, mode=Mode.COUPLED).policy], tokens=60)


def test_prompts_are_read_by_line_or_by_category(tmp_path: Path) -> None:
    lines, sorted_ = tmp_path / "prompts.txt", tmp_path / "prompts.toml"
    lines.write_text("One?\n\nTwo?\n")
    found = [(prompt.category, prompt.text) for prompt in read_prompts_by_category(lines)]
    assert found == [("all", "One?"), ("all", "Two?")]
    sorted_.write_text('code = ["a", "b"]\nchat = ["c"]\n')
    assert [(prompt.category, prompt.text) for prompt in read_prompts_by_category(sorted_)] == [
        ("code", "a"),
        ("code", "b"),
        ("chat", "c"),
    ]
    for content in ("code = 3", "code = [1]", "code = [", "[code]\nx = 1"):
        sorted_.write_text(content)
        with pytest.raises(ModelsError):
            read_prompts_by_category(sorted_)
    sorted_.write_text("code = []")
    with pytest.raises(ModelsError):
        read_prompts_by_category(sorted_)
    with pytest.raises(ModelsError):
        read_prompts_by_category(tmp_path / "none.toml")


def test_a_model_that_drafts_for_itself_is_accepted_whole(tmp_path: Path, fleet: Run) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    arguments = ("models", "check", path, path, "--measure", "--tokens", 12, "--temperature", 0)
    prompts = tmp_path / "prompts.toml"
    prompts.write_text('code = ["the t"]\nchat = ["he", "the the"]\n')
    found = as_json(fleet(*arguments, "--prompts", prompts, "--json"))["measured"]
    assert (found["texts"], list(found["categories"])) == (3, ["code", "chat"])
    assert found["residual"]["acceptance"] == found["coupled"]["acceptance"] == pytest.approx(1.0, abs=0.1)
    verdicts = found["residual"]["tokens_per_verdict"]
    assert list(verdicts) == [str(length) for length in range(1, LONGEST_DRAFT + 1)]
    assert verdicts["1"] > 1.5
    assert found["categories"]["code"]["residual"]["standard_error"] is None
    assert min(found["steps"]["1x1_ms"], found["steps"]["1x5_ms"]) > 0
    code, output, _ = fleet(*arguments, "--prompts", prompts)
    assert code == 0
    assert "Acceptance on 3 texts" in output
    assert "Tokens per verdict" in output


def test_a_pair_that_takes_more_memory_than_is_free_is_not_tried(
    tmp_path: Path, fleet: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(models, "available_memory", lambda: 1000)
    code, output, complaint = fleet("models", "try", path, path)
    assert code == 2
    assert "The pair fits." in output
    assert "smaller quantization" in complaint


def test_a_measurement_that_fails_ends_the_trial(tmp_path: Path, fleet: Run) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    trial = fleet("models", "try", path, path, "--each", 1, "--tokens", 4096, "--json")
    assert "models` did not finish" in refused(trial)


@pytest.mark.models
@pytest.mark.broker
@pytest.mark.exhaustive
def test_a_real_pair_is_tried_whole(fleet: Run, capsys: pytest.CaptureFixture[str]) -> None:
    pair = prepared("Q4_0.gguf"), prepared("target-Q8_0.gguf")
    tried = fleet("models", "try", *pair, "--each", 1, "--tokens", 8, "--engine", "llama.cpp", "--json")
    assert tried[0] == 0, tried[2]
    found = as_json(tried)
    measured, compared = found["measured"], found["demo"]["comparisons"][0]
    assert measured["texts"] == 6
    assert 0.4 < measured["residual"]["acceptance"] < 0.95
    assert min(measured["steps"]["1x1_ms"], measured["steps"]["1x5_ms"]) > 0
    edge_only, drafting = compared["edge_only"], compared["drafting"]
    assert min(edge_only["tokens_per_s"], drafting["tokens_per_s"], compared["chosen"]["tokens_per_s"]) > 0
    assert 0 < edge_only["bytes_per_token"] < drafting["bytes_per_token"], "drafts of the residual mode cost bytes"
    show_claims(found)
    shown = capsys.readouterr().out
    for way in (edge_only, drafting):
        assert f"{way['bytes_per_token']:.1f}" in shown


def test_prompts_that_have_no_room_are_told_before_anything_is_written(tmp_path: Path, fleet: Run) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the " * 200)
    code, _, complaint = fleet("models", "check", path, path, "--measure", "--prompts", prompts)
    assert code == 2
    assert "A prompt has" in complaint
    assert "256" in complaint


@pytest.mark.models
@pytest.mark.parametrize("target", [pytest.param("target", marks=pytest.mark.exhaustive), "target-Q8_0.gguf"])
def test_the_real_pair_is_measured(target: str, fleet: Run) -> None:
    pair = prepared("Q4_0.gguf"), prepared(target)
    found = as_json(fleet("models", "check", *pair, "--measure", "--each", 1, "--tokens", 24, "--json"))
    assert found["fits"]
    assert 0.4 < found["measured"]["residual"]["acceptance"] < 0.95
    verdicts = found["measured"]["residual"]["tokens_per_verdict"]
    assert 1.0 < verdicts["1"] < verdicts["4"] < 5.0
